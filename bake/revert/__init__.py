"""From a baked artifact back to its base, bit for bit."""
