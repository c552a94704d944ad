"""The tensors of a checkpoint: every value in a floating-point type, everything else as it was."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bake.checkpoints import Checkpoint
from bake.checkpoints.config import CONFIG
from bake.checkpoints.dtypes import torch_dtype
from bake.checkpoints.planned import PlannedModel, PlannedTensor, base_rows
from bake.verify.stored.deviation import float_steps
from bake.verify.stored.files import WIDE, Directions, Rows
from bake.verify.stored.scales import needless

_VALUES = 1 << 20  # that are compared at a time
_ROWS = 256  # of which the steps of a matrix are taken


@dataclass(frozen=True, eq=False)
class StoredTensors:
    """A baked checkpoint beside its base and its plan."""

    baked: Checkpoint
    original: Checkpoint
    model: PlannedModel
    dtype: str
    """What the base is stored in, as safetensors spells it."""
    tied: tuple[str, str] | None
    """The head and the embedding that the plan unties it from; None where it does not."""
    written: Mapping[str, Directions]
    """What the edits read, for every tensor that writes to the stream."""
    unbiased: bool = True

    @property
    def planned(self) -> Mapping[str, PlannedTensor]:
        """What the files are to hold."""
        return self.model.tensors

    @property
    def stored_name(self) -> str:
        """The dtype, or the formats of the edited weights that are stored as codes."""
        formats = {c.format for name, c in self.baked.coded.items() if name in self.planned}
        if formats:
            return ", ".join(sorted(formats))
        return str(torch_dtype(self.dtype, where=CONFIG)).removeprefix("torch.")

    def reach(self, name: str) -> float:
        """Return one step: a value is stored as one of its two neighbours."""
        return 1.0

    def strays(self) -> Iterator[str]:
        """Yield what the plan leaves alone and the files do not."""
        before, after = self.original.tensors, self.baked.tensors
        yield from self._stray_parts()
        yield from self._stray_scales()
        yield from sorted(after.keys() - before.keys() - self.planned.keys())
        for name in (*before, *(name for name in self.planned if name not in before)):
            if name not in after or not self._is_kept(name):
                yield name

    def _is_kept(self, name: str) -> bool:
        """Whether a tensor has type, shape and, unless the plan changes it, the bytes it had."""
        have, plan = self.baked.tensors[name], self.planned.get(name)
        if plan is not None:
            return (have.dtype, have.shape) == (plan.dtype, plan.shape)
        was = self.original.tensors[name]
        if (have.dtype, have.shape) != (was.dtype, was.shape):
            return False
        if name not in self.original.coded:
            return self._same_bytes(self.original, self.baked, name)
        if name in self.baked.coded:
            return True  # its parts are compared one by one
        return self._is_dequantised(name)

    def _is_dequantised(self, name: str) -> bool:
        """Whether a tensor holds the values that the base has codes for, to nearest."""
        shape, dtype = self.original.tensors[name].shape, torch_dtype(self.dtype, where=name)
        each = max(1, _VALUES // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], each):
            span = start, min(shape[0], start + each)
            was, have = (one.read_part(name, *span) for one in (self.original, self.baked))
            if not torch.equal(was.to(have.dtype), have) or have.dtype != dtype:
                return False
        return True

    def _stray_parts(self) -> Iterator[str]:
        """Yield tensors of codes and scales, and beside them, that are not as they were.

        Those of a planned weight may have other codes and other scales, and nothing else.
        """
        before, after = self.original.as_stored, self.baked.as_stored
        parts = [name for name in before.tensors if name not in self.original.tensors]
        mine = {part for c in self.original.coded.values() for part in c.tensors} | set(parts)
        free = {
            part
            for name, coded in self.original.coded.items()
            if name in self.planned
            for part in (coded.codes.name, *coded.scales.names)
        }
        if not self.baked.coded:
            yield from sorted(name for name in parts if name in after.tensors)
            return
        for name in sorted(mine):
            was, have = before.tensors[name], after.tensors.get(name)
            same = have is not None and (have.dtype, have.shape) == (was.dtype, was.shape)
            if not same or (name not in free and not self._same_bytes(before, after, name)):
                yield name

    def _stray_scales(self) -> Iterator[str]:
        """Yield the scales of planned weights that are larger than those values call for."""
        for name, planned in self.planned.items():
            was, have = self.original.coded.get(name), self.baked.coded.get(name)
            if was is not None and have is not None and needless(was, have, planned):
                yield from have.scales.names

    @staticmethod
    def _same_bytes(original: Checkpoint, baked: Checkpoint, name: str) -> bool:
        was, have = original.tensors[name], baked.tensors[name]
        pairs = zip(
            original.chunks(was.shard, was.start, was.stop),
            baked.chunks(have.shard, have.start, have.stop),
            strict=True,
        )
        return all(torch.equal(_bytes(a), _bytes(b)) for a, b in pairs)

    def base(self, name: str, start: int, stop: int) -> Rows | None:
        """Return rows as the base has them; None where it has no such tensor."""
        return base_rows(self.original, self.planned, name, start, stop)

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """Return rows as the files have them."""
        return _wide(self.baked.read_rows(name, start, stop))

    def steps(self, name: str, start: int, stop: int, exact: Rows) -> Rows:
        """Return the distance between neighbouring values of the storage type."""
        if name in self.baked.coded:
            return self.baked.coded[name].steps(start, stop, exact)
        return float_steps(exact, torch_dtype(self.planned[name].dtype, where=name))

    @property
    def rounds(self) -> bool:
        """Whether values are stored in less than float32."""
        return self.dtype not in WIDE

    def spacing(self, name: str, weight: Tensor) -> Tensor:
        """Return the steps of the storage type at the values of a base's tensor.

        Codes share a scale by blocks; the root mean square of their steps stands for all.
        """
        if name in self.baked.coded:
            return torch.full_like(weight, self._typical_step(name))
        return float_steps(weight, torch_dtype(self.planned[name].dtype, where=name))

    def _typical_step(self, name: str) -> float:
        coded = self.baked.coded[name]
        stop = min(_ROWS, coded.matrix[0])
        steps = coded.steps(0, stop, coded.values(0, stop))
        return float(steps.square().mean().sqrt())

    def directions(self, name: str) -> Directions | None:
        """Return the directions that a tensor writes along."""
        found = self.written.get(name)
        if found is None:
            return None
        # Of a widened tensor the edits read what the base has of it.
        more = self.planned[name].shape[-2:][found.axis] - found.basis.shape[1]
        return replace(found, basis=torch.nn.functional.pad(found.basis, (0, more)))


def _bytes(chunk: memoryview) -> Tensor:
    return torch.frombuffer(chunk, dtype=torch.uint8)


def _wide(rows: Tensor) -> Rows:
    return rows.to(torch.float64).reshape(rows.shape[0], -1)
