"""Integrity: which files are published, their hashes, what is in them, signatures.

Reading order: ``manifest``, ``weights``, ``scan``, ``provenance``, ``seal``, ``keys``, ``sign``.
"""
