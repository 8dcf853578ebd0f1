"""Steering of language models: edit algebra, bundles, the vLLM plugin, fitting and evaluation.

Knows nothing of HTTP; the gateway lives in `server`.
"""

__version__ = "0.1.0"
