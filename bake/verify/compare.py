"""Compare a baked checkpoint with the hook-steered base model, logit by logit.

The reference shares no code with the fold: it loads the base with transformers, puts the edits on
as hooks and runs it. The baked checkpoint is loaded as any user would load it.
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bake import __version__
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.errors import ExactnessBug, InputError, UsageError, VerificationFailed
from bake.families import Layout
from bake.verify import verdict
from bake.verify.artifact import CHECKPOINT, Baked, changed_files, open_baked
from bake.verify.effects import effects
from bake.verify.evidence import TORCH, Evidence, Progress, Subject, collect
from bake.verify.leak import leaks
from bake.verify.metrics import compare_logits, stream_differences
from bake.verify.models import layout_of
from bake.verify.observe import block_sites
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
    artifact = open_baked(out)
    if runtimes is not None:
        runtimes.check(artifact.kind)
    checkpoint = open_base(artifact, base)
    layout = layout_of(checkpoint, family)
    tokenizer = out if artifact.kind == CHECKPOINT else checkpoint.path
    chosen = _prompts(prompts, tokenizer, layout.dims["vocab"], longest)
    if artifact.kind != CHECKPOINT:
        return _served_only(artifact, checkpoint, layout, chosen, runtimes, family, progress)
    baked = open_checkpoint(out)
    is_streamed = _too_large(checkpoint) if streamed is None else streamed
    count = (0 if is_streamed else GREEDY) if generate is None else generate
    if scores and not count:
        raise UsageError("a score needs generated text", fix="name a length with --generate")
    asked = question(
        artifact=artifact.plan_digest,
        base=checkpoint.digest(),
        baked={name: _stamp(out / name) for name in (*baked.shards, "bake.json")},
        prompts=chosen.digest,
        streamed=is_streamed,
        bake=__version__,
    )
    subject = Subject(
        artifact=artifact,
        base=checkpoint,
        baked=baked,
        layout=layout,
        prompts=chosen.tokens,
        batches=batches_of(chosen.tokens),
        generate=count,
        texts=bool(scores),
        family=family,
        streamed=is_streamed,
        device_map=device_map,
        progress=progress,
        store=Store(resume, asked),
    )
    progress("digests of the artifact's files")
    changed = changed_files(artifact)
    evidence = collect(subject)
    report = _report(subject, evidence, changed, chosen, most_kl)
    found = effects(evidence, chosen, scores, out)
    rows, records = _serve(
        runtimes, artifact, checkpoint, layout, chosen, family, is_streamed, progress
    )
    report = replace(
        report,
        rows=(*report.rows, *rows),
        runtimes=records,
        effects=found,
        timing={"total": perf_counter() - start, "forward": evidence.seconds},
    )
    subject.store.clear()
    return report


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


def _serve(
    runtimes: Runtimes | None,
    artifact: Baked,
    base: Checkpoint,
    layout: Layout,
    prompts: PromptSet,
    family: Path | None,
    streamed: bool,
    progress: Progress,
) -> tuple[tuple[Row, ...], tuple[dict[str, Any], ...]]:
    if runtimes is None:
        return (), ()
    progress("hooked model for the runtimes")
    target = target_of(artifact, base, layout, prompts.tokens, family=family, streamed=streamed)
    return serve_all(runtimes, artifact, base, target, progress)


def _served_only(
    artifact: Baked,
    base: Checkpoint,
    layout: Layout,
    prompts: PromptSet,
    runtimes: Runtimes | None,
    family: Path | None,
    progress: Progress,
) -> Report:
    """Verify what is no checkpoint: in the runtimes that load it, and nowhere else.

    Raises:
        UsageError: no runtime is named.
    """
    if runtimes is None:
        raise UsageError(
            f"a {artifact.kind} is verified in a runtime that loads it",
            where=str(artifact.path),
            fix=f"name one with --runtime: {', '.join(serving(artifact.kind))}",
        )
    progress("hooked model for the runtimes")
    streamed = _too_large(base)
    target = target_of(artifact, base, layout, prompts.tokens, family=family, streamed=streamed)
    rows, records = serve_all(runtimes, artifact, base, target, progress)
    effect = Row(
        "effect: hooked − base, max |Δlog p|",
        target.effect,
        target.limit,
        target.effect > target.limit,
        "must be larger",
        "effect",
    )
    return Report(
        artifact=str(artifact.path),
        base=base.source,
        plan_digest=artifact.plan_digest,
        exactness=artifact.exactness,
        dtype=layout.dtype,
        rows=(effect, *verdict.files_row(changed_files(artifact)), *rows),
        environment=_environment(),
        prompts=prompts.to_json(),
        runtimes=records,
    )


def _prompts(
    prompts: Sequence[Sequence[int]] | PromptSet | None,
    out: Path,
    vocab: int,
    longest: int | None,
) -> PromptSet:
    if isinstance(prompts, PromptSet):
        return prompts
    if prompts:
        return given_prompts(prompts)
    return default_prompts(out, vocab, longest or LONGEST)


def _stamp(path: Path) -> list[int]:
    """Return what changes when a file is written to: the digest would take as long as a run."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _too_large(checkpoint: Checkpoint) -> bool:
    """Whether a model in float64 would take more than half of the memory that is free."""
    elements = sum(_elements(info.shape) for info in checkpoint.tensors.values())
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system: as asked for, or not
        return False
    return elements * 8 > free / 2


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _report(
    subject: Subject,
    evidence: Evidence,
    changed: Sequence[str] | None,
    prompts: PromptSet,
    most_kl: float | None,
) -> Report:
    layout, storage = subject.layout, TORCH[subject.layout.dtype]
    bench = verdict.bench_of(subject.artifact, evidence, storage, layout.layers, layout.hidden)
    sites = block_sites(layout)
    last = sites[-1]
    serving, exact = evidence.runs[storage], evidence.exact
    compared = {
        str(dtype).removeprefix("torch."): compare_logits(
            runs.hooked.logits,
            runs.baked.logits,
            hidden=(runs.hooked.streams[last], runs.baked.streams[last]),
        )
        for dtype, runs in evidence.runs.items()
    }
    effect = compare_logits(
        exact.hooked.logits,
        evidence.base.logits,
        hidden=(exact.hooked.streams[last], evidence.base.streams[last]),
    )
    name = str(storage).removeprefix("torch.")
    shown = compared[name]
    rows = (
        verdict.effect_row(bench),
        *verdict.files_row(changed),
        *verdict.exact_rows(bench),
        *verdict.fixed_point_row(bench),
        *verdict.divergence_row(bench, shown, effect, most_kl),
        *verdict.control_rows(bench),
        *verdict.metric_rows(name, shown),
        *verdict.greedy_rows(bench),
    )
    return Report(
        artifact=str(subject.artifact.path),
        base=subject.base.source,
        plan_digest=subject.artifact.plan_digest,
        exactness=subject.artifact.exactness,
        dtype=layout.dtype,
        rows=rows,
        environment=_environment(),
        prompts=prompts.to_json(),
        metrics={
            **{key: found.metrics.to_json() for key, found in compared.items()},
            "effect": effect.metrics.to_json(),
        },
        layers={
            "sites": [str(site) for site in sites],
            "effect": stream_differences(exact.hooked.streams, evidence.base.streams, sites),
            "float64": stream_differences(exact.hooked.streams, exact.baked.streams, sites),
            name: stream_differences(exact.hooked.streams, serving.baked.streams, sites),
            f"floor {name}": stream_differences(
                exact.hooked.streams, serving.hooked.streams, sites
            ),
        },
        leaks=tuple(
            {
                "concept": leak.concept,
                "writer": leak.writer,
                "layer": leak.layer,
                "before": leak.before,
                "after": leak.after,
            }
            for leak in leaks(
                layout, subject.artifact.edits, evidence.base.writes, exact.baked.writes
            )
        ),
        kl=shown.kl,
        points=shown.points,
    )


