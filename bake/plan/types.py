"""``Plan``: what changes in which tensor, whether that is exact, and why. A value."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap
from bake.artifact.schema import RuntimeVerdict
from bake.edits import Edit, WeightUpdate
from bake.families import TIED, Layout
from bake.sites import Site, summary


class Exactness(StrEnum):
    """How the baked model relates to the hooked one."""

    EXACT = "exact"
    """The same function in real arithmetic."""
    RELOCATED = "relocated"
    """The same function but for the scale of norms, and for what of the edit the plan says is left:
    what share of the effect is lost is measured."""
    NULLING = "nulling"
    """The direction is gone from the stream, but the function differs from the hooked one."""
    APPROXIMATE = "approximate"
    """Fitted, with a measured error."""
    IMPOSSIBLE = "impossible"
    """No stock weights compute it: refused."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What the plan says of one edit at some sites."""

    edit: int
    """Index of the edit in the plan."""
    kind: str
    concept: str
    sites: tuple[Site, ...]
    exactness: Exactness
    reason: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PartMap:
    """A map on some rows of a linear layer's output; None stands for all of them."""

    rows: Sequence[int] | None
    map: AffineMap


@dataclass(frozen=True, slots=True, eq=False)
class TensorUpdate:
    """A new weight: W' = O (W + update) I + added, along its output and input axes.

    For an embedding the output axis is 1: every row is one output, and a map's constant is part of
    the weight. For a norm's gain or bias ``replacement`` is the new value, and the maps are empty.
    """

    name: str
    source: str
    """The base tensor that it is made from; another name when a tied head gets its own tensor."""
    shape: tuple[int, ...]
    """[experts, …] where the tensor has the layers of all experts, each of which is folded."""
    output_axis: int
    """Of the last two axes."""
    outputs: tuple[PartMap, ...] = ()
    updates: tuple[WeightUpdate, ...] = ()
    input: AffineMap | None = None
    is_table: bool = False
    """Whether rows are looked up (an embedding), so that constants go into them."""
    replacement: Float[Tensor, " d"] | None = None
    edits: tuple[int, ...] = ()
    """Indices of the plan's edits that the new value holds, in order."""
    placed: Sequence[int] | None = None
    """Where the base's outputs are in a wider tensor, in rising order; None for the first ones."""
    added: WeightUpdate | None = None
    """Added last, behind the maps: of a wider layer, what it computes besides."""

    @property
    def create(self) -> bool:
        """Whether the checkpoint has no tensor of this name yet."""
        return self.name != self.source

    def is_copy(self) -> bool:
        """Whether the embedding is written once more, as a head of its own, and no edit."""
        maps = self.outputs or self.updates or self.input is not None or self.added is not None
        return self.create and not maps


@dataclass(frozen=True, slots=True, eq=False)
class BiasUpdate:
    """A new bias: b' = O (b + (W + update) shift) + addend, with b zero where it is created."""

    name: str
    size: int
    create: bool
    weight: str | None = None
    """The base weight that ``shift`` goes through."""
    output_axis: int = 0
    shift: Float[Tensor, " n"] | None = None
    updates: tuple[WeightUpdate, ...] = ()
    outputs: tuple[PartMap, ...] = ()
    addend: Float[Tensor, " m"] | None = None
    edits: tuple[int, ...] = ()
    """Indices of the plan's edits that change it; of a created bias, those with its constant."""
    placed: Sequence[int] | None = None
    """As of a tensor."""
    experts: int | None = None
    """How many experts' biases of this size the tensor has, which all change so."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return (self.size,) if self.experts is None else (self.experts, self.size)

    def is_zero(self) -> bool:
        """Whether the bias is created and stays zero: a companion that a config flag demands."""
        return (
            self.create
            and self.shift is None
            and self.addend is None
            and all(part.map.is_linear() for part in self.outputs)
        )


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """One key of config.json; ``new`` None removes it."""

    key: str
    old: Any
    new: Any


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Plan:
    """Everything that an output needs to know."""

    layout: Layout
    edits: tuple[Edit, ...]
    tensors: tuple[TensorUpdate, ...]
    biases: tuple[BiasUpdate, ...]
    config: tuple[ConfigChange, ...]
    findings: tuple[Finding, ...]
    runtimes: tuple[RuntimeVerdict, ...]
    """What every runtime makes of the checkpoint."""
    notes: tuple[str, ...]
    """What the plan does beyond the edits themselves: untied head, opened bias slots, a recast."""
    created_bytes: int
    """Size of what the base checkpoint does not have: new tensors, and what others grow by."""
    asked: tuple[Edit, ...] | None = None
    """What the hooks apply, where ``edits`` holds fitted stand-ins for some of it."""

    def __repr__(self) -> str:
        edits = "; ".join(f"{e.kind} {e.concept} at {summary(e.sites)}" for e in self.edits)
        return f"Plan({self.exactness}: {edits}; {len(self.tensors) + len(self.biases)} tensors)"

    @property
    def reference(self) -> tuple[Edit, ...]:
        """The edits that the result is verified against."""
        return self.edits if self.asked is None else self.asked

    @property
    def unties(self) -> bool:
        """Whether a head that was tied to the embedding becomes a tensor of its own."""
        keys = {change.key for change in self.config if change.new is False}
        return self.layout.tied and TIED in keys

    @property
    def widened(self) -> bool:
        """Whether the stream gets dimensions that the base does not have."""
        return any(change.key == self.layout.family.dims.hidden for change in self.config)

    @property
    def computes(self) -> bool:
        """Whether neurons that the base does not have compute an edit."""
        return any(update.added is not None for update in self.tensors)

    @property
    def exactness(self) -> Exactness:
        """The worst exactness among the findings; EXACT when there is none."""
        found = {finding.exactness for finding in self.findings}
        return max(found, key=list(Exactness).index, default=Exactness.EXACT)

    @property
    def digest(self) -> str:
        """A SHA-256 over every update and change, as ``sha256:…``."""
        content = {
            "tensors": [_plain(update) for update in self.tensors],
            "biases": [_plain(update) for update in self.biases],
            "config": [_plain(change) for change in self.config],
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Return a JSON value that stands for a part of a plan; tensors by their digest."""
    if isinstance(value, Tensor):
        data = value.detach().contiguous().numpy().tobytes()
        return {"shape": list(value.shape), "sha256": hashlib.sha256(data).hexdigest()}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if hasattr(value, "__dataclass_fields__"):
        # Which edit a change comes from is no part of it: what artifacts recorded has to stay true.
        names = [name for name in value.__dataclass_fields__ if name != "edits"]
        fields = {name: _plain(getattr(value, name)) for name in names}
        for word in ("placed", "added", "experts"):  # which plans of earlier versions do not have
            if fields.get(word, 0) is None:
                del fields[word]
        return {"type": type(value).__name__, **fields}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
