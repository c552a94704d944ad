"""Compare a baked artifact with the hook-steered base model, logit by logit.

The reference shares no code with the fold: it loads the base with transformers, puts the edits on
as hooks and runs it. The baked checkpoint is loaded as any user would load it.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from bake import __version__
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.errors import InputError, UsageError
from bake.families import Layout, fit
from bake.verify import verdict
from bake.verify.artifact import CHECKPOINT, MERGE, Baked, changed_files, open_baked
from bake.verify.assemble import environment, report_of
from bake.verify.effects import effects
from bake.verify.evidence import Progress, Subject, collect
from bake.verify.judgement import raise_unless_passed
from bake.verify.memory import too_large
from bake.verify.merged import adapter_of, compare_merged, target_of_merge
from bake.verify.models import layout_of
from bake.verify.prompts import (
    LONGEST,
    PromptSet,
    default_prompts,
    given_prompts,
    read_prompts,
)
from bake.verify.report import SERVED_EFFECT, Report, Row
from bake.verify.runs import batches_of
from bake.verify.runtimes.registry import Runtimes, serving
from bake.verify.scores import check_score
from bake.verify.serving import Served, Target, serve_all, target_of
from bake.verify.store import Store, question

GREEDY = 16
"""Greedy tokens after each prompt, with the model in memory."""

__all__ = ["compare", "layout_of", "open_baked", "raise_unless_passed"]


def compare(
    out: Path,
    *,
    base: str | None = None,
    prompts: Sequence[Sequence[int]] | Path | None = None,
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
    adapter: Path | None = None,
) -> Report:
    """Measure how far a baked checkpoint lies from the hook-steered base model.

    Args:
        out: a folder that ``bake export`` wrote.
        base: the base model's folder or Hub id; as recorded when None.
        prompts: token ids, or a file of texts; when None, bake's own prompts where the artifact has
            a tokenizer, and random tokens of several lengths where it has none. An adapter's and a
            GGUF's tokenizer is that of the base.
        family: a table of the user's own; that of the record when None, where the export used one.
        progress: told what is being done.
        streamed: hold one block in memory at a time; when None, where memory asks for it.
        device_map: as transformers takes it, for machines with accelerators.
        most_kl: what KL(hooked ‖ baked) may be of KL(hooked ‖ base), for an approximate plan; what
            the recipe asks for when None.
        longest: tokens of each text; of bake's own prompts 64 when None, of a file's all of them.
        runtimes: which runtimes serve the artifact as well.
        generate: greedy tokens after each prompt; when None, 16 with the model in memory, none
            streamed, since every token reads the whole model again.
        scores: what to score the generated text by, see ``bake.verify.scores``.
        resume: a folder for finished runs, so that an interrupted verification is taken up.
        adapter: of a merge, the adapter's folder, where it has moved since.

    Raises:
        InputError: the artifact or the base cannot be read, or the base is another one.
        FamilyError: no table fits the base.
    """
    start = perf_counter()
    artifact = open_baked(out)
    if runtimes is not None:
        runtimes.check(artifact.kind)
    _check_options(
        artifact, generate=generate, scores=scores, device_map=device_map,
        streamed=streamed, adapter=adapter, most_kl=most_kl,
    )  # fmt: skip
    with _table(artifact, family) as own:
        case = _open(artifact, base, prompts, own, longest, runtimes, streamed, progress)
        most = artifact.most_kl if most_kl is None else most_kl
        case = replace(case, most_kl=most)
        if case.artifact.kind in (CHECKPOINT, MERGE):
            report = _compared(case, device_map, most, generate, scores, resume, adapter)
        else:
            report = _served_only(case)
    return replace(report, timing={**report.timing, "total": perf_counter() - start})


def _check_options(
    artifact: Baked,
    *,
    generate: int | None,
    scores: Sequence[str],
    device_map: str | None,
    streamed: bool | None,
    adapter: Path | None,
    most_kl: float | None,
) -> None:
    """Refuse what would be ignored, or be found wrong hours later.

    Raises:
        UsageError: an option has no meaning for this artifact or beside another one.
        InputError: a score cannot be had.
    """
    kind, where = artifact.kind, str(artifact.path)
    if most_kl is not None and not 0 < most_kl < math.inf:
        raise UsageError(f"--most-kl is {most_kl:g}", fix="name a share above 0, for example 0.05")
    if adapter is not None and kind != MERGE:
        raise UsageError(f"--adapter is for a merge, and this is a {kind}", where=where)
    if device_map is not None and streamed:
        raise UsageError("--device-map and --stream exclude each other")
    if kind not in (CHECKPOINT, MERGE):
        given = {"generate": generate or None, "score": scores or None, "device-map": device_map}
        for name, value in given.items():
            if value is not None:
                raise UsageError(
                    f"--{name} is for checkpoints, and this is a {kind}, which a runtime serves",
                    where=where,
                )
    for spec in scores:
        check_score(spec)


@contextmanager
def _table(artifact: Baked, family: Path | None) -> Iterator[Path | None]:
    """Yield the file of the user's own table: the one that is named, or the one of the record."""
    if family is not None or artifact.family() is None:
        yield family
        return
    with tempfile.TemporaryDirectory(prefix="bake-") as folder:
        path = Path(folder) / "family.toml"
        path.write_text(artifact.record["family"]["text"], encoding="utf-8")
        yield path


