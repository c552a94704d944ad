"""``Stored``: what a format needs of the checkpoint that holds its codes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from bake.checkpoints.header import TensorInfo


class Stored(Protocol):
    """The tensors of a checkpoint as its files have them."""

    @property
    def source(self) -> str:
        """What the user named, for messages."""
        ...

    @property
    def tensors(self) -> "Mapping[str, TensorInfo]":
        """Each tensor's place by name."""
        ...

    def read(self, name: str) -> "Tensor":
        """Return a tensor in its storage type."""
        ...

    def read_part(self, name: str, start: int, stop: int) -> "Tensor":
        """Return a part of a tensor along axis 0."""
        ...
