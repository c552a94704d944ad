"""Everything that a verification runs: two models, some dtypes, the controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bake.sites import Site
from bake.verify.controls import changed, groups_of
from bake.verify.fixed_point import stream_sites
from bake.verify.greedy import Generated
from bake.verify.metrics import largest_difference, mean_kl
from bake.verify.models import layout_of
from bake.verify.observe import block_sites
from bake.verify.runner import Runner
from bake.verify.runs import Trace, halves

CONTROLS = {False: 2, True: 1}
"""Controls of each kind, with the model in memory and streamed."""
EVERY = ("forgotten tensor", "forgotten bias")
"""What is forgotten one by one where stand-ins were fitted: each says what it is worth."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """The runs in one dtype."""

    reference: Trace
    rebatched: Trace | None
    """The reference once more, the same prompts in other batches; None in float64."""
    baked: Trace


@dataclass(frozen=True, slots=True, eq=False)
class ControlRun:
    """One broken bake, evaluated in float64. Its logits are not kept: there are many of them."""

    kind: str
    tensor: str
    difference: float
    """max |Δlogit| from the reference."""
    kl: float
    """Mean over tokens of KL(reference ‖ broken), in nats."""
    streams: Mapping[Site, Tensor]
    """At the sites that were asked for."""
    seconds: float
    """Spent in the model's own forward passes."""


@dataclass(slots=True, eq=False)
class Evidence:
    """All runs of one verification."""

    base: Trace
    """The base model in float64."""
    runs: dict[torch.dtype, Measured] = field(default_factory=dict)
    controls: list[ControlRun] = field(default_factory=list)
    texts: dict[str, Generated] = field(default_factory=dict)
    """Greedy text in the storage dtype: of ``hooked`` (the reference), ``baked`` and, where wanted,
    ``base``."""

    @property
    def exact(self) -> Measured:
        """The runs in float64."""
        return self.runs[torch.float64]

    @property
    def seconds(self) -> float:
        """Time spent in the models' own forward passes."""
        runs: list[Trace | ControlRun | Generated | None] = [
            self.base,
            *self.controls,
            *self.texts.values(),
        ]
        for measured in self.runs.values():
            runs += [measured.reference, measured.rebatched, measured.baked]
        return sum(run.seconds for run in runs if run is not None)


def collect(runner: Runner) -> Evidence:
    """Run everything: float64 with controls, then float32 and the storage dtype."""
    inputs, double = runner.inputs, torch.float64
    sites, held = block_sites(inputs.layout), stream_sites(inputs.nulled)
    everything = tuple(dict.fromkeys((*sites, *held)))
    evidence = Evidence(runner.trace("base model", "base", double, sites=sites, writes=True))
    reference = runner.reference(double, sites=sites)
    baked = runner.trace("baked model", "baked", double, sites=everything, writes=True)
    evidence.runs[double] = Measured(reference, None, baked)
    evidence.controls = controls_of(runner, held, evidence.exact)
    for dtype in inputs.dtypes:
        reference = runner.reference(dtype, sites=sites)
        rebatched = runner.reference(dtype, " in other batches", batches=halves(runner.batches))
        baked = runner.trace("baked model", "baked", dtype, sites=everything)
        evidence.runs[dtype] = Measured(reference, rebatched, baked)
    if inputs.generate:
        evidence.texts = _texts(runner)
    runner.release()
    return evidence


def _texts(runner: Runner) -> dict[str, Generated]:
    """Return the greedy texts; the baked model of this dtype is the one in memory."""
    dtype, count = runner.inputs.serving, runner.inputs.generate
    texts = {"baked": runner.greedy("baked model", "baked", dtype, count)}
    texts["hooked"] = runner.reference_text(dtype, count)
    if runner.inputs.scores:
        texts["base"] = runner.greedy("base model", "base", dtype, count)
    return texts


def controls_of(runner: Runner, sites: Sequence[Site], measured: Measured) -> list[ControlRun]:
    """Return the broken bakes whose change the prompts reach, a few of each kind.

    Args:
        runner: what runs them.
        sites: stream sites to record.
        measured: the sound runs in float64.
    """
    inputs, baked, reference = runner.inputs, runner.baked, measured.reference.logits
    layout = layout_of(baked, inputs.family)
    controls: list[ControlRun] = []
    for group in groups_of(inputs.artifact, inputs.base, baked, layout):
        wanted = CONTROLS[inputs.streamed]
        if inputs.artifact.fitted is not None and not inputs.streamed and group[0].kind in EVERY:
            wanted = len(group)
        for control, tensors in changed(group, inputs.base, baked, layout):
            name = f"control: {control.kind}, {control.tensor}"
            trace = runner.trace(name, "baked", torch.float64, sites=sites, tensors=tensors)
            # An expert that no token is sent to cannot be seen to be wrong: take the next.
            if not torch.equal(trace.logits, measured.baked.logits):
                controls.append(
                    ControlRun(
                        control.kind,
                        control.tensor,
                        largest_difference(trace.logits, reference),
                        mean_kl(reference, trace.logits),
                        trace.streams,
                        trace.seconds,
                    )
                )
                wanted -= 1
            if not wanted:
                break
    return controls