def _compared(
    case: "_Case",
    device_map: str | None,
    most_kl: float | None,
    generate: int | None,
    scores: Sequence[str],
    resume: Path | None,
    adapter: Path | None,
) -> Report:
    """Compare a checkpoint, with hooks on its base or with the adapter that was merged."""
    out, progress = case.artifact.path, case.progress
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
        family=case.family,
        streamed=case.streamed,
        device_map=device_map,
        progress=progress,
        store=Store(resume, _question(case, baked)),
    )
    if case.artifact.kind == MERGE:
        return _compared_merge(case, subject, adapter_of(case.artifact, adapter), scores)
    progress("digests of the artifact's files")
    changed = changed_files(case.artifact)
    evidence = collect(subject)
    report = report_of(subject, evidence, changed, case.prompts, most_kl)
    found = effects(evidence, case.prompts, scores, out)
    served = _serve(case)
    subject.store.clear()
    return replace(
        report,
        rows=(*report.rows, *served.rows),
        runtimes=served.records,
        effects=found,
        timing={"forward": evidence.seconds},
    )


def _compared_merge(
    case: "_Case", subject: Subject, adapter: Path, scores: Sequence[str]
) -> Report:
    """Compare a merged checkpoint with its adapter at work."""
    report = compare_merged(subject, adapter, case.prompts, scores)
    served = _judge(case, lambda: target_of_merge(subject, adapter))
    subject.store.clear()
    return replace(report, rows=(*report.rows, *served.rows), runtimes=served.records)


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
    most_kl: float | None = None


def _open(
    artifact: Baked,
    base: str | None,
    prompts: Sequence[Sequence[int]] | Path | None,
    family: Path | None,
    longest: int | None,
    runtimes: Runtimes | None,
    streamed: bool | None,
    progress: Progress,
) -> _Case:
    checkpoint = open_base(artifact, base)
    layout = fit.layout_of(checkpoint, family)
    # An adapter has no tokenizer of its own.
    tokenizer = artifact.path if artifact.kind in (CHECKPOINT, MERGE) else checkpoint.path
    if isinstance(prompts, Path):
        chosen = read_prompts(prompts, tokenizer, longest)
    elif prompts:
        chosen = given_prompts(prompts)
    else:
        chosen = default_prompts(tokenizer, layout.dims["vocab"], longest or LONGEST)
    parts = too_large(checkpoint) if streamed is None else streamed
    return _Case(artifact, checkpoint, layout, chosen, family, runtimes, parts, progress)


def open_base(artifact: Baked, base: str | None) -> Checkpoint:
    """Return the base checkpoint of an artifact, with its weights at hand.

    Raises:
        InputError: it is another one than the artifact was made from.
    """
    place = place_of_base(artifact) if base is None else base
    return check_base(artifact, open_checkpoint(place, complete=True))


def place_of_base(artifact: Baked) -> str:
    """Return where the record says that the base is.

    Raises:
        InputError: a folder that is not there any more.
    """
    named = artifact.record["base"]
    if named.get("path") is not None and not Path(artifact.base).is_dir():
        raise InputError(
            f"the base {named['model']} is not where it was: there is no {artifact.base}",
            where=str(artifact.path),
            fix="name it with --base",
        )
    return artifact.base


def check_base(artifact: Baked, checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint that is found to be the artifact's base, by config and headers.

    Raises:
        InputError: it is another one than the artifact was made from.
    """
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


def _serve(case: _Case) -> Served:
    def target() -> Target:
        return target_of(
            case.artifact,
            case.base,
            case.layout,
            case.prompts.tokens,
            family=case.family,
            streamed=case.streamed,
        )

    return _judge(case, target)


def _judge(case: _Case, reference: Callable[[], Target]) -> Served:
    """Return what the runtimes that are asked for serve, beside a reference."""
    if case.runtimes is None:
        return Served((), (), {})
    case.progress("reference for the runtimes")
    target = reference()
    target = replace(target, most_kl=case.most_kl)
    served = serve_all(case.runtimes, case.artifact, case.base, target, case.progress)
    effect = Row(
        SERVED_EFFECT,
        target.effect,
        target.limit,
        target.effect > target.limit,
        "must be larger",
        "effect",
    )
    floors = (
        Row(f"noise floor: {name}, max |Δlog p|", value, None, None, "", "floor")
        for name, value in target.floors.items()
    )
    return replace(served, rows=(effect, *floors, *served.rows))


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
    served = _serve(case)
    effect, *rows = served.rows
    shown = next(iter(served.compared.values()), None)
    edit = served.effect
    return Report(
        artifact=str(case.artifact.path),
        base=case.artifact.base_name,
        plan_digest=case.artifact.plan_digest,
        exactness=case.artifact.exactness,
        dtype=case.layout.dtype,
        rows=(effect, *verdict.files_row(changed_files(case.artifact)), *rows),
        environment=environment("cpu"),
        prompts=case.prompts.to_json(),
        metrics={
            **{name: found.metrics.to_json() for name, found in served.compared.items()},
            **({} if edit is None else {"effect": edit.metrics.to_json()}),
        },
        kl=() if shown is None else shown.kl,
        points=() if shown is None else shown.points,
        kl_effect=() if edit is None else edit.kl,
        points_effect=() if edit is None else edit.points,
        runtimes=served.records,
    )
