"""``PlannedModel``: a checkpoint as a plan means it, before anything is rounded to be stored.

It is how whoever computes values (``outputs``, ``merge``) hands them to whoever writes them and to
whoever judges them (``verify``), which share nothing else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bake.checkpoints.stream import Producer
from bake.tiles import row_count

if TYPE_CHECKING:
    from torch import Tensor

    from bake.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class PlannedTensor:
    """One tensor, in float64.

    Attributes:
        name: as the files hold it.
        dtype: the type that it is stored in, as safetensors spells it.
        shape: the sizes of the axes.
        tiles: yields consecutive rows of it, in float64.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    tiles: Producer

    def value(self) -> "Tensor":
        """Return all of it, in float64."""
        import torch

        whole = torch.empty(self.shape, dtype=torch.float64)
        flat, start = whole.view(-1), 0
        for tile in self.tiles():
            flat[start : start + tile.numel()] = tile.reshape(-1)
            start += tile.numel()
        assert start == flat.numel(), self.name
        return whole

    def spans(self) -> "Iterator[tuple[int, int, Tensor]]":
        """Yield the tiles as [rows, columns], each with its first row and the one past its last."""
        start = 0
        for tile in self.tiles():
            stop = start + row_count(tile.shape)
            yield start, stop, tile.reshape(stop - start, -1)
            start = stop


def base_rows(
    base: "Checkpoint", planned: Mapping[str, PlannedTensor], name: str, start: int, stop: int
) -> "Tensor | None":
    """Return rows of a base's tensor as [rows, columns] in float64; None where it has none.

    Where the plan gives it a larger shape, zeros stand for what the base does not have.
    """
    import torch

    if name not in base.tensors:
        return None
    own = base.tensors[name].shape
    wide = planned[name].shape if name in planned else own
    last = min(stop, row_count(own))
    rows = torch.zeros(stop - start, wide[-1] if len(wide) > 1 else 1, dtype=torch.float64)
    if last > start:
        found = base.read_rows(name, start, last).to(torch.float64).reshape(last - start, -1)
        rows[: last - start, : found.shape[1]] = found
    return rows


@dataclass(frozen=True, slots=True, eq=False)
class PlannedModel:
    """What becomes of a base: its changed and its new tensors, and its configuration.

    Attributes:
        digest: of the plan.
        tensors: by name; every other tensor of the base stays as it is.
        config_text: ``config.json`` with the plan's changes.
    """

    digest: str
    tensors: Mapping[str, PlannedTensor]
    config_text: str

    @property
    def narrowest(self) -> str:
        """The type of fewest bits among its tensors: the one whose rounding is seen."""
        from bake.checkpoints.dtypes import torch_dtype

        dtypes = sorted({tensor.dtype for tensor in self.tensors.values()})
        return min(dtypes, key=lambda name: torch_dtype(name, where="the plan").itemsize)
