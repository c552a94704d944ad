"""bitsandbytes in four bits (NF4, FP4): a table of sixteen numbers under the largest of a block.

Mirrors bitsandbytes' ``functional.py``: ``QuantState.from_dict`` and ``dequantize_4bit``. A block
is a stretch of the flattened weight; of two codes in a byte the first is the higher. Scales that
were quantised again (double quantisation) are decoded, and stay: a block that outgrows its own is
refused.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from bake.checkpoints.quantised.coded import Coded, ScaleTable, blocks, not_less, whole
from bake.checkpoints.quantised.found import Found, beside, disagreeing
from bake.checkpoints.quantised.levels import table
from bake.checkpoints.quantised.packing import from_bytes, to_bytes
from bake.checkpoints.quantised.stored import Stored
from bake.errors import CheckpointError

_STATES = ("nf4", "fp4")
_STATE = "quant_state.bitsandbytes__"


@dataclass(frozen=True, slots=True, eq=False)
class _Flat:
    """Codes in bytes [values / 2, 1], the first of each in its high bits."""

    checkpoint: Stored
    name: str
    width: int

    def read(self, start: int, stop: int) -> UInt8[Tensor, "rows columns"]:
        """Return the codes of some rows."""
        each = self.width // 2
        stored = self.checkpoint.read_part(self.name, start * each, stop * each)
        return _swapped(from_bytes(stored.reshape(-1, each)))

    def stored(self, tiles: Iterable[UInt8[Tensor, "rows columns"]]) -> Iterator[Tensor]:
        """Yield the bytes."""
        for tile in tiles:
            yield to_bytes(_swapped(tile)).reshape(-1, 1)


def _swapped(codes: Tensor) -> Tensor:
    """Return codes with those of each byte exchanged."""
    return codes.reshape(codes.shape[0], -1, 2).flip(2).reshape(codes.shape)


@dataclass(frozen=True, slots=True, eq=False)
class _Largest:
    """The largest of every block, ``weight.absmax``, in float32 or quantised again."""

    checkpoint: Stored
    stem: str
    matrix: tuple[int, int]
    block: int
    state: Mapping[str, Any]

    @property
    def _nested(self) -> bool:
        return "nested_offset" in self.state

    @property
    def name(self) -> str:
        return f"{self.stem}.absmax"

    @property
    def names(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.name,)

    def read(self) -> ScaleTable:
        """Return them, a row for each of the weight."""
        stored = self.checkpoint.read(self.name)
        if self._nested:
            of, largest = (
                self.checkpoint.read(f"{self.stem}.{part}")
                for part in ("nested_quant_map", "nested_absmax")
            )
            places = blocks(stored.shape[0], int(self.state["nested_blocksize"]))
            # In float32, as the library does: its result is what is multiplied.
            stored = of[stored.to(torch.int64)] * largest[places]
            stored = stored + torch.tensor(self.state["nested_offset"], dtype=torch.float32)
        rows, columns = self.matrix
        scale = stored.to(torch.float64).reshape(rows, -1)
        return ScaleTable(scale, torch.arange(rows), blocks(columns, self.block))

    def hold(self, scale: Float64[Tensor, "r c"]) -> Float64[Tensor, "r c"]:
        """Return float32 numbers that are not less; none where they are quantised again."""
        if self._nested:
            return torch.full_like(scale, torch.inf)
        return not_less(scale, torch.float32)

    def stored(self, scale: Float64[Tensor, "r c"]) -> Mapping[str, Tensor]:
        """Return the tensor; the one that is there where scales are quantised again."""
        if self._nested:
            return {self.name: self.checkpoint.read(self.name)}
        return {self.name: scale.reshape(-1).to(torch.float32)}


def find(checkpoint: Stored, settings: Mapping[str, Any], dtype: str) -> Found:
    """Return the weights of a checkpoint whose configuration says ``bitsandbytes``.

    Raises:
        CheckpointError: the configuration and the tensors disagree, they are of eight bits, or rows
            are no whole number of blocks.
    """
    if not settings.get("load_in_4bit"):
        raise CheckpointError(
            "the weights are quantised by bitsandbytes to eight bits",
            where=checkpoint.source,
            why="bake reads its four bits (NF4 and FP4) only",
            fix="start from the unquantised base",
        )
    coded = []
    for name in checkpoint.tensors:
        stem, mark, kind = name.partition(f".{_STATE}")
        if mark:
            coded.append(_coded(checkpoint, stem, name, kind, dtype))
    return Found(tuple(coded))


def _coded(checkpoint: Stored, stem: str, name: str, kind: str, dtype: str) -> Coded:
    tensors = checkpoint.tensors
    needed = (stem, f"{stem}.absmax", f"{stem}.quant_map")
    if kind not in _STATES or not all(one in tensors for one in needed):
        raise disagreeing(checkpoint, "bitsandbytes", f"{stem} lacks a part of its state")
    state = _state(checkpoint, name)
    shape, block = tuple(state["shape"]), int(state["blocksize"])
    rows, columns = shape
    if (storage := tensors[stem].dtype) != "U8":
        raise CheckpointError(
            f"{stem} has its codes in {storage} (bnb_4bit_quant_storage)",
            where=checkpoint.source,
            why="bake reads codes that are stored in bytes",
            fix="start from the unquantised base",
        )
    if columns % block or tensors[stem].shape != (rows * columns // 2, 1):
        raise CheckpointError(
            f"{stem} of {rows} × {columns} is quantised in blocks of {block} that run across rows",
            where=checkpoint.source,
            fix="start from the unquantised base",
        )
    parts = ("quant_map", "nested_absmax", "nested_quant_map", f"{_STATE}{kind}")
    return Coded(
        name=stem,
        shape=shape,
        dtype=dtype,
        format=f"bitsandbytes {kind.upper()}",
        levels=table(whole(checkpoint, f"{stem}.quant_map")),
        codes=_Flat(checkpoint, stem, columns),
        scales=_Largest(checkpoint, stem, (rows, columns), block, state),
        beside=beside(checkpoint, stem, parts),
    )


def _state(checkpoint: Stored, name: str) -> dict[str, Any]:
    """Return the state that a tensor holds as JSON."""
    try:
        found = json.loads(bytes(checkpoint.read(name).tolist()))
        sizes = [*found["shape"], found["blocksize"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name} is no state of bitsandbytes: {error}", where=checkpoint.source
        ) from error
    if len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes):
        raise CheckpointError(f"{name} is no state of a matrix", where=checkpoint.source)
    return dict(found)
