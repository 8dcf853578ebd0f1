"""Fuzzing: bodies that nobody thought of."""
