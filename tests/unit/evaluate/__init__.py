"""Tests of steering.evaluate."""
