"""Tests without an engine; the folder mirrors the packages."""
