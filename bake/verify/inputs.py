"""``Inputs``: everything that a verification reads, opened and found to belong together."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bake.artifact.schema import Gate
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.checkpoints.quantised.view import decoded
from bake.edits import Edit
from bake.errors import InputError, UsageError
from bake.families import Layout, fit
from bake.sites import Site
from bake.verify.adapter import adapter_of
from bake.verify.artifact import Baked, open_baked
from bake.verify.fixed_point import nulled
from bake.verify.memory import fits_gpu, too_large
from bake.verify.observe import block_sites
from bake.verify.planned import Planned
from bake.verify.prompts import PromptSet, default_prompts, given_prompts, read_prompts
from bake.verify.runs import BATCH_TOKENS, DTYPES
from bake.verify.shape import Shape, shape_of, shape_of_class
from bake.verify.stored.files import StoredFiles, untied, untied_by_merge
from bake.verify.stored.registry import stored_files
from bake.verify.verification import CPU, Verification

GREEDY = 16
"""Greedy tokens after each prompt, with the model in memory."""
PROMPTS = 8
"""How many prompts a runtime is asked for, the first ones."""
SAMPLES = 3
"""Prompts whose texts a report shows."""


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """An artifact, its base and what both are run on."""

    asked: Verification
    artifact: Baked
    base: Checkpoint
    shape: Shape
    """Of the base."""
    layout: Layout | None
    """Where the edits are in the base; None for a merge, which has none and needs no table."""
    prompts: PromptSet
    family: Path | None
    """The file of the user's own table."""
    streamed: bool
    """Whether one block is in memory at a time."""
    beside: str | None
    """Where a model in float32 goes by itself; None for the processor. Settled once: torch keeps
    the memory of a model that was there, so that the next one would find less."""
    planned: Planned
    """What the plan comes to."""
    files: StoredFiles
    """What the artifact's files hold of it."""
    baked: Checkpoint | None
    """The artifact's own weights; None where it is no checkpoint."""
    adapter: Path | None
    """The folder of the adapter that was merged; None where edits were baked."""

    @property
    def storage(self) -> torch.dtype:
        """What the base is stored in."""
        return DTYPES[self.shape.dtype]

    @property
    def stored_name(self) -> str:
        """What the edited values are stored in, by name: a dtype, or a type of GGUF files."""
        return self.files.stored_name

    @property
    def tokenizer(self) -> Path:
        """The folder whose tokenizer turns tokens into text."""
        return self.base.path if self.baked is None else self.artifact.path

    @property
    def device(self) -> str:
        """What the models run on, by name."""
        if self.streamed:
            return f"{CPU}, one block in memory at a time"
        if self.beside is not None:
            return f"{CPU}, {torch.cuda.get_device_name()} for float32"
        if self.place is None:
            return CPU
        return ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))

    def device_map(self, dtype: torch.dtype) -> str | None:
        """Return where a model that computes in a dtype goes; None for the processor.

        Float64 is what everything is held against, and slow on most GPUs: it goes where somebody
        says. The rest goes to a GPU that has room for it.
        """
        asked = self.asked.device_map
        return asked if asked is not None or dtype == torch.float64 else self.beside

    @property
    def place(self) -> torch.device | None:
        """Where a model goes that is put together here; None for the processor."""
        accelerated = self.asked.device_map not in (None, CPU) and torch.cuda.is_available()
        return torch.device("cuda") if accelerated else None

    @property
    def most_kl(self) -> float | None:
        """The share of the effect's KL that may be lost, where the user or the recipe says one."""
        return self.artifact.most_kl if self.asked.most_kl is None else self.asked.most_kl

    @property
    def recorded_gate(self) -> Gate | None:
        """What the recipe says that the edit may cost elsewhere."""
        limits = self.artifact.record.verify
        return None if limits is None else limits.gate

    @property
    def gate(self) -> Gate | None:
        """The same, where it is to be measured."""
        return self.recorded_gate if self.asked.gate else None

    @property
    def scores(self) -> tuple[str, ...]:
        """What the greedy texts are scored by: what was asked for, and what the gate limits."""
        limited = () if self.gate is None else self.gate.scores
        return tuple(dict.fromkeys((*self.asked.scores, *limited)))

    @property
    def generate(self) -> int:
        """How many greedy tokens follow each prompt."""
        asked = self.asked.generate
        return (0 if self.streamed else GREEDY) if asked is None else asked

    @property
    def sites(self) -> tuple[Site, ...]:
        """The stream between the blocks."""
        return block_sites(self.shape.blocks)

    @property
    def untied(self) -> tuple[str, str] | None:
        """The head and the embedding that the plan unties it from; None where it does not."""
        if self.layout is None:
            return untied_by_merge(self.artifact.record.plan, self.base)
        return untied(self.layout, self.planned.model.tensors)

    @property
    def nulled(self) -> tuple[Edit, ...]:
        """The edits that the record says are nulling."""
        return nulled(self.artifact.edits, self.artifact.record.plan.findings)


