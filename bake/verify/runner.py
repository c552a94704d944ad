"""``Runner``: runs the models of a verification, one in memory at a time, and keeps what it ran."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from bake import __version__
from bake.artifact.record import RECORD
from bake.edits import Edit
from bake.sites import Site
from bake.verify.adapter import peft_version, with_adapter
from bake.verify.greedy import Generated, as_answered, generate
from bake.verify.inputs import Inputs
from bake.verify.models import Live, Values, load, load_planned
from bake.verify.runs import Batch, Trace, batches_of, dtype_name, run, trace_of
from bake.verify.store import Store, question
from bake.verify.tolerance import logit_tolerance
from bake.verify.transcript import Transcript, unanswered
from bake.verify.units import blocks_of
from bake.verify.verification import Remark

Source = Literal["base", "adapted", "planned", "stored"]
"""The base, the base with the adapter of a merge at work, what the plan makes of it before anything
is rounded, or the artifact's own weights."""

STEP = 10
"""Blocks between two remarks on how far a streamed pass is."""


class Runner:
    """Runs base, reference and artifact of one verification.

    The reference is the base under hooks; for a merge it is the base with PEFT's adapter at work.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.transcript: Transcript = unanswered(inputs.prompts.tokens)
        """What the models are run on; the answers come with the first run of the reference."""
        self.store = Store(inputs.asked.resume, _question(inputs))
        self.seconds = 0.0
        """Spent in the models' own forward passes, by earlier attempts too."""
        self._live: tuple[Source, torch.dtype, Live] | None = None

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The transcript as it is run."""
        return batches_of(self.transcript.tokens)

    def model(self, source: Source, dtype: torch.dtype) -> Live:
        """Return one of the models; the one before it is let go first."""
        live = self._held(source, dtype)
        live.restore()
        return live

    def _held(self, source: Source, dtype: torch.dtype) -> Live:
        """Return one of the models, in which other values may be left of the run before."""
        if self._live is not None and self._live[:2] == (source, dtype):
            return self._live[2]
        self._live = None
        inputs = self.inputs
        if source == "planned":
            assert dtype == torch.float64, "a plan is not rounded"
            live = load_planned(
                inputs.base,
                inputs.planned.model,
                family=inputs.family,
                hooked=inputs.layout is not None,
                streamed=inputs.streamed,
                device=inputs.place,
            )
        else:
            live = self._loaded(source, dtype)
        if inputs.streamed:
            _count_blocks(live, inputs.asked.remark)
        self._live = (source, dtype, live)
        return live

    def _loaded(self, source: Source, dtype: torch.dtype) -> Live:
        """Return a model whose weights are in files, as any user loads it."""
        inputs = self.inputs
        checkpoint = inputs.baked if source == "stored" else inputs.base
        assert checkpoint is not None, "only a checkpoint has weights of its own"
        return load(
            checkpoint,
            dtype,
            family=inputs.family,
            hooked=inputs.layout is not None,
            streamed=inputs.streamed,
            device_map=inputs.device_map(dtype),
            wrap=self._wrap if source == "adapted" else None,
        )

    def _wrap(self, model: Any) -> Any:
        inputs = self.inputs
        assert inputs.adapter is not None
        return with_adapter(model, inputs.adapter, streamed=inputs.streamed)

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
        tensors: Values | None = None,
    ) -> Trace:
        """Return one run: as an earlier attempt left it, or run now.

        Args:
            name: says what is run, for whoever waits and for an attempt that takes it up.
            source: which of the models.
            dtype: of weights and arithmetic.
            edits: hooks to set.
            batches: what it is run on; the whole transcript when None.
            sites: stream sites to record.
            writes: whether to record what every writer adds.
            tensors: values that replace those of the checkpoint, by name.
        """
        label = f"{name} in {dtype_name(dtype)}"
        kept = self.store.load(label)
        if kept is not None:
            self.seconds += kept[1]
            return trace_of(*kept)
        self.inputs.asked.remark(label)
        live = self._held(source, dtype)
        with live.replaced(tensors or {}):
            trace = run(live, batches or self.batches, edits, sites=sites, writes=writes)
        # Of a widened stream, what the base has too.
        trace = trace.narrowed(self.inputs.shape.hidden)
        self.seconds += trace.seconds
        self.store.save(label, trace.tensors(), trace.seconds)
        return trace

    def reference(self, dtype: torch.dtype, *, sites: Sequence[Site] = ()) -> Trace:
        """Return a run of the reference, as ``trace`` returns one."""
        name, source, edits = self._reference
        return self.trace(f"base and {name}", source, dtype, edits, sites=sites)

    def greedy(
        self,
        name: str,
        source: Source,
        prompts: Sequence[Sequence[int]],
        count: int,
        edits: Sequence[Edit] = (),
    ) -> Generated:
        """Return the greedy text after every prompt in float32, as ``trace`` returns a run."""
        label = f"greedy text of the {name}"
        kept = self.store.load(f"{label}, {count} tokens of {len(prompts)}")
        if kept is not None:
            (tensors, seconds) = kept
            self.seconds += seconds
            tokens, margins = (tensors[key].tolist() for key in ("tokens", "margins"))
            return Generated(tuple(map(tuple, tokens)), tuple(map(tuple, margins)), seconds)
        self.inputs.asked.remark(label)
        text = generate(self.model(source, torch.float32), prompts, count, edits)
        self.seconds += text.seconds
        numbers = {"tokens": torch.tensor(text.tokens), "margins": torch.tensor(text.margins)}
        self.store.save(f"{label}, {count} tokens of {len(prompts)}", numbers, text.seconds)
        return text

    def reference_text(self, prompts: Sequence[Sequence[int]], count: int) -> Generated:
        """Return the greedy text of the reference after every prompt."""
        name, source, edits = self._reference
        return self.greedy(name, source, prompts, count, edits)

    def stored_text(self, trace: Trace, whole: int) -> Generated:
        """Return the artifact's greedy text after every prompt.

        Where its own most likely token is that of the answer all along, and clearly so, its text is
        the answer: the run over the transcript has said so, and as well with which token it parts
        from the answer. What that does not say is generated.

        Args:
            trace: the artifact's run over the transcript.
            whole: the texts that are wanted to their end, so many of the first; others may end with
                the token with which they part from the hooked model's.
        """
        transcript, count = self.transcript, self.inputs.generate
        found: Sequence[tuple[int, ...] | None] = [None] * len(transcript.prompts)
        if trace.logits.dtype == torch.float32:  # in which greedy text is
            shape, logits = self.inputs.shape, trace.logits[transcript.speaking]
            tolerance = logit_tolerance(
                torch.float32,
                layers=shape.layers,
                hidden=shape.hidden,
                scale=float(logits.abs().max()),
            )
            found = as_answered(transcript.answers, logits, tolerance)
        known = [
            row if row is not None and (index >= whole or len(row) == count) else None
            for index, row in enumerate(found)
        ]
        missing = [p for p, row in zip(transcript.prompts, known, strict=True) if row is None]
        made = iter(self.greedy("stored model", "stored", missing, count).tokens if missing else ())
        return Generated(tuple(next(made) if row is None else row for row in known))

    @property
    def sources(self) -> dict[str, tuple[Source, tuple[Edit, ...]]]:
        """What base, hooked and baked model are run as: a model, and the hooks on it."""
        _, reference, edits = self._reference
        return {"base": ("base", ()), "hooked": (reference, edits), "baked": ("stored", ())}

    @property
    def _reference(self) -> tuple[str, Source, tuple[Edit, ...]]:
        if self.inputs.adapter is not None:
            return "adapter at work", "adapted", ()
        return "hooked model", "base", self.inputs.artifact.edits


def _count_blocks(live: Live, remark: Remark) -> None:
    """Say how far a pass is: a streamed one reads the whole model."""
    blocks = blocks_of(live.units)
    for number in range(STEP, len(blocks), STEP):
        said = _saying(remark, f"    {number} of {len(blocks)} blocks")
        live.model.get_submodule(blocks[number]).register_forward_pre_hook(said)


def _saying(remark: Remark, text: str) -> Callable[[torch.nn.Module, Any], None]:
    def hook(module: torch.nn.Module, args: Any) -> None:
        remark(text)

    return hook


def _question(inputs: Inputs) -> dict[str, Any]:
    """Return what decides the result of every run."""
    folder, suffix = inputs.artifact.path, inputs.artifact.carrier.suffix
    files = (*sorted(folder.glob(f"*{suffix}")), folder / RECORD)
    return question(
        artifact=inputs.artifact.plan_digest,
        base=inputs.base.digest(),
        baked={file.name: _stamp(file) for file in files},
        prompts=inputs.prompts.digest,
        family=None if inputs.family is None else inputs.family.read_text(encoding="utf-8"),
        streamed=inputs.streamed,
        peft=None if inputs.adapter is None else peft_version(),
        bake=__version__,
    )


def _stamp(path: Path) -> list[int]:
    """Return what changes when a file is written to: its digest would take as long as a run."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
