"""What becomes of the stream: the write into every point, and what could not be folded."""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap
from bake.plan.aside import Aside
from bake.plan.hooks import Hook
from bake.plan.quotient import Computed, Gate
from bake.plan.relocate import Carried
from bake.sites import Site


@dataclass(frozen=True, slots=True)
class Failure:
    """One edit that cannot be folded at one site, with the reason and the remedy."""

    edit: int
    site: Site
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """What becomes of the writes into one point, in the hooked stream's frame."""

    linear: AffineMap
    """A, which acts on every write into the point."""
    constant: Float[Tensor, " d"]
    """What must be added at this point once, component hooks' constants included."""
    seen: AffineMap
    """What readers take for y: T z, without what an edit was to remove and left."""
    inverse: AffineMap
    """T⁻¹, with z = T⁻¹ y; it acts last on what is written."""
    edits: frozenset[int]
    """The edits that A and the constant come from, but for component hooks."""
    turned_by: frozenset[int]
    """The edits that T comes from, all of them at later points."""
    cleared_by: frozenset[int]
    """Edits at this point or before, of which readers leave out what was left, or which they
    apply."""
    aside: Aside
    """What a writer into the point that ends in a norm becomes."""
    aside_by: frozenset[int]
    """The edits that this comes from."""


@dataclass(frozen=True, slots=True)
class Relocation:
    """How an edit without an exact fold is to be relocated.

    Attributes:
        place: α where a part of the edit is left behind it.
        free: α where nothing is.
        fresh: unit vectors, [m, d], along which the stream is zero everywhere.
        least: ε, at which a writer keeps something beside what its norm is to see.
        constants: whether a constant that no bias takes is read from the embedding.
        gate: what gated layers compute edits with; None where they cannot.
        size: δ, what the embedding sets one more dimension to where gated layers read it.
    """

    place: float
    free: float
    fresh: Float[Tensor, "m d"] | None = None
    least: float = 1.0
    constants: bool = False
    gate: Gate | None = None
    size: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Relocated:
    """One hook that was relocated."""

    hook: Hook
    carried: Carried
    cleared: bool
    """Whether what it leaves is left out by all readers behind it."""
    fresh: int
    """How many fresh dimensions it takes."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant that enters the stream at a point and is in no bias."""

    edits: frozenset[int]
    site: Site
    size: float
    """Its length."""


@dataclass(slots=True)
class StreamFold:
    """The folded stream: one ``Fold`` a point, and what could not be folded."""

    folds: list[Fold] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    nulling: dict[int, AffineMap] = field(default_factory=dict)
    """For a point behind a post-norm, the projector that the write is to be cleared of."""
    nulled: set[int] = field(default_factory=set)
    """Edits that are nulled where they cannot be exact."""
    relocated: list[Relocated] = field(default_factory=list)
    """Hooks that are relocated where they cannot be exact."""
    aside: list[Hook] = field(default_factory=list)
    """Hooks that readers behind them apply, since writers cannot."""
    constants: list[Constant] = field(default_factory=list)
    """What is read from a dimension of the embedding."""
    computed: dict[int, Computed] = field(default_factory=dict)
    """What a gated layer adds to a point."""
    size: float = 0.0
    """What the embedding sets that dimension to, zero where nothing reads it."""
    least: float = 1.0
    """ε of the writers before norms."""
    taken: int = 0
    """How many fresh dimensions are in use."""

    def is_relocated(self) -> bool:
        """Whether the norms see another length than that of the hooked stream."""
        return bool(self.relocated or self.aside or self.constants or self.computed)

    @property
    def neurons(self) -> int:
        """How many neurons gated layers need besides their own."""
        return max((one.count for one in self.computed.values()), default=0)

    def relocated_edits(self) -> frozenset[int]:
        """Return the edits that make it so."""
        hooks = (*(one.hook for one in self.relocated), *self.aside)
        constants = (edits for one in self.constants for edits in one.edits)
        computed = (edits for one in self.computed.values() for edits in one.edits)
        return frozenset({*(hook.edit for hook in hooks), *constants, *computed})
