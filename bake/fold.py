"""Fold maps into one tensor: W' = O (W + U) I + V, tile by tile, in float64.

A weight is read in tiles of rows, as it lies on disk, so memory does not grow with it. Maps within
a row act on a tile alone. A thin map across rows, I + L R, needs R W first: one pass over the tiles
accumulates it, a second one writes. Only a dense map across rows holds the matrix.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, DenseMap, DiagonalMap, LowRankMap
from bake.edits import WeightUpdate
from bake.tiles import spans

ReadRows = Callable[[int, int], Float[Tensor, "rows columns"]]
"""Returns the rows from start to stop of a tensor, in storage dtype."""

Rows = Sequence[int] | None


@dataclass(frozen=True, slots=True, eq=False)
class WeightFold:
    """What happens to one weight; the orientation is stated, never guessed from the shape.

    ``outputs`` act on the output axis, each on its own rows of it (None: all), disjoint from the
    others; ``input`` acts on what the layer reads; ``added`` is V. ``table`` marks an embedding,
    whose rows are outputs that are looked up, so that a map's constant is added to each of them.
    """

    shape: tuple[int, int]
    output_axis: int
    outputs: Sequence[tuple[Rows, AffineMap]] = ()
    updates: Sequence[WeightUpdate] = ()
    input: AffineMap | None = None
    table: bool = False
    added: WeightUpdate | None = None

    def __post_init__(self) -> None:
        # A table looks rows up: it reads nothing, and its outputs lie along a row.
        assert not self.table or (self.output_axis == 1 and self.input is None)


def padded(
    read: ReadRows,
    shape: Sequence[int],
    wide: Sequence[int],
    places: Sequence[Sequence[int] | None] = (None, None),
) -> ReadRows:
    """Return a reader of a matrix that has zeros where it is wider.

    Args:
        read: reads the rows of the matrix.
        shape: its shape.
        wide: the shape with the zeros.
        places: for each axis, in rising order, where its rows or columns are; None for the first.
    """
    if tuple(shape) == tuple(wide):
        return read
    rows, columns = (
        range(size) if place is None else place for size, place in zip(shape, places, strict=True)
    )
    index = torch.tensor(columns)

    def wider(start: int, stop: int) -> Tensor:
        tile = torch.zeros(stop - start, wide[1], dtype=torch.float64)
        first, last = bisect_left(rows, start), bisect_left(rows, stop)
        if last > first:
            own = torch.tensor(rows[first:last]) - start
            part = tile.new_zeros(last - first, wide[1])
            part[:, index] = read(first, last).to(torch.float64)
            tile[own] = part
        return tile

    return wider


def fold_weight(read: ReadRows, fold: WeightFold) -> Iterator[Float[Tensor, "rows columns"]]:
    """Yield the tiles of W', in float64, in storage order."""
    mixers = [_Mixer(rows, map_) for rows, map_ in _across_rows(fold)]
    if any(isinstance(mixer.map, DenseMap) for mixer in mixers):
        whole = torch.cat([_within_rows(read, fold, *span) for span in spans(fold.shape)])
        for mixer in mixers:
            mixer.gather(whole, 0)
            whole = mixer.finish(whole, 0)
        yield _with_added(whole, fold, 0)
        return
    if any(mixer.needs_pass for mixer in mixers):
        for span in spans(fold.shape):
            tile = _within_rows(read, fold, *span)
            for mixer in mixers:
                mixer.gather(tile, span[0])
    for span in spans(fold.shape):
        tile = _within_rows(read, fold, *span)
        for mixer in mixers:
            tile = mixer.finish(tile, span[0])
        yield _with_added(tile, fold, span[0])


def fold_bias(
    bias: Float[Tensor, " m"],
    fold: WeightFold,
    *,
    read: ReadRows | None = None,
    shift: Float[Tensor, " n"] | None = None,
    addend: Float[Tensor, " m"] | None = None,
) -> Float[Tensor, " m"]:
    """Return O (b + (W + U) shift) + addend, in float64.

    Args:
        bias: b, zeros where the layer has none.
        fold: the maps of the layer; its ``input`` is not applied to ``shift``.
        read: reads W; needed with ``shift``.
        shift: the constant that the layer's input is moved by.
        addend: a constant on the output side, added last.
    """
    result = bias.to(torch.float64)
    if shift is not None:
        assert read is not None
        result = result + _product(read, fold, shift)
    for rows, map_ in fold.outputs:
        if rows is None:
            result = map_(result)
        else:
            index = torch.tensor(rows)
            result = result.index_copy(0, index, map_(result[index]))
    return result if addend is None else result + addend


