"""Compare a baked artifact with the hook-steered base model, logit by logit.

The reference shares no code with the fold: it loads the base with transformers, puts the edits on
as hooks and runs it. The baked checkpoint is loaded as any user would load it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from bake import __version__
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.errors import InputError, UsageError
from bake.families import Layout
from bake.verify import verdict
from bake.verify.artifact import CHECKPOINT, Baked, changed_files, open_baked
from bake.verify.assemble import environment, report_of
from bake.verify.effects import effects
from bake.verify.evidence import Progress, Subject, collect
from bake.verify.judgement import raise_unless_passed
from bake.verify.memory import too_large
from bake.verify.models import layout_of
from bake.verify.prompts import LONGEST, PromptSet, default_prompts, given_prompts
from bake.verify.report import Report, Row
from bake.verify.runs import batches_of
from bake.verify.serving import Runtimes, serve_all, serving, target_of
from bake.verify.store import Store, question

GREEDY = 16
"""Greedy tokens after each prompt, with the model in memory."""

__all__ = ["compare", "layout_of", "open_baked", "raise_unless_passed"]


def compare(
    out: Path,
    *,
    base: str | None = None,
    prompts: Sequence[Sequence[int]] | PromptSet | None = None,
    family: Path | None = None,
    progress: Progress = lambda text: None,
    streamed: bool | None = None,
    device_map: str | None = None,
    most_kl: float | None = None,
    longest: int | None = None,
    runtimes: Runtimes | None = None,
    generate: int | None = None,
    scores: Sequence[str] = (),
    resume: Path | None = None,
) -> Report:
    """Measure how far a baked checkpoint lies from the hook-steered base model.

    Args:
        out: a folder that ``bake export`` wrote.
        base: the base model's folder or Hub id; as recorded when None.
        prompts: token ids; when None, bake's own prompts where the artifact has a tokenizer, and
            random tokens of several lengths where it has none.
        family: a table of the user's own, where the export used one.
        progress: told what is being done.
        streamed: hold one block in memory at a time; when None, where memory asks for it.
        device_map: as transformers takes it, for machines with accelerators.
        most_kl: what KL(hooked ‖ baked) may be of KL(hooked ‖ base), for an approximate plan.
        longest: tokens of each of bake's own prompts; 64 when None.
        runtimes: which runtimes serve the artifact as well.
        generate: greedy tokens after each prompt; when None, 16 with the model in memory, none
            streamed, since every token reads the whole model again.
        scores: what to score the generated text by, see ``bake.verify.scores``.
        resume: a folder for finished runs, so that an interrupted verification is taken up.

    Raises:
        InputError: the artifact or the base cannot be read, or the base is another one.
        FamilyError: no table fits the base.
    """
    start = perf_counter()
    case = _open(out, base, prompts, family, longest, runtimes, streamed, progress)
    if case.artifact.kind != CHECKPOINT:
        return _served_only(case)
    count = (0 if case.streamed else GREEDY) if generate is None else generate
    if scores and not count:
        raise UsageError("a score needs generated text", fix="name a length with --generate")
    baked = open_checkpoint(out)
    subject = Subject(
        artifact=case.artifact,
        base=case.base,
        baked=baked,
        layout=case.layout,
        prompts=case.prompts.tokens,
        batches=batches_of(case.prompts.tokens),
        generate=count,
        texts=bool(scores),
        family=family,
        streamed=case.streamed,
        device_map=device_map,
        progress=progress,
        store=Store(resume, _question(case, baked)),
    )
    progress("digests of the artifact's files")
    changed = changed_files(case.artifact)
    evidence = collect(subject)
    report = report_of(subject, evidence, changed, case.prompts, most_kl)
    found = effects(evidence, case.prompts, scores, out)
    rows, records = _serve(case)
    subject.store.clear()
    return replace(
        report,
        rows=(*report.rows, *rows),
        runtimes=records,
        effects=found,
        timing={"total": perf_counter() - start, "forward": evidence.seconds},
    )


@dataclass(frozen=True, slots=True)
class _Case:
    """An artifact and its base, opened and found to belong together."""

    artifact: Baked
    base: Checkpoint
    layout: Layout
    prompts: PromptSet
    family: Path | None
    runtimes: Runtimes | None
    streamed: bool
    progress: Progress = field(repr=False)


def _open(
    out: Path,
    base: str | None,
    prompts: Sequence[Sequence[int]] | PromptSet | None,
    family: Path | None,
    longest: int | None,
    runtimes: Runtimes | None,
    streamed: bool | None,
    progress: Progress,
) -> _Case:
    artifact = open_baked(out)
    if runtimes is not None:
        runtimes.check(artifact.kind)
    checkpoint = open_base(artifact, base)
    layout = layout_of(checkpoint, family)
    if prompts is None or not prompts:
        # An adapter has no tokenizer of its own.
        tokenizer = out if artifact.kind == CHECKPOINT else checkpoint.path
        chosen = default_prompts(tokenizer, layout.dims["vocab"], longest or LONGEST)
    else:
        chosen = prompts if isinstance(prompts, PromptSet) else given_prompts(prompts)
    parts = too_large(checkpoint) if streamed is None else streamed
    return _Case(artifact, checkpoint, layout, chosen, family, runtimes, parts, progress)


def open_base(artifact: Baked, base: str | None) -> Checkpoint:
    """Return the base checkpoint of an artifact, with its weights at hand.

    Raises:
        InputError: it is another one than the artifact was made from.
    """
    checkpoint = open_checkpoint(base or artifact.base, complete=True)
    recorded = artifact.record["base"].get("digest")
    if recorded is not None and checkpoint.digest() != recorded:
        raise InputError(
            f"{checkpoint.source} is not the base that the artifact was made from",
            why=f"its digest is {checkpoint.digest()}, the record has {recorded}",
            fix="name the right base with --base",
        )
    return checkpoint


def _question(case: _Case, baked: Checkpoint) -> dict[str, Any]:
    """Return what decides the result of every run."""
    family = None if case.family is None else case.family.read_text(encoding="utf-8")
    return question(
        artifact=case.artifact.plan_digest,
        base=case.base.digest(),
        baked={name: _stamp(case.artifact.path / name) for name in (*baked.shards, "bake.json")},
        prompts=case.prompts.digest,
        family=family,
        streamed=case.streamed,
        bake=__version__,
    )


def _stamp(path: Path) -> list[int]:
    """Return what changes when a file is written to: its digest would take as long as a run."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _serve(case: _Case) -> tuple[tuple[Row, ...], tuple[dict[str, Any], ...]]:
    if case.runtimes is None:
        return (), ()
    case.progress("hooked model for the runtimes")
    target = target_of(
        case.artifact,
        case.base,
        case.layout,
        case.prompts.tokens,
        family=case.family,
        streamed=case.streamed,
    )
    rows, records = serve_all(case.runtimes, case.artifact, case.base, target, case.progress)
    effect = Row(
        "effect: hooked − base, max |Δlog p|",
        target.effect,
        target.limit,
        target.effect > target.limit,
        "must be larger",
        "effect",
    )
    return (effect, *rows), records


def _served_only(case: _Case) -> Report:
    """Verify what is no checkpoint: in the runtimes that load it, and nowhere else.

    Raises:
        UsageError: no runtime is named.
    """
    if case.runtimes is None:
        kind = case.artifact.kind
        raise UsageError(
            f"a {kind} is verified in a runtime that loads it",
            where=str(case.artifact.path),
            fix=f"name one with --runtime: {', '.join(serving(kind))}",
        )
    (effect, *rows), records = _serve(case)
    return Report(
        artifact=str(case.artifact.path),
        base=case.artifact.base_name,
        plan_digest=case.artifact.plan_digest,
        exactness=case.artifact.exactness,
        dtype=case.layout.dtype,
        rows=(effect, *verdict.files_row(changed_files(case.artifact)), *rows),
        environment=environment(),
        prompts=case.prompts.to_json(),
        runtimes=records,
    )
