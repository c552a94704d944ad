"""Neurons that undo a norm: a gated layer that computes a linear map of the stream itself.

A layer behind an RMSNorm sees x / ρ(x), so that no weight of it computes x. But where the embedding
sets one dimension to δ for every token, the layer sees δ / ρ(x) as well, and a gated neuron
multiplies: up (r·x / ρ) times φ(−s / ρ) of the gate. With ψ(t) = −t φ(−t) and all s = 2^{k/n},

    Σ_k s_k (r·x / ρ) · −φ(−s_k / ρ) = r·x Σ_k ψ(s_k / ρ) ≈ M r·x,

since ψ is a smooth bump in log t, and a sum of such bumps at equal distances is flat: for SiLU,
ψ(t) = t² / (1 + eᵗ), with M = n π² / (12 ln 2) and a ripple of 1.4e-10 of it at n = 2, by Poisson's
formula. The scales end somewhere: below the last one ψ is t² / 2 nearly, whose geometric series
the last neuron takes upon itself.

So an edit behind a block is computed by some neurons of the block, for every token, whatever its
norm: only the range of ρ is a choice.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bake.edits import WeightUpdate
from bake.families import Branch, Layout, Linear
from bake.sites import SiteKind

TOP = 2.0**14
"""The largest scale: 16 times the largest root mean square that is meant."""
OCTAVES = 32
"""Down from there; the last scale is a thirtieth of the least root mean square that is meant."""
MEANT = 2.0**-10, 2.0**10
"""Between which roots of the mean square the edit is what it is meant to be."""
ERROR = 1e-7
"""How far off it is there at most, of itself."""
COLUMN = 2.0**4
"""What a writer multiplies by. Above it float16, as values and as the scales of GGUF's types,
rounds to zero what the neurons of small streams read; below it the largest does not fit."""
SIGHT = 2.0**6
"""What the norm multiplies the dimension of the embedding by, so that float16 has room."""
_GATED = {SiteKind.MLP_GATE, SiteKind.MLP_UP}
MOST = 8
"""The rank of the edit up to which neurons are added; each rank takes 64 of them or more."""


@dataclass(frozen=True, slots=True)
class Gate:
    """The activation of a gated layer."""

    act: Callable[[Tensor], Tensor]
    density: int
    """Neurons an octave, for a ripple below 1e-9."""

    @property
    def count(self) -> int:
        """How many neurons one functional of the stream takes."""
        return OCTAVES * self.density

    @property
    def scales(self) -> Float[Tensor, " n"]:
        """The scales s of the gates, falling."""
        return TOP * 2.0 ** (-torch.arange(self.count, dtype=torch.float64) / self.density)

    @property
    def shares(self) -> Float[Tensor, " n"]:
        """What each neuron is multiplied by, s / M, for a sum of one."""
        # M by itself, over one octave of sums whose ends are too far away to be seen.
        steps = torch.arange(-40 * self.density, 40 * self.density, dtype=torch.float64)
        within = torch.linspace(0, 1, 64, dtype=torch.float64).unsqueeze(1)
        t = 2.0 ** (steps / self.density + within)
        whole = float((-t * self.act(-t)).sum(1)[:-1].mean())
        shares = self.scales / whole
        shares[-1] /= 1 - 4.0 ** (-1 / self.density)
        return shares


def _tanh_gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


GATES: Mapping[str, Gate] = {
    "silu": Gate(torch.nn.functional.silu, 2),
    "gelu_pytorch_tanh": Gate(_tanh_gelu, 4),
}
"""By the name that transformers gives an activation."""


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """What a gated layer adds to the stream: left · rows z, z being the stream before its norm."""

    left: Float[Tensor, "d m"]
    rows: Float[Tensor, "m d"]
    one: Float[Tensor, " d"]
    """A functional of z that is 1 for every token."""
    gate: Gate
    edits: frozenset[int]

    @property
    def count(self) -> int:
        """How many neurons it takes."""
        return len(self.rows) * self.gate.count

    def read(
        self, kind: SiteKind, outputs: int, gain: Float[Tensor, " d"], last: int
    ) -> WeightUpdate:
        """Return what is added to a reader, of which the last outputs of a part are the neurons'.

        Args:
            kind: whether the part is that of the gate, ``mlp_gate``, or ``mlp_up``.
            outputs: how many outputs the reader has.
            gain: what the norm before it multiplies by.
            last: where the part ends.
        """
        rows, values = self.one.unsqueeze(0), -self.gate.scales.repeat(len(self.rows)).unsqueeze(1)
        if kind is SiteKind.MLP_UP:
            rows = self.rows
            values = torch.kron(torch.eye(len(rows)), self.gate.shares.unsqueeze(1) / COLUMN)
        left = values.new_zeros(outputs, values.shape[1])
        left[last - self.count : last] = values
        return WeightUpdate(left, rows / gain)

    def write(self, gain: float, inputs: int) -> WeightUpdate:
        """Return what is added to the writer, of which the last inputs are the neurons'.

        Args:
            gain: what the branch is multiplied by.
            inputs: how many inputs the writer has.
        """
        right = self.rows.new_zeros(len(self.rows), inputs)
        for index in range(len(self.rows)):
            start = inputs - self.count + index * self.gate.count
            right[index, start : start + self.gate.count] = 1
        return WeightUpdate(-COLUMN / gain * self.left, right)  # φ(−t) is negative


def gated_outputs(layout: Layout, linear: Linear) -> list[tuple[SiteKind, int]]:
    """Return the parts of a reader that neurons are added to: what each is, and where it ends.

    A layer that is neither gate nor up, a router say, has none.
    """
    widen, outputs = layout.family.widen, linear.outputs
    if widen is not None and widen.experts is not None:
        experts = {widen.experts.gate: SiteKind.MLP_GATE, widen.experts.up: SiteKind.MLP_UP}
        if linear.module in experts:
            return [(experts[linear.module], outputs)]
    return [(p.site.kind, p.rows[-1] + 1) for p in linear.parts if p.site.kind in _GATED]


def computing(layout: Layout, point: int) -> Branch | None:
    """Return the branch with a gated layer that can compute an edit of a stream point.

    Of experts all compute it, and their weights sum to 1 (``gate_of``).
    """
    for branch in layout.branches:
        norm = branch.norm_in
        shared = sum(other.norm_in == norm for other in layout.branches) > 1
        kinds = {kind for linear in branch.reads for kind, _ in gated_outputs(layout, linear)}
        plain = branch.norm_out is None and norm is not None and norm.kind == "rms" and not shared
        own = branch.target == point and branch.source == point - 1
        one = len({linear.module for linear in branch.writes}) == 1
        if own and one and plain and kinds == _GATED:
            return branch
    return None


def gate_of(layout: Layout, act: object, eps: float) -> Gate | None:
    """Return the gate of a model's layers by the name of its activation, None where there is none.

    float16 has too small a range for what the gates see of small streams. And the epsilon, where
    there is one, makes room for what the embedding sets at every norm alike, which norms behind
    writers do not see.
    """
    behind = any(branch.norm_out is not None for branch in layout.branches)
    fits = eps > 0 and not behind and layout.dtype != "F16"
    return GATES.get(str(act)) if fits else None


def size_set(hidden: int, eps: float) -> float:
    """Return δ, a power of two whose energy the epsilon of the norms can do without."""
    return 2.0 ** math.floor(math.log2(math.sqrt(hidden * eps / 2)))