@contextmanager
def opened(asked: Verification, planned: Planned) -> Iterator[Inputs]:
    """Open an artifact and its base, and require that they belong together.

    Args:
        asked: what is measured and how.
        planned: what the artifact's plan comes to, made again from base and edits.

    Raises:
        UsageError: something is asked for that has no meaning for the artifact.
        InputError: the artifact or the base cannot be read, or the base is another one.
        FamilyError: no table fits the base.
    """
    artifact = open_baked(asked.artifact)
    asked.check(artifact)
    with _table(artifact, asked.family) as family:
        base = open_base(artifact, asked.base)
        base = replace(base, harmless=(*base.harmless, *asked.assume_harmless))
        layout = None if artifact.merged else fit.layout_of(base, family)
        if layout is None:
            _check_runs(base)
        shape = shape_of_class(base, planned.model) if layout is None else shape_of(layout)
        streamed = _is_streamed(asked, base)
        checkpoint = artifact.carrier.checkpoint
        baked = _baked(artifact, base) if checkpoint else None
        inputs = Inputs(
            asked=asked,
            artifact=artifact,
            base=base,
            shape=shape,
            layout=layout,
            prompts=_prompts(asked, artifact.path if checkpoint else base.path, shape),
            family=family,
            streamed=streamed,
            beside=_beside(asked, base, shape, streamed=streamed),
            planned=planned,
            files=stored_files(artifact, base, baked, layout, planned),
            baked=baked,
            adapter=adapter_of(artifact, asked.adapter) if artifact.merged else None,
        )
        _check(inputs)
        yield inputs


def _is_streamed(asked: Verification, base: Checkpoint) -> bool:
    """Return whether one block is in memory at a time, and say so where nobody has asked for it."""
    if asked.streamed is not None:
        return asked.streamed
    # A model that somebody has placed elsewhere is not for this memory.
    if asked.device_map not in (None, CPU) or not too_large(base):
        return False
    left = " and no greedy text" if asked.generate is None else ""
    asked.remark(
        f"one block in memory at a time{left}: the model in float64 takes more than half of the "
        "memory; --no-stream loads it whole"
    )
    return True


def _beside(asked: Verification, base: Checkpoint, shape: Shape, *, streamed: bool) -> str | None:
    """Return where a model in float32 goes by itself."""
    if asked.device_map is not None or streamed:
        return None
    # Those of a batch, and the copy of them that leaves the padding out.
    return "cuda" if fits_gpu(base, 2 * BATCH_TOKENS * shape.vocab) else None


def _check_runs(base: Checkpoint) -> None:
    """Refuse what transformers cannot run in float64, where no table has."""
    if base.coded:
        raise InputError(
            "the base is quantised, and a verification computes in float64",
            where=base.source,
            fix="compare base and adapter with the result in the program that serves them",
        )


def _baked(artifact: Baked, base: Checkpoint) -> Checkpoint:
    """Return the baked checkpoint, in whose config the same keys change nothing."""
    return replace(decoded(open_checkpoint(artifact.path)), harmless=base.harmless)


def _check(inputs: Inputs) -> None:
    """Refuse what the size of the model decides."""
    if inputs.scores and not inputs.generate:
        raise UsageError("a score needs generated text", fix="name a length with --generate")
    gate = inputs.gate
    if gate is not None and inputs.streamed and (gate.refusals or gate.tasks):
        raise UsageError(
            "the gate's refusals and tasks are measured with the model in memory",
            where=str(inputs.artifact.path),
            fix="use --no-stream, on a machine that holds the model, or leave the gate out with "
            "--no-gate",
        )


@contextmanager
def _table(artifact: Baked, family: Path | None) -> Iterator[Path | None]:
    """Yield the file of the user's own table: the one that is named, or the one of the record."""
    table = artifact.record.family
    if family is not None or table is None:
        yield family
        return
    with tempfile.TemporaryDirectory(prefix="bake-") as folder:
        path = Path(folder) / "family.toml"
        path.write_text(table.text, encoding="utf-8")
        yield path


def _prompts(asked: Verification, tokenizer: Path, shape: Shape) -> PromptSet:
    if isinstance(asked.prompts, Path):
        return read_prompts(asked.prompts, tokenizer, asked.longest)
    if asked.prompts:
        return given_prompts(asked.prompts)
    return default_prompts(tokenizer, shape.vocab, asked.longest)


def open_base(artifact: Baked, base: str | None) -> Checkpoint:
    """Return the base checkpoint of an artifact, with its weights at hand.

    Raises:
        InputError: it is another one than the artifact was made from.
    """
    place = place_of_base(artifact) if base is None else base
    return check_base(artifact, decoded(open_checkpoint(place, complete=True)))


def place_of_base(artifact: Baked) -> str:
    """Return where the record says that the base is.

    Raises:
        InputError: a folder that is not there any more.
    """
    named = artifact.record.base
    if named.path is not None and not Path(artifact.base).is_dir():
        raise InputError(
            f"the base {named.model} is not where it was: there is no {artifact.base}",
            where=str(artifact.path),
            fix="name it with --base",
        )
    return artifact.base


def check_base(artifact: Baked, checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint that is found to be the artifact's base, by config and headers.

    Raises:
        InputError: it is another one than the artifact was made from.
    """
    recorded = artifact.record.base.digest
    if recorded is not None and checkpoint.digest() != recorded:
        raise InputError(
            f"{checkpoint.source} is not the base that the artifact was made from",
            why=f"its digest is {checkpoint.digest()}, the record has {recorded}",
            fix="name the right base with --base",
        )
    return replace(checkpoint, harmless=artifact.record.assume_harmless)
