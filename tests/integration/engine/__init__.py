"""The plugin in the real vLLM engine, on tiny random models."""
