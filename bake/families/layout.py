"""``Layout``: a family resolved against one model, with every tensor claimed exactly once.

The layout is what ``plan`` and ``steer`` both read: the plan its tensor names and slots, the
reference the paths of live modules.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from bake.errors import UsageError
from bake.families.runtime import Runtime
from bake.families.table import Family
from bake.sites import HEAD_KINDS, INNER_KINDS, Site, SiteKind

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BiasSlot:
    """Where the bias of a linear layer lives, or would live."""

    name: str
    size: int
    state: Literal["present", "closed", "never"]
    """``present`` in the checkpoint, ``closed`` behind a config flag, or ``never`` possible."""
    flag: str | None
    experts: int | None = None
    """How many experts' biases of this size the tensor has; None where it is one bias."""


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of a linear layer's output that one site stands for."""

    site: Site
    rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer of the model."""

    module: str
    """The table's name for it, the key of ``Runtime.biases``."""
    weight: str
    shape: Shape
    """[experts, …] where one tensor has the layers of all experts."""
    output_axis: int
    """The axis that its output is on, of the last two: 0 of [out, in], 1 of Conv1D's [in, out]."""
    bias: BiasSlot
    parts: tuple[Part, ...]
    """Outputs at sites, for a reader; empty for a writer, a router or an expert."""
    input_site: Site | None
    live: str | None
    """Path of the module in a loaded model; None where it is no module of its own."""

    @property
    def outputs(self) -> int:
        """How many values it computes, of one expert where it has all of them."""
        return self.shape[-2:][self.output_axis]

    @property
    def inputs(self) -> int:
        """How many values it reads, of one expert where it has all of them."""
        return self.shape[-2:][1 - self.output_axis]

    @property
    def experts(self) -> int | None:
        """How many experts' layers the tensor has; None where it is one layer."""
        return self.shape[0] if len(self.shape) == 3 else None

    def is_expert(self) -> bool:
        """Whether it is an expert's layer, or has those of all experts."""
        return self.experts is not None or "{expert}" in self.module

    def is_one_site(self) -> bool:
        """Whether its output is one site and nothing else."""
        return [len(part.rows) for part in self.parts] == [self.outputs]


