"""Routes: wire in, one call, wire out."""
