"""Everything that a verification runs: base, hooked, planned and stored model, and the controls."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bake.checkpoints import Checkpoint
from bake.checkpoints.planned import PlannedTensor, base_rows
from bake.families import Layout
from bake.sites import Site
from bake.verify import controls
from bake.verify.controls import Control, Spoiling
from bake.verify.fixed_point import stream_sites
from bake.verify.greedy import Generated
from bake.verify.inputs import GREEDY
from bake.verify.loss import Divergence, divergence, split
from bake.verify.metrics import Compared, compare_logits, largest_difference, mean_kl
from bake.verify.moved import DRAWS, moved
from bake.verify.observe import block_sites
from bake.verify.runner import Runner
from bake.verify.runs import Trace, batches_of
from bake.verify.stored.files import untied
from bake.verify.transcript import Transcript

FEW = 2
"""Prompts that broken plans are run on."""


@dataclass(frozen=True, slots=True, eq=False)
class ControlRun:
    """One broken plan, in float64. Its logits are not kept: there may be many of them."""

    kind: str
    tensor: str
    difference: float
    """max |Δlogit| from what the plan is held against."""
    kl: float | None
    """Mean over tokens of KL(hooked ‖ broken) in nats, where the plan is judged by that."""
    share: float | None
    """The same over that of the base on the same tokens."""
    streams: Mapping[Site, Tensor]
    """At the sites that were asked for."""
    seconds: float
    """Spent in the model's own forward passes."""


@dataclass(slots=True, eq=False)
class Evidence:
    """All runs of one verification."""

    transcript: Transcript
    base: Trace
    """The base model in float64."""
    hooked: Trace
    """The reference in float64: the base under hooks, or with an adapter at work."""
    planned: Trace
    """What the plan makes of the base, in float64: nothing of it is rounded."""
    meant: Trace
    """What the plan is held against: the hooked model; where stand-ins were fitted, these as
    hooks."""
    narrow: Trace
    """The reference in float32, whose distance from float64 shows what the model amplifies."""
    texts: dict[str, Generated]
    """Greedy text in float32 of ``base``, ``hooked`` (the reference) and ``baked`` (the files)."""
    stored: Trace | None = None
    """The artifact's own weights, in float32 or what is wider; None where it is no checkpoint."""
    missed: float = math.inf
    """max |Δlogit| of ``planned`` from ``meant``."""
    compared: dict[str, Compared] = field(default_factory=dict)
    """``base``, ``planned`` and ``stored`` beside the hooked model."""
    controls: list[ControlRun] = field(default_factory=list)
    draws: list[Divergence] = field(default_factory=list)
    """The hooked base with its own weights moved by rounding, each a draw of its own."""

    def divergence(self, name: str) -> Divergence:
        """Return how far one of ``compared`` lies from the hooked model."""
        return split(torch.tensor(self.compared[name].kl), self.transcript.speaking)

    @property
    def seconds(self) -> float:
        """Time spent in the models' own forward passes."""
        runs: list[Trace | ControlRun | Generated | None] = [
            *dict.fromkeys((self.base, self.hooked, self.planned, self.meant, self.narrow)),
            self.stored,
            *self.controls,
            *self.texts.values(),
        ]
        return sum(run.seconds for run in runs if run is not None)


def collect(runner: Runner) -> Evidence:
    """Run everything, one model in memory at a time."""
    inputs, double = runner.inputs, torch.float64
    texts = _answers(runner)
    sites, held = block_sites(inputs.layout), stream_sites(inputs.nulled)
    everything = tuple(dict.fromkeys((*sites, *held)))
    narrow = runner.reference(torch.float32)
    drawn = [moved(runner, number) for number in range(DRAWS)] if inputs.files.rounds else []
    base = runner.trace("base model", "base", double, sites=sites, writes=True)
    hooked = runner.reference(double, sites=sites)
    meant = hooked
    if inputs.artifact.fitted is not None:
        name = "base and stand-ins as hooks"
        meant = runner.trace(name, "base", double, inputs.artifact.fitted)
    planned = runner.trace("planned model", "planned", double, sites=everything, writes=True)
    evidence = Evidence(runner.transcript, base, hooked, planned, meant, narrow, texts)
    evidence.missed = largest_difference(planned.logits, meant.logits)
    unmoved, speaking = base if inputs.artifact.merged else hooked, runner.transcript.speaking
    evidence.draws = [divergence(unmoved.logits, trace.logits, speaking) for trace in drawn]
    evidence.controls = controls_of(runner, held, evidence)
    others = {"base": base, "planned": planned}
    if inputs.baked is not None:
        dtype = double if inputs.storage == double else torch.float32
        others["stored"] = evidence.stored = runner.trace(
            "stored model", "stored", dtype, sites=sites
        )
        if inputs.generate:
            prompts, count = runner.transcript.prompts, inputs.generate
            texts["baked"] = runner.greedy("stored model", "stored", prompts, count)
    last = sites[-1]
    for name, trace in others.items():
        hidden = hooked.streams[last], trace.streams[last]
        evidence.compared[name] = compare_logits(hooked.logits, trace.logits, hidden=hidden)
    runner.release()
    return evidence


