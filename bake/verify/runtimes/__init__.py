"""The runtimes that serve a baked artifact, each in its own process and its own environment.

``registry`` names them, with one file of facts each (``runtime`` says which facts); ``request`` is
what one is asked and what it answers, ``exchange`` asks. The ``_*_worker`` files are the scripts
that run in the other environment and import nothing of bake.
"""
