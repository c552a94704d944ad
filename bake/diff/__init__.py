"""What differs between two models, proven from their bytes: which tensors, how much, in which rank.

Reading order: ``bytesource``, ``precision``, ``weights``, ``sources``; ``tiles``,
``spectrum``, ``change``; ``roles``, ``subspace``; ``files``, ``record``, ``verdict``; ``report``,
``compare``, ``plot``. Nothing here imports the code that makes plans or folds them.
"""

from bake.diff.compare import diff
from bake.diff.report import Diff

__all__ = ["Diff", "diff"]
