"""Tests of steering.fit."""
