"""The contract of a reader: one format, recognised by a closed rule and read into directions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from bake.directions.direction import Direction


class Shape(StrEnum):
    """What a plain tensor means, where its shape alone does not say."""

    VECTOR = "vector"
    """[d] or [1, d]: one vector."""
    SUBSPACE = "subspace"
    """[k, d]: one subspace, spanned by its rows."""
    LAYERS = "layers"
    """[layers, d]: one vector for each block."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to read."""

    path: Path
    key: str | None = None
    """The name of one tensor, or eraser, among several."""
    shape: Shape | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What a reader found."""

    items: tuple[Direction, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    concept: str | None = None
    """The artifact's own name for it, where it has one."""
    files: tuple[Path, ...] = ()
    """The files that were read; empty stands for the path of the request."""

    def beside(self, metadata: Mapping[str, str]) -> "Content":
        """Return the content with further metadata; what it says itself stands before them."""
        return replace(self, metadata={**metadata, **self.metadata})


@dataclass(frozen=True, slots=True)
class Reader:
    """One format."""

    summary: str
    """The format in a few words, for messages and for the documentation."""
    recognises: Callable[[Path], bool]
    """Whether an existing path is of this format; asked in the order of ``READERS``."""
    read: Callable[[Request], Content]
    """Raises DirectionError: the file is malformed, hostile or needs an option."""
    options: frozenset[str] = frozenset()
    """Which of ``key`` and ``shape`` the format can need."""
    files: tuple[str, ...] = ()
    """The files of a folder that the format needs together; the first also stands for them all."""
