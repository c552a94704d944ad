"""Transport: put an artifact on the Hub in one guarded commit, and check what is there.

Reading order: ``preflight``, ``options``, ``prepare``; ``failures``, ``session``, ``remote``,
``hub``, ``commit``, ``download``; ``push`` puts them together; ``follow_up``, ``fetch``.
"""
