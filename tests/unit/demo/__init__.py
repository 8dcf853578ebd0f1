"""Tests of steering.demo."""
