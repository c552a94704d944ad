"""GGUF outputs: an edited model, an adapter for one, a converted checkpoint."""
