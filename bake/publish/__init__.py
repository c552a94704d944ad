"""Publishing: check an artifact, seal it, and put it on the Hub in one guarded commit.

Reading order: ``names``, ``manifest``, ``record``, ``weights``, ``provenance``, ``seal``; ``scan``,
``frontmatter``, ``licences``, ``preflight``; ``destination``, ``failures``,
``session``, ``remote``, ``commit``, ``push``.
"""
