"""Unit tests of the plugin's parts; none of them imports vLLM."""
