"""Transport: put an artifact on the Hub in one guarded commit, and check what is there.

Reading order: ``preflight``, ``failures``, ``session``, ``remote``, ``commit``, ``download``,
``run``, ``push``; ``scratch``, ``originals``, ``low_disk``; ``follow_up``, ``fetch``.
"""