def _answers(runner: Runner) -> dict[str, Generated]:
    """Let the reference answer every prompt, and make the answers part of what is run."""
    inputs = runner.inputs
    prompts, count = inputs.prompts.tokens, inputs.generate
    # What runtimes write is compared even where nobody asks for answers.
    wanted = count or (GREEDY if inputs.asked.runtimes is not None else 0)
    if not wanted:
        return {}
    hooked = runner.reference_text(prompts, wanted)
    runner.transcript = Transcript(prompts, tuple(tokens[:count] for tokens in hooked.tokens))
    texts = {"hooked": hooked}
    if count:
        texts["base"] = runner.greedy("base model", "base", prompts, count)
    return texts


def controls_of(runner: Runner, sites: Sequence[Site], evidence: Evidence) -> list[ControlRun]:
    """Return broken plans whose change the prompts reach, one of each kind.

    Where stand-ins were fitted, every one of them is forgotten once: each says what it is worth.
    A relocated plan is judged by what it loses of the effect, beside which one tensor of one block
    may be little: all readers, or all writers, are broken at once.
    The others are run on the first few prompts, which are enough to tell them.

    Args:
        runner: what runs them.
        sites: stream sites to record.
        evidence: the sound runs.
    """
    inputs = runner.inputs
    planned, base = inputs.planned.model.tensors, inputs.base
    tied, fitted = untied(inputs.layout, planned), inputs.artifact.fitted is not None
    relocated = inputs.artifact.exactness == "relocated"
    rows = partial(base_rows, base, planned)
    spoiling = Spoiling(planned, rows, _planned_rows(planned, base), tied)
    batches = runner.batches if fitted else batches_of(runner.transcript.tokens[:FEW])
    count = sum(sum(batch.lengths) for batch in batches)
    sound, meant = evidence.planned.logits[:count], evidence.meant.logits[:count]
    hooked = evidence.hooked.logits[:count]
    effect = mean_kl(hooked, evidence.base.logits[:count]) if relocated else 0.0

    roles = _roles(inputs.layout) if relocated else {}

    def broken(group: Sequence[Control], control: Control) -> ControlRun | None:
        name, tensor = f"control: {control.kind}, {control.tensor}", control.tensor
        role = roles.get(tensor)
        spoiled = [x for x in group if x == control or (role and roles.get(x.tensor) == role)]
        tensors = {one.tensor: controls.values(spoiling, one) for one in spoiled}
        trace = runner.trace(
            name, "planned", torch.float64, batches=batches, sites=sites, tensors=tensors
        )
        # An expert that no token is sent to cannot be seen to be wrong: take the next.
        if torch.equal(trace.logits, sound):
            return None
        kl = mean_kl(hooked, trace.logits) if fitted or relocated else None
        return ControlRun(
            control.kind,
            tensor if len(spoiled) == 1 else f"{tensor} and {len(spoiled) - 1} other {role}",
            largest_difference(trace.logits, meant),
            kl,
            kl / effect if kl is not None and effect else None,
            trace.streams,
            trace.seconds,
        )

    digest = inputs.planned.model.digest
    groups = controls.groups_of(planned, lambda name: name in base.tensors, tied, digest)
    found = []
    for group in groups:
        if group[0].kind == controls.BLOCK:
            continue  # a mistake of files
        every = fitted and not inputs.streamed
        each = len(group) if every and group[0].kind in (controls.TENSOR, controls.BIAS) else 1
        runs = controls.sample([group], each, partial(broken, group))
        found += [run for _, run in runs]
    return found


def _roles(layout: Layout) -> dict[str, str]:
    """Return which tensors read the stream and which write it."""
    reads = {x.weight: "readers" for branch in layout.branches for x in branch.reads}
    return reads | {x.weight: "writers" for branch in layout.branches for x in branch.writes}


def _planned_rows(
    planned: Mapping[str, PlannedTensor], base: Checkpoint
) -> Callable[[str, int, int], Tensor]:
    def read(name: str, start: int, stop: int) -> Tensor:
        if name not in planned:
            return base.read_rows(name, start, stop).to(torch.float64)
        value = planned[name].value()
        return value.reshape(value.shape[0], -1)[start:stop]

    return read
