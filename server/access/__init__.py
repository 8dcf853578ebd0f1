"""Who may ask for what: keys, permissions, limits, and the record of what was allowed.

Knows nothing of vLLM or torch.
"""
