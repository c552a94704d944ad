"""What the command line and a Python user both call: a request, and what is done with it.

Nothing here prints, and neither click nor rich is imported: whoever calls hands in where progress
goes. Reading order: ``request``, ``fitting``; ``recorded``, ``reproduce``, ``published``.
"""
