"""The tensors of a checkpoint: every value in a floating-point type, everything else as it was."""

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
        """The dtype."""
        return str(torch_dtype(self.dtype, where=CONFIG)).removeprefix("torch.")

    def reach(self, name: str) -> float:
        """Return one unit in the last place: a value is stored as one of its two neighbours."""
        return 1.0

    def strays(self) -> Iterator[str]:
        """Yield what the plan leaves alone and the files do not."""
        before, after = self.original.tensors, self.baked.tensors
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
        pairs = zip(
            self.original.chunks(was.shard, was.start, was.stop),
            self.baked.chunks(have.shard, have.start, have.stop),
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
        return float_steps(exact, torch_dtype(self.planned[name].dtype, where=name))

    @property
    def rounds(self) -> bool:
        """Whether values are stored in less than float32."""
        return self.dtype not in WIDE

    def spacing(self, name: str, weight: Tensor) -> Tensor:
        """Return the steps of the storage type at the values of a base's tensor."""
        return float_steps(weight, torch_dtype(self.planned[name].dtype, where=name))

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