def raise_unless_passed(report: Report) -> None:
    """Raise what a failed report means.

    Raises:
        VerificationFailed: the edit has no effect, a file was changed, a control passed, or a limit
            of a plan that is not exact was missed.
        ExactnessBug: a plan that says EXACT measures otherwise.
    """
    if report.passed:
        return
    failed = [row for row in report.rows if row.passed is False]
    by_group = {row.group: row for row in reversed(failed)}
    if not failed:
        raise VerificationFailed("nothing was demanded of this artifact", where=report.artifact)
    if "effect" in by_group:
        raise VerificationFailed(
            f"the edit has no effect: hooked and base differ by {by_group['effect'].value:.1e}",
            where=report.artifact,
            why="equality proves nothing where nothing was changed",
            fix="look at the direction and the sites with `bake plan`",
        )
    if "files" in by_group:
        raise VerificationFailed(
            f"the artifact was changed after the export ({by_group['files'].note})",
            where=report.artifact,
            why="its files have other digests than bake.json says",
            fix="export again",
        )
    missed = by_group.get("exact") or failed[0]
    above = "above" if missed.group not in ("control", "floor") else "not above"
    what = f"{missed.name}: {missed.value:.2e} is {above} {missed.limit:.2e}"
    if missed.group == "exact" and report.exactness == "exact":
        raise ExactnessBug(
            what,
            where=report.artifact,
            why="the plan says EXACT, so the files were changed after the export, or bake is wrong",
            fix="export again; if it fails again, report it with bake.json",
        )
    raise VerificationFailed(what, where=report.artifact, why=_REASONS.get(missed.group))


_REASONS = {
    "control": "a broken bake passes the comparison, so it cannot tell a sound one: the edit's "
    "effect on these prompts is too small for this dtype",
    "floor": "a reference that does not round was not evaluated in the dtype that it names",
}


def _environment() -> dict[str, str]:
    import transformers

    return {
        "bake": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
