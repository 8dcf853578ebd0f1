"""What was refused, and why: what is counted, sampled, traced and written down beside the answers.

Nothing here is in the way of an answer. Knows nothing of vLLM or torch.
"""
