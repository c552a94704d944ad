"""bake: fold activation edits into stock model weights, verify them against hooks, publish them."""

__version__ = "0.1.0"
