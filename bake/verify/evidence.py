"""Everything that a verification runs: two models, some dtypes, the controls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bake.checkpoints import Checkpoint
from bake.edits import Edit
from bake.families import Layout
from bake.sites import Site
from bake.verify.artifact import Baked
from bake.verify.controls import changed, groups_of
from bake.verify.fixed_point import nulled, stream_sites
from bake.verify.greedy import Generated, generate
from bake.verify.metrics import largest_difference, mean_kl
from bake.verify.models import Live, layout_of, load
from bake.verify.observe import block_sites
from bake.verify.runs import Batch, Trace, halves, run, trace_of
from bake.verify.store import Store

Progress = Callable[[str], None]
Source = Literal["base", "baked"]

TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CONTROLS = {False: 2, True: 1}
"""Controls of each kind, with the model in memory and streamed."""
EVERY = ("forgotten tensor", "forgotten bias")
"""What is forgotten one by one where stand-ins were fitted: each says what it is worth."""


STEP = 10
"""Blocks between two lines about the progress of a streamed pass."""


def _teller(progress: Progress, text: str) -> Callable[[torch.nn.Module, Any], None]:
    def hook(module: torch.nn.Module, args: Any) -> None:
        progress(text)

    return hook


@dataclass(slots=True, eq=False)
class Subject:
    """What is compared with what, and how."""

    artifact: Baked
    base: Checkpoint
    baked: Checkpoint
    layout: Layout
    """Of the base."""
    prompts: tuple[tuple[int, ...], ...]
    batches: tuple[Batch, ...]
    """The prompts as they are run."""
    generate: int
    """Greedy tokens after each prompt."""
    texts: bool
    """Whether the base model's text is wanted as well."""
    family: Path | None
    streamed: bool
    device_map: str | None
    progress: Progress
    store: Store
    _live: tuple[Source, torch.dtype, Live] | None = None

    @property
    def device(self) -> str:
        """What the models run on, by name."""
        if self.device_map is None or not torch.cuda.is_available():
            return "cpu"
        return ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))

    def model(self, source: Source, dtype: torch.dtype) -> Live:
        """Return one of the two models; the one before it is let go first."""
        if self._live is not None and self._live[:2] == (source, dtype):
            return self._live[2]
        self._live = None
        checkpoint = self.base if source == "base" else self.baked
        live = load(
            checkpoint,
            dtype,
            family=self.family,
            streamed=self.streamed,
            device_map=self.device_map,
        )
        if self.streamed:
            self._count_blocks(live)
        self._live = (source, dtype, live)
        return live

    def _count_blocks(self, live: Live) -> None:
        """Tell whoever waits how far a pass is: a streamed one reads the whole model."""
        layers = live.layout.layers
        for layer in range(STEP, layers, STEP):
            path = live.layout.block_live.replace("{layer}", str(layer))
            text = f"    {layer} of {layers} blocks"
            live.model.get_submodule(path).register_forward_pre_hook(_teller(self.progress, text))

    def release(self) -> None:
        """Let go of the model in memory."""
        self._live = None

    def trace(
        self,
        name: str,
        source: Source,
        dtype: torch.dtype,
        edits: Sequence[Edit] = (),
        *,
        batches: Sequence[Batch] | None = None,
        sites: Sequence[Site] = (),
        writes: bool = False,
        tensors: dict[str, Tensor] | None = None,
    ) -> Trace:
        """Return one run: as an earlier attempt left it, or run now.

        Args:
            name: says what is run, for whoever waits and for an attempt that takes it up.
            source: which of the two models.
            dtype: of weights and arithmetic.
            edits: hooks to set.
            batches: the prompts; those of the subject when None.
            sites: stream sites to record.
            writes: whether to record what every writer adds.
            tensors: values that replace those of the checkpoint, by name.
        """
        label = f"{name} in {str(dtype).removeprefix('torch.')}"
        found = self.store.load(label)
        if found is not None:
            return trace_of(*found)
        self.progress(label)
        live = self.model(source, dtype)
        with live.replaced(tensors or {}):
            trace = run(live, batches or self.batches, edits, sites=sites, writes=writes)
        self.store.save(label, trace.tensors(), trace.seconds)
        return trace

    def greedy(
        self, name: str, source: Source, dtype: torch.dtype, count: int, edits: Sequence[Edit] = ()
    ) -> Generated:
        """Return the greedy text after every prompt, as ``trace`` returns a run."""
        label = f"greedy text of the {name} in {str(dtype).removeprefix('torch.')}"
        found = self.store.load(f"{label}, {count}")
        if found is not None:
            (tensors, seconds) = found
            tokens, margins = (tensors[key].tolist() for key in ("tokens", "margins"))
            return Generated(tuple(map(tuple, tokens)), tuple(map(tuple, margins)), seconds)
        self.progress(label)
        made = generate(self.model(source, dtype), self.prompts, count, edits)
        kept = {"tokens": torch.tensor(made.tokens), "margins": torch.tensor(made.margins)}
        self.store.save(f"{label}, {count}", kept, made.seconds)
        return made


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """The runs in one dtype."""

    hooked: Trace
    again: Trace | None
    """The hooked model once more, the same prompts in other batches."""
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
    """Greedy text in the storage dtype: of ``hooked``, ``baked`` and, where wanted, ``base``."""

    @property
    def exact(self) -> Measured:
        """The runs in float64."""
        return self.runs[torch.float64]

    @property
    def seconds(self) -> float:
        """Time spent in the models' own forward passes."""
        traces = [self.base]
        for measured in self.runs.values():
            traces += [measured.hooked, measured.baked]
            traces += [] if measured.again is None else [measured.again]
        seconds = sum(trace.seconds for trace in traces)
        seconds += sum(control.seconds for control in self.controls)
        return seconds + sum(made.seconds for made in self.texts.values())