@dataclass(frozen=True, slots=True)
class Norm:
    """One normalisation layer; its gain is ``gain_offset`` + the tensor ``weight``."""

    weight: str | None
    """None where the gain is 1 for good."""
    bias: str | None
    kind: Literal["rms", "layer"]
    gain_offset: float
    live: str
    site: Site
    """Its output."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch of one block, between two points of the residual stream."""

    name: Literal["attn", "mlp", "extra"]
    layer: int
    source: int
    """Index of the stream point that it reads."""
    target: int
    """Index of the stream point that it writes to."""
    live: str
    """The module whose output is the branch's; of several that add up to it the last to run."""
    beside: tuple[str, ...]
    """The others, in the order in which they run."""
    norm_in: Norm | None
    norm_out: Norm | None
    gain: float
    reads: tuple[Linear, ...]
    writes: tuple[Linear, ...]
    output_site: Site
    dims: Mapping[str, int]
    """The sizes of its sites, which differ between the kinds of block of one model."""
    sums_to_one: bool
    """Whether the weights of a token's experts sum to 1."""

    @property
    def writer(self) -> Linear | None:
        """Its one writer; None where several layers, or experts, write together."""
        alone = len(self.writes) == 1 and not self.writes[0].is_expert()
        return self.writes[0] if alone else None

    @property
    def has_slot(self) -> bool:
        """Whether biases can hold a constant at its output, before any post-norm."""
        weighed = self.sums_to_one and all(linear.is_expert() for linear in self.writes)
        slots = all(linear.bias.state != "never" for linear in self.writes)
        return slots and (weighed or self.writer is not None)

    @property
    def terms(self) -> tuple[str, ...]:
        """The live modules whose outputs add up to what it writes, in the order of the forward."""
        return (*self.beside, self.live) if self.norm_out is None else (self.norm_out.live,)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms that it has: before its readers, behind its writers."""
        return tuple(norm for norm in (self.norm_in, self.norm_out) if norm is not None)

    def mapped(
        self, reader: Callable[[Linear], Linear], writer: Callable[[Linear], Linear]
    ) -> "Branch":
        """Return the same branch with other layers."""
        reads, writes = map(reader, self.reads), map(writer, self.writes)
        return replace(self, reads=tuple(reads), writes=tuple(writes))


_BRANCH = dict.fromkeys(HEAD_KINDS, "attn") | dict.fromkeys(INNER_KINDS, "mlp")
"""The branch that a site is in, where its width is not that of the stream."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A family resolved against one model."""

    family: Family
    dims: Mapping[str, int]
    flags: Mapping[str, bool]
    dtype: str
    points: tuple[tuple[Site, ...], ...]
    """The stream points in forward order, each with every site that names it."""
    embed: str
    embed_multiplier: float
    positions: tuple[str, ...]
    branches: tuple[Branch, ...]
    final_norm: Norm
    unembed: Linear
    tied: bool
    block_live: str
    embed_live: str
    untouched: tuple[str, ...]
    shapes: Mapping[str, Shape]
    sites: tuple[Site, ...]
    """Every site of the model (heads left out), in forward order."""
    assumed: tuple[str, ...]
    """Keys of config.json that the table does not know and the user took to change nothing."""
    coded: str | None = None
    """The number format of weights that are stored as codes; None where all are floating point."""
    _dims: dict[Site, Mapping[str, int] | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Of every site those of its branch, where its width is not that of the stream."""

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.dims["layers"]

    @property
    def live_blocks(self) -> tuple[str, ...]:
        """The paths of the live modules of the blocks, in their order."""
        return tuple(self.block_live.replace("{layer}", str(n)) for n in range(self.layers))

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of all branches, what each reads before what it writes."""
        return tuple(x for branch in self.branches for x in (*branch.reads, *branch.writes))

    @property
    def head_is_stored(self) -> bool:
        """Whether the head is a tensor of the checkpoint; of a tied one, the embedding's copy."""
        return self.unembed.weight in self.shapes

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.dims["hidden"]

    @property
    def stream(self) -> tuple[Site, ...]:
        """The sites that ``at = "resid"`` stands for: ``resid_pre.0``, then after every write."""
        return tuple(point[0] for point in self.points)

    def width(self, site: Site) -> int:
        """Return the width of the activations at a site.

        Raises:
            UsageError: the model has no such site.
        """
        if not self._dims:  # once: a plan asks this thousands of times
            own: dict[tuple[int | None, str], Mapping[str, int]]
            own = {(b.layer, b.name): b.dims for b in self.branches}
            self._dims.update({s: own.get((s.layer, _BRANCH.get(s.kind, ""))) for s in self.sites})
        place = Site(site.kind, site.layer)
        if place not in self._dims:
            kinds = sorted({s.kind for s in self.sites}, key=list(SiteKind).index)
            raise UsageError(
                f"{self.family.name} has no site {site}",
                why=f"its {self.layers} blocks have {', '.join(kinds)}",
                fix="name one of these, or run `bake families MODEL`",
            )
        dims = self._dims[place]
        if dims is None:
            return self.hidden
        if site.kind in INNER_KINDS:
            return dims["inner"]
        heads = dims["kv_heads" if site.kind in (SiteKind.K, SiteKind.V) else "heads"]
        if site.head is None:
            return heads * dims["head_dim"]
        if site.head >= heads:
            raise UsageError(f"{site} names head {site.head}, but there are {heads}")
        return dims["head_dim"]


def runtime_of(layout: Layout, name: str) -> Runtime | None:
    """Return what the table says of a runtime, or None where it says nothing."""
    return layout.family.runtimes.get(name)
