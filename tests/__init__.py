"""Tests of Trimtab; importable so that they share fakes: `from tests.fakes import ...`."""
