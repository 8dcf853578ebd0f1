"""The vLLM plugin: edits the residual stream of chosen requests inside the engine's own forward pass."""
