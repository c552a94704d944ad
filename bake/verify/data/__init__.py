"""Neutral prompts and texts that a verification runs where it is given none."""
