"""Tests that others wrote, and checks against schemas that others wrote."""
