"""The gateway: an OpenAI-compatible FastAPI application over a vLLM engine that steers per request.

Knows `steering`; `steering` knows nothing of it.
"""
