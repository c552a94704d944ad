"""The contract of a reader: one format, recognised by a closed rule and read into directions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TypedDict

from bake.directions.direction import Direction


class Shape(StrEnum):
    """What a plain tensor means, where its shape alone does not say."""

    VECTOR = "vector"
    """[d] or [1, d]: one vector."""
    SUBSPACE = "subspace"
    """[k, d]: one subspace, spanned by its rows."""
    LAYERS = "layers"
    """[layers, d]: one vector for each block."""
    HIDDEN_STATES = "hidden_states"
    """[layers + 1, d]: row 0 is the embedding's output, row l + 1 that of block l."""


class Options(TypedDict, total=False):
    """What a recipe says of an artifact that the artifact cannot say itself; see ``Request``."""

    key: str | None
    shape: str | None
    minus: Path | None
    feature: int | None
    index: float | None
    method: str | None
    quantiles: str | None
    source: int | None
    target: int | None
    heads: int | None


@dataclass(frozen=True, slots=True)
class Request:
    """What to read."""

    path: Path
    key: str | None = None
    """The name of one tensor, or eraser, among several."""
    shape: Shape | None = None
    minus: Path | None = None
    """The activations of the other class: the direction is the difference of the means."""
    feature: int | None = None
    """A row of a matrix of features, [features, d]: that row alone is the direction."""
    index: float | None = None
    """A block of a stack of hidden states; between two blocks, their blend."""
    method: str | None = None
    """Which of the system's methods the files are of, where they look alike."""
    quantiles: str | None = None
    """Within which quantiles of the fit the system applies its map."""
    source: int | None = None
    """The label that everything is taken to have."""
    target: int | None = None
    """The label that everything is given."""
    heads: int | None = None
    """How many heads the activations are of."""


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
    """Which of ``Options`` the format can need."""
    kinds: tuple[str, ...] = ()
    """The kinds of edit that the system itself makes of such files; none where none is known."""
    positions: str | None = None
    """At which tokens the system acts where that is not everywhere, as ``Positions`` spells it."""
    says: str | None = None
    """What the system does that weights cannot, in one sentence, for the plan and the record."""
    files: tuple[str, ...] = ()
    """The files of a folder that the format needs together; the first also stands for them all."""
    globs: tuple[str, ...] = ()
    """What the files of a folder are called where they have no fixed names."""
    beside: Callable[[str], tuple[str, ...]] = lambda name: ()
    """The names of the files that are read with one of a name, if any."""
