"""The tiny random Llama of the fit's tests, for what an evaluation computes beside the served API."""

from __future__ import annotations

from tests.unit.fit.conftest import tiny, tiny_path

__all__ = ["tiny", "tiny_path"]
