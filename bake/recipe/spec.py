"""``Recipe``: what a recipe says, as checked values with the defaults filled in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bake.artifact import CARRIERS
from bake.directions import Shape
from bake.edits import EditKind

OUTPUTS = CARRIERS
ALLOWANCES = ("recast", "nulling", "approximate")
HUB_PREFIX = "hf://"


@dataclass(frozen=True, slots=True)
class Base:
    """The model that the recipe edits."""

    model: str
    """As the recipe names it: a path or a Hub id."""
    revision: str | None
    path: Path | None
    """The folder, from the recipe's own; None for a model on the Hub."""

    @property
    def source(self) -> str | Path:
        """The model as ``open_checkpoint`` takes it: a ``Path`` is never looked up on the Hub."""
        return self.model if self.path is None else self.path


@dataclass(frozen=True, slots=True)
class DirectionSpec:
    """Where a direction comes from, and what its artifact cannot say itself."""

    name: str
    file: str
    """As the recipe names it: a path, or ``hf://owner/name/path@revision``."""
    path: Path | None
    """The file or folder, from the recipe's own; None for one on the Hub."""
    reader: str | None
    key: str | None
    shape: Shape | None
    layer: int | None
    """The one layer of the artifact that is used everywhere; None leaves one item per layer."""
    sign: int
    """1, or −1 for the opposite direction."""


@dataclass(frozen=True, slots=True)
class EditSpec:
    """One edit as the recipe states it, with the defaults filled in."""

    place: str
    """The recipe and the number of the edit in it, for messages."""
    kind: EditKind
    directions: tuple[str, ...]
    at: tuple[str, ...]
    """Patterns of sites; empty stands for the sites that the artifact itself names."""
    strength: float
    alpha: float
    mean: bool | str | None
    """Whether to use the artifact's mean (None: where it has one), or the direction that is it."""
    coefficient: float
    degrees: float | None
    reflect: bool


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """What is written, and what the plan may do for it."""

    to: tuple[str, ...]
    allow: tuple[str, ...]
    target: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CardSpec:
    """What the model card says beyond what the record shows: the words of whoever publishes it."""

    notice: str | None = None
    """``safety`` for an edit that concerns refusals or safety."""
    summary: str | None = None
    intended: str | None = None
    side_effects: str | None = None
    not_for: str | None = None
    licence: str | None = None
    """The licence's id as the Hub spells it; the base's own where it is absent."""
    licence_name: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    """Data sets on the Hub that the directions were fitted on."""


@dataclass(frozen=True, slots=True)
class VerifySpec:
    """What the result is held to where it is not exact."""

    most_kl: float | None = None
    """Limit of mean KL(hooked ‖ baked) over mean KL(hooked ‖ base)."""


@dataclass(frozen=True, slots=True)
class CalibrateSpec:
    """How stand-ins are fitted for edits that have no exact fold."""

    prompts: str
    """The file with the texts, as the recipe names it."""
    path: Path
    """The same from the recipe's own folder."""
    tokens: int
    """The most that are used of every text."""
    rank: int
    corrections: int | None
    constant: bool


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe, read and checked."""

    title: str
    path: Path
    base: Base
    export: ExportSpec
    text: str = ""
    """The whole text of the file, comments included: it travels inside every output."""
    digest: str = ""
    """``sha256:…`` of the file."""
    directions: Mapping[str, DirectionSpec] = field(default_factory=dict)
    edits: tuple[EditSpec, ...] = ()
    card: CardSpec = CardSpec()
    verify: VerifySpec = VerifySpec()
    calibrate: CalibrateSpec | None = None
