"""Weights that a checkpoint stores as codes: decoded to read them, and written back as codes.

A weight is level × scale, or (level − zero) × scale: its codes choose among the few levels of a
number format, and blocks of codes share a scale. Reading order: ``levels``, ``packing``, ``coded``,
``rounding``; one file a format; ``registry``, ``view``.

To add a format, write a file that finds its weights (``registry.Finder``) and name it in
``registry.METHODS``; the tests' oracle is the library that defines the format.
"""
