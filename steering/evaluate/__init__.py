"""Measuring refusal: prompts nothing was fitted on, judged, with intervals."""
