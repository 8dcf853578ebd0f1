"""Hypothesis without deadlines: a shared machine of two cores pauses any example for longer than its limit."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("shared-machine", deadline=None, print_blob=True)
settings.load_profile("shared-machine")
