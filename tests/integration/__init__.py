"""Tests on the real vLLM engine."""
