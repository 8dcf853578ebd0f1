"""Fitting of edits: data sets, activations, directions, calibrated doses. Knows nothing of the server or of vLLM."""