def _product(read: ReadRows, fold: WeightFold, shift: Tensor) -> Tensor:
    """Return (W + U) shift."""
    total = shift.new_zeros(fold.shape[fold.output_axis])
    for start, stop in spans(fold.shape):
        tile = read(start, stop).to(torch.float64)
        if fold.output_axis == 0:
            total[start:stop] = tile @ shift
        else:
            total += tile.T @ shift[start:stop]
    for update in fold.updates:
        total = total + update.left @ (update.right @ shift)
    return total


def _within_rows(read: ReadRows, fold: WeightFold, start: int, stop: int) -> Tensor:
    """Return one tile with updates added and every map within a row applied, in its own memory."""
    tile = read(start, stop).to(torch.float64, copy=True)
    for update in fold.updates:
        tile = _sum(tile, update, fold.output_axis, start)
    if fold.output_axis == 0:
        return tile if fold.input is None else fold.input.adjoint(tile)
    for rows, map_ in fold.outputs:
        apply = map_ if fold.table else map_.linear
        if rows is None:
            tile = apply(tile)
        else:
            index = torch.tensor(rows)
            tile = tile.index_copy(1, index, apply(tile[:, index]))
    return tile


def _with_added(tile: Tensor, fold: WeightFold, start: int) -> Tensor:
    return tile if fold.added is None else _sum(tile, fold.added, fold.output_axis, start)


def _sum(tile: Tensor, update: WeightUpdate, output_axis: int, start: int) -> Tensor:
    """Return a tile with what a thin update adds to its rows."""
    outer, inner = update.left, update.right.T
    first, second = (outer, inner) if output_axis == 0 else (inner, outer)
    return tile.addmm_(first[start : start + len(tile)], second.T)


def _across_rows(fold: WeightFold) -> list[tuple[Rows, AffineMap]]:
    """Return the maps that mix rows of the stored matrix."""
    if fold.output_axis == 0:
        return list(fold.outputs)
    # Stored as [in, out]: y = Wᵀ A x reads the rows of Aᵀ W.
    return [] if fold.input is None else [(None, fold.input.transpose())]


class _Mixer:
    """One linear map across the rows of a matrix that is seen tile by tile."""

    def __init__(self, rows: Rows, map_: AffineMap) -> None:
        self.map = map_
        self.rows = None if rows is None else torch.tensor(rows)
        self.needs_pass = isinstance(map_, LowRankMap) and map_.left.shape[1] > 0
        self.gathered: Tensor | None = None

    def _local(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Return positions within the tile, and the map's indices that they stand for."""
        if self.rows is None:
            return torch.arange(count), torch.arange(start, start + count)
        inside = (self.rows >= start) & (self.rows < start + count)
        (indices,) = torch.nonzero(inside, as_tuple=True)
        return self.rows[indices] - start, indices

    def gather(self, tile: Tensor, start: int) -> None:
        """Add one tile's part of R W."""
        if not isinstance(self.map, LowRankMap):
            return
        if self.rows is None:
            part = self.map.right[:, start : start + tile.shape[0]] @ tile
        else:
            local, indices = self._local(start, tile.shape[0])
            part = self.map.right[:, indices] @ tile[local]
        self.gathered = part if self.gathered is None else self.gathered + part

    def finish(self, tile: Tensor, start: int) -> Tensor:
        """Return the tile with the map applied."""
        if isinstance(self.map, LowRankMap) and self.rows is None:
            if self.gathered is None:
                return tile
            # In one pass over the tile, without the product in memory.
            return tile.addmm_(self.map.left[start : start + tile.shape[0]], self.gathered)
        local, indices = self._local(start, tile.shape[0])
        if isinstance(self.map, LowRankMap):
            if self.gathered is None or local.numel() == 0:
                return tile
            return tile.index_add(0, local, self.map.left[indices] @ self.gathered)
        if isinstance(self.map, DiagonalMap):
            return tile.index_copy(0, local, self.map.scale[indices].unsqueeze(1) * tile[local])
        assert isinstance(self.map, DenseMap)
        return tile.index_copy(0, local, self.map.full[indices][:, indices] @ tile[local])
