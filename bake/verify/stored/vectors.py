"""A control vector: the constant behind every block is the sum of the edits' offsets there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from bake.affine import AffineMap
from bake.checkpoints.gguf.file import Gguf
from bake.checkpoints.planned import PlannedTensor
from bake.edits import Edit
from bake.sites import Site, SiteKind
from bake.verify.stored.blocks import values_of
from bake.verify.stored.deviation import float_steps
from bake.verify.stored.files import Directions, Rows


@dataclass(frozen=True, eq=False)
class StoredVectors:
    """The vectors of a file, and the edits that they stand for."""

    model: Gguf
    edits: Sequence[Edit]
    unbiased: bool = False
    rounds: bool = False
    stored_name: str = "a control vector"
    tied: tuple[str, str] | None = None

    @cached_property
    def planned(self) -> dict[str, PlannedTensor]:
        """What is to be added behind every block.

        Mirrors llama.cpp's src/llama-adapter.cpp: ``direction.N`` is added to block N's output.
        """
        sums: dict[str, Tensor] = {}
        for edit in self.edits:
            assert isinstance(edit.map, AffineMap)
            for site in edit.sites:
                name = f"direction.{_block(site)}"
                sums[name] = sums.get(name, torch.zeros_like(edit.map.bias)) + edit.map.bias
        return {
            name: PlannedTensor(name, "F32", tuple(value.shape), partial(_once, value))
            for name, value in sums.items()
            if bool(value.any())
        }

    def reach(self, name: str) -> float:
        """Return by how many steps a stored value may lie from the planned one."""
        return 1.0

    def strays(self) -> Iterator[str]:
        """Yield the vectors that no edit asks for, and those that are missing."""
        yield from sorted(self.model.tensors.keys() ^ self.planned.keys())

    def base(self, name: str, start: int, stop: int) -> Rows | None:
        """Return None: nothing is added behind a block of the base."""
        return None

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """Return the vector as the file has it."""
        info = self.model.tensors[name]
        return values_of(self.model.read_rows(name, 0, 1), info.kind, name).T[start:stop]

    def steps(self, name: str, start: int, stop: int, exact: Rows) -> Rows:
        """Return the distance between neighbours in float32."""
        return float_steps(exact, torch.float32)

    def spacing(self, name: str, weight: Tensor) -> Tensor:
        """Return zero: no weight is rounded."""
        return torch.zeros_like(weight)

    def directions(self, name: str) -> Directions | None:
        """Return None: a vector is too short to tell."""
        return None


def _once(value: Tensor) -> Iterator[Tensor]:
    yield value


def _block(site: Site) -> int:
    """Return the block behind which a site of the stream is."""
    assert site.layer is not None
    return site.layer - 1 if site.kind is SiteKind.RESID_PRE else site.layer
