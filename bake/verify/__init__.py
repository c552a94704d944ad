"""Comparisons of a baked artifact with the hooked base model, in the runtime that serves it."""
