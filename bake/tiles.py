"""The rows of a matrix in tiles, so that no large one is in memory whole."""

from collections.abc import Iterator, Sequence

TILE_VALUES = 1 << 20  # 8 MB in float64: products with a few factors are quickest in a cache


def spans(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first row of every tile of a matrix, and the row after its last."""
    step = max(1, TILE_VALUES // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
