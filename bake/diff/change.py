"""How one tensor differs between two models: equal bytes, or how much, where and of which rank."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bake.diff.spectrum import Spectrum, measure_spectrum
from bake.diff.tiles import Difference, Tile
from bake.diff.weights import Weights


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """How one matrix, vector or stack of codes differs.

    Attributes:
        name: the tensor, with the number of the matrix where it stacks several: ``w[3]``.
        tensor: the tensor's name in the model after.
        base_name: its name in the base: another one for a head that was tied.
        dtypes: storage types before and after.
        shape: of the whole tensor.
        matrix: rows and columns of what was measured.
        elements: how many values differ; of codes, how many bytes.
        rows: how many rows differ anywhere.
        columns: how many columns do.
        norm: ‖ΔW‖, or None where the values are codes or not finite.
        base_norm: ‖W‖.
        largest: the largest |ΔW_ij|.
        spectrum: None where it was not asked for, or cannot be had.
        note: why something is missing.
    """

    name: str
    tensor: str
    base_name: str
    dtypes: tuple[str, str]
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    elements: int
    rows: int | None = None
    columns: int | None = None
    norm: float | None = None
    base_norm: float | None = None
    largest: float | None = None
    spectrum: Spectrum | None = None
    note: str | None = None

    @property
    def relative(self) -> float | None:
        """‖ΔW‖ / ‖W‖; None where W is zero or the values cannot be had."""
        if self.norm is None or not self.base_norm:
            return None
        return self.norm / self.base_norm

    @property
    def explained(self) -> float | None:
        """The share of ‖ΔW‖² in the directions that count; None where their number is unknown."""
        if self.spectrum is None or not self.norm:
            return None
        count = self.spectrum.most if self.spectrum.rank is None else self.spectrum.rank
        return float(self.spectrum.values[:count].square().sum()) / self.norm**2

    @property
    def rounding(self) -> float | None:
        """The share of ‖ΔW‖² that errors spread evenly over the grid's steps would have."""
        if self.spectrum is None or not self.norm or math.isnan(self.spectrum.rounding):
            return None
        return self.spectrum.rounding / self.norm**2


def same_bytes(base: Weights, out: Weights, base_name: str, name: str) -> bool:
    """Tell whether two tensors of one length are the same to the last byte."""
    pairs = zip(base.chunks(base_name), out.chunks(name), strict=True)
    return all(old == new for old, new in pairs)


def measure(
    base: Weights, out: Weights, base_name: str, name: str, *, most: int | None
) -> tuple[Change, ...]:
    """Return how two tensors of one shape differ, one change for every matrix that they stack.

    Nothing where only the storage type differs and every value is the same.

    Args:
        base: the weights before.
        out: the weights after.
        base_name: the tensor in the base.
        name: the tensor after.
        most: the largest rank to tell from a larger one; None for no ranks.
    """
    old, new = base.tensors[base_name], out.tensors[name]
    if not (old.numeric and new.numeric):
        return (_codes(base, out, base_name, name),)
    found = []
    for index in range(new.matrices):
        change = Difference(base, out, base_name, name, index)
        made = _matrix(change, most, stacked=new.stacks)
        if made is not None:
            found.append(made)
    if not found and old.dtype == new.dtype:
        same = "other bytes for the same values"
        dtypes = (old.dtype, new.dtype)
        return (Change(name, name, base_name, dtypes, new.shape, new.matrix, 0, note=same),)
    return tuple(found)


def _codes(base: Weights, out: Weights, base_name: str, name: str) -> Change:
    old, new = base.tensors[base_name], out.tensors[name]
    differing = 0
    if old.nbytes == new.nbytes:
        for one, other in zip(base.chunks(base_name), out.chunks(name), strict=True):
            pair = (torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in (one, other))
            differing += int(torch.ne(*pair).sum())
    return Change(
        name,
        name,
        base_name,
        (old.dtype, new.dtype),
        new.shape,
        new.matrix,
        differing,
        note="stored as codes: bytes are counted, and there are no norms",
    )


@dataclass(slots=True)
class _Sums:
    """What one pass over the tiles adds up."""

    rows: Tensor
    columns: Tensor
    elements: int = 0
    delta: float = 0.0
    base: float = 0.0
    largest: float = 0.0

    def add(self, tile: Tile) -> None:
        delta = tile.delta.to(torch.float64)
        self.rows[tile.start : tile.stop] = tile.differs.any(dim=1)
        self.columns |= tile.differs.any(dim=0)
        self.elements += int(tile.differs.sum())
        self.delta += float(delta.square().sum())
        self.base += float(tile.before.to(torch.float64).square().sum())
        self.largest = max(self.largest, float(delta.abs().max()))


def _matrix(change: Difference, most: int | None, *, stacked: bool) -> Change | None:
    rows, columns = change.shape
    sums = _Sums(torch.zeros(rows, dtype=torch.bool), torch.zeros(columns, dtype=torch.bool))
    for tile in change.tiles():
        sums.add(tile)
    if not sums.elements:
        return None
    old, new = change.base.tensors[change.base_name], change.out.tensors[change.name]
    finite = math.isfinite(sums.delta) and math.isfinite(sums.base)
    spectrum = None
    if finite and most is not None and sums.delta:
        spectrum = measure_spectrum(change, sums.rows, sums.columns, most)
    return Change(
        name=f"{change.name}[{change.index}]" if stacked else change.name,
        tensor=change.name,
        base_name=change.base_name,
        dtypes=(old.dtype, new.dtype),
        shape=new.shape,
        matrix=change.shape,
        elements=sums.elements,
        rows=int(sums.rows.sum()),
        columns=int(sums.columns.sum()),
        norm=math.sqrt(sums.delta) if finite else None,
        base_norm=math.sqrt(sums.base) if finite else None,
        largest=sums.largest if finite else None,
        spectrum=spectrum,
        note=None if finite else "holds NaN or an infinity, so there are no norms",
    )
