"""GGUF files: header, tensor types, their grids, the codec, and a file opened."""
