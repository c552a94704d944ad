"""The rows of a matrix in tiles, so that no large one is in memory whole.

Rows count through all axes but the last: those of a stack of matrices are the rows of the first,
then of the second. A vector is one column of them.
"""

from collections.abc import Iterator, Sequence
from math import prod

TILE_VALUES = 1 << 18  # 2 MB in float64: what is made of a tile stays in the cache of a processor


def row_count(shape: Sequence[int]) -> int:
    """Return how many rows a tensor has; a number is one."""
    return shape[0] if len(shape) == 1 else prod(shape[:-1])


def spans(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first row of every tile of a matrix, and the row after its last."""
    step = max(1, TILE_VALUES // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
