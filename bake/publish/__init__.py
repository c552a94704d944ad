"""Publishing: check an artifact, seal it, and put it on the Hub in one guarded commit.

Reading order: ``names``, ``manifest``, ``record``, ``weights``, ``provenance``, ``seal``; ``scan``,
``frontmatter``, ``licences``, ``preflight``; ``cards``, ``card``; ``destination``, ``failures``,
``session``, ``remote``, ``commit``, ``download``, ``run``, ``push``; ``scratch``, ``originals``,
``low_disk``; ``follow_up``.
"""
