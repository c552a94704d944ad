"""Factors that several carriers of one plan share, so that each weight is read for one of them.

A checkpoint reads every edited weight to fold it. An adapter needs products of the same tiles, so
they are summed up while the tiles pass, and set aside in a file without a name, which vanishes with
the process. What no carrier has read yet (an adapter is written without a checkpoint, or a run that
was interrupted finds the shard finished) is read once, for all adapters.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from bake.checkpoints import Checkpoint
from bake.fold import ReadRows
from bake.outputs.factors import Factors, FactorSum, factors_from
from bake.plan import TensorUpdate
from bake.plan.lowrank import Target, low_rank

_WIDTH = 8  # bytes of a float64


class SharedFactors:
    """The factors of a plan's weights in float64, at the rank of each change.

    Use it as a context: the file goes with it.
    """

    def __init__(self, checkpoint: Checkpoint, targets: Iterable[Target], folder: Path) -> None:
        """Begin with nothing.

        Args:
            checkpoint: the base.
            targets: the weights that adapters need factors of.
            folder: where the file without a name lies, on a disk that has room for the factors.
        """
        self._compute = factors_from(checkpoint)
        self._targets = {t.name: t for t in targets if t.update is not None}
        self._file = tempfile.TemporaryFile(dir=folder)
        self._places: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {}
        self._turn = Lock()  # the weights pass in several threads

    def __enter__(self) -> "SharedFactors":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def watched(self, update: TensorUpdate, read: ReadRows) -> ReadRows:
        """Return a reader of the same rows that sums up the factors as they pass for a first time.

        Its tiles are in float64, so that they are widened once for fold and factors.
        """
        target = self._targets.get(update.name)
        if target is None or update.name in self._places:
            return read
        total = FactorSum(target.shape, target.output_axis, low_rank(update))
        seen = 0  # rows, from the first on without a gap

        def watching(start: int, stop: int) -> Tensor:
            nonlocal seen
            tile = read(start, stop).to(torch.float64)
            if start == seen < target.shape[0]:
                total.add(tile, start)
                seen = stop
                if seen == target.shape[0]:
                    self._keep(target.name, total.factors())
            return tile

        return watching

    def source(self, target: Target) -> Factors:
        """Return (A, B) of a target, from its own pass over the weight if nobody has made one."""
        if target.name not in self._places:
            self._keep(target.name, self._compute(target))
        position, *shapes = self._places[target.name]
        with self._turn:
            self._file.seek(position)
            a, b = (self._load(shape) for shape in shapes)
        return a, b

    def _keep(self, name: str, factors: Factors) -> None:
        with self._turn:
            place = self._file.seek(0, 2)
            for factor in factors:
                self._file.write(factor.contiguous().numpy().data)
        self._places[name] = (place, tuple(factors[0].shape), tuple(factors[1].shape))

    def _load(self, shape: tuple[int, ...]) -> Tensor:
        raw = self._file.read(_WIDTH * shape[0] * shape[1])
        return torch.from_numpy(np.frombuffer(bytearray(raw), dtype=np.float64)).reshape(shape)