def collect(subject: Subject) -> Evidence:
    """Run everything: float64 with controls, then float32 and the storage dtype."""
    edits, double = subject.artifact.edits, torch.float64
    sites = block_sites(subject.layout)
    held = stream_sites(nulled(edits, subject.artifact.record["plan"].get("findings", ())))
    everything = tuple(dict.fromkeys((*sites, *held)))
    evidence = Evidence(subject.trace("base model", "base", double, sites=sites, writes=True))
    hooked = subject.trace("base and hooked model", "base", double, edits, sites=sites)
    baked = subject.trace("baked model", "baked", double, sites=everything, writes=True)
    evidence.runs[double] = Measured(hooked, None, baked)
    evidence.controls = controls_of(subject, held, evidence.exact)
    storage = TORCH[subject.layout.dtype]
    for dtype in dict.fromkeys((torch.float32, storage)):
        if dtype == double:
            continue
        hooked = subject.trace("base and hooked model", "base", dtype, edits, sites=sites)
        again = subject.trace(
            "hooked model in other batches", "base", dtype, edits, batches=halves(subject.batches)
        )
        baked = subject.trace("baked model", "baked", dtype, sites=everything)
        evidence.runs[dtype] = Measured(hooked, again, baked)
    if subject.generate:
        evidence.texts = _texts(subject, torch.float32 if storage == double else storage)
    subject.release()
    return evidence


def _texts(subject: Subject, dtype: torch.dtype) -> dict[str, Generated]:
    """Return the greedy texts; the baked model of this dtype is the one in memory."""
    count, edits = subject.generate, subject.artifact.edits
    found = {"baked": subject.greedy("baked model", "baked", dtype, count)}
    found["hooked"] = subject.greedy("hooked model", "base", dtype, count, edits)
    if subject.texts:
        found["base"] = subject.greedy("base model", "base", dtype, count)
    return found


def controls_of(subject: Subject, sites: Sequence[Site], measured: Measured) -> list[ControlRun]:
    """Return the broken bakes whose change the prompts reach, a few of each kind.

    Args:
        subject: what is compared.
        sites: stream sites to record.
        measured: the sound runs in float64.
    """
    reference = measured.hooked.logits
    layout = layout_of(subject.baked, subject.family)
    found: list[ControlRun] = []
    for group in groups_of(subject.artifact, subject.base, subject.baked, layout):
        wanted = CONTROLS[subject.streamed]
        if subject.artifact.fitted is not None and not subject.streamed and group[0].kind in EVERY:
            wanted = len(group)
        for control, tensors in changed(group, subject.base, subject.baked, layout):
            trace = subject.trace(
                f"control: {control.kind}, {control.tensor}",
                "baked",
                torch.float64,
                sites=sites,
                tensors=tensors,
            )
            # An expert that no token is sent to cannot be seen to be wrong: take the next.
            if not torch.equal(trace.logits, measured.baked.logits):
                found.append(
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
    return found
