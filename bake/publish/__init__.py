"""Transport: put an artifact on the Hub in one guarded commit, and check what is there.

Reading order: ``preflight``, ``failures``, ``session``, ``remote``, ``commit``, ``download``,
``run``, ``push``; ``follow_up``, ``fetch``.
"""
