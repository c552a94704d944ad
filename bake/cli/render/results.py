"""What a job wrote or measured, and what an artifact of directions holds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bake.cli.render.matrix import summary
from bake.cli.render.pieces import Fact, facts, listed, next_step, section, size, table
from bake.cli.render.rounding import rounding, storage_told
from bake.cli.render.tensors import changed_tensors

if TYPE_CHECKING:
    from bake.artifact import Artifact
    from bake.artifact.schema import CodedTensor
    from bake.directions import Directions
    from bake.directions.describe import Row
    from bake.jobs.exporting import Exported
    from bake.jobs.merging import Merged
    from bake.jobs.published import Reproduction
    from bake.jobs.reproduce import Reproduced
    from bake.jobs.verifying import Verified
    from bake.revert.checkpoint import Reverted
    from bake.verify.report import Report


def exported(result: "Exported", *, verbose: bool) -> list[RenderableType]:
    """Return what was written, carrier by carrier; with ``verbose`` every tensor and file."""
    return [part for each in result.artifacts for part in _artifact(result, each, verbose=verbose)]


def exported_brief(result: "Exported") -> list[RenderableType]:
    """Return what was written in a few lines: how exact it is, where it is and who loads it."""
    from bake.artifact import KINDS
    from bake.cli.render.plans import brief
    from bake.verify.runtimes.registry import RUNTIMES

    rows = brief(result.request)
    for each in result.artifacts:
        rows.append(("written", f"{each.path} ({each.kind}, {size(each.bytes_written)})"))
        if worst := _rounded(result.rounded(each)):
            rows.append(("rounding", worst))
        if (options := result.options(each)).storage is not None:
            rows.append(("types", storage_told(options.gguf_type, options.storage)))
    first = result.artifacts[0]
    served = (name for name, one in RUNTIMES.items() if first.kind in one.serves)
    runtime = [] if KINDS[first.kind].checkpoint else ["--runtime", next(served)]
    rows.append(next_step("bake", "verify", first.path, *runtime))
    return [facts(rows)]


def _rounded(tensors: "Sequence[CodedTensor]") -> str:
    """Return what rounding did to the worst of the tensors of a GGUF that were edited."""
    kept = [tensor.change for tensor in tensors if tensor.change is not None]
    if not kept:
        return ""
    return f"of {len(tensors)} edited tensors the worst keeps {100 * min(kept):.4g} % of the edit"


def _artifact(result: "Exported", written: "Artifact", *, verbose: bool) -> list[RenderableType]:
    """Return what one carrier holds. Of the base only a checkpoint has copies, byte for byte."""
    planned, checkpoint = result.request.plan, result.request.model.checkpoint
    measured = result.rounded(written)
    rows = [
        ("written", str(written.path)),
        ("carrier", written.kind),
        ("size", f"{written.bytes_written:,} bytes in {len(written.files)} files"),
    ]
    if written.kind == "checkpoint":
        changed = changed_tensors(planned, checkpoint)
        edited = sum(row.nbytes for row in changed if not row.new)
        new = sum(row.nbytes for row in changed if row.new)
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        dequantised = result.options(written).dequantize
        copied = f"{total - edited:,} bytes of tensors, " + (
            "decoded or as they were" if dequantised else "as they were"
        )
        rows += [
            *([] if measured else [("copied", copied), ("edited", f"{edited:,} bytes of tensors")]),
            *([("new", f"{new:,} bytes of tensors")] if new else []),
            *_unindexed(checkpoint.unindexed),
        ]
    if measured:
        edits = f"{written.bytes_edited:,} bytes of tensors; the others as they were"
        rows.append(("edited", edits))
    options = result.options(written)
    if options.storage is not None:
        rows.append(("types", storage_told(options.gguf_type, options.storage)))
    parts: list[RenderableType] = [Text(), facts(rows), *rounding(measured, verbose=verbose)]
    if verbose:
        files = table("file", "sha256")
        for name, digest in written.files.items():
            files.add_row(name, digest.removeprefix("sha256:"))
        parts.append(section("Files", files))
    return parts


def _unindexed(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return what is said of weights that no index names: nothing where there are none."""
    return [("left behind", f"{', '.join(names)} (no index names them)")] if names else []


def reproduced(result: "Reproduced") -> list[RenderableType]:
    """Return how many of the files are the recorded ones, and those that are not."""
    rows = [("written", str(result.written.path)), ("as recorded", result.summary)]
    parts: list[RenderableType] = [facts(rows)]
    if result.differing:
        files = table("file", "recorded", "here")
        for name in result.differing:
            sides = (result.recorded, result.written.files)
            files.add_row(name, *(side.get(name, "absent")[:16] for side in sides))
        parts.append(section("Files that differ", files))
    return parts


def merged(result: "Merged") -> list[RenderableType]:
    """Return what a merge wrote."""
    written = result.artifact
    edited = f"{written.bytes_written:,}, of which {written.bytes_edited:,} are edited"
    rows = [
        ("written", str(written.path)),
        ("files", str(len(written.files))),
        ("bytes", edited),
        *(("note", note) for note in result.plan.notes),
        ("runtimes", summary([one for one in result.plan.runtimes if one.reads])),
        *(
            (one.runtime, one.reason)
            for one in result.plan.runtimes
            if one.reads and one.status == "refused"
        ),
    ]
    return [facts(rows)]


def reverted(result: "Reverted") -> list[RenderableType]:
    """Return what was restored, and how much of it is the base's to the bit."""
    taken = f"{len(result.edited)} taken from the base ({result.bytes_from_base:,} bytes)"
    absent = f"{', '.join(result.absent)} (an export does not carry them)"
    rows = [
        ("written", f"{result.path} ({result.bytes_written:,} bytes)"),
        ("bit for bit", f"{len(result.compared)} of {len(result.files)} files"),
        ("tensors", f"{taken}, {len(result.removed)} created ones removed"),
        *([("left behind", ", ".join(result.left))] if result.left else []),
        *([("not restored", absent)] if result.absent else []),
        *(("note", note) for note in result.notes),
    ]
    return [facts(rows)]


def directions(artifact: "Directions", rows: Sequence["Row"], recipe: str) -> list[RenderableType]:
    """Return what an artifact holds, one row per tensor, and a recipe to begin with."""
    head = [
        ("concept", artifact.concept),
        ("format", artifact.format),
        ("file", artifact.source),
        ("digest", artifact.digest),
        ("width", str(artifact.width)),
    ]
    parts: list[RenderableType] = [facts(head)]
    parts.append(section("Directions (cosine: to the one before)", _tensors(rows)))
    if any(row.singular_values for row in rows):
        parts.append(section("Subspaces", _spectra(rows)))
    if artifact.metadata:
        said = ((str(key), str(value)) for key, value in artifact.metadata.items())
        parts.append(section("Metadata", facts(said)))
    # As it is: brackets and bars of a recipe are no markup.
    return [*parts, section("A recipe to begin with", Text(recipe.rstrip()))]


def _tensors(rows: Sequence["Row"]) -> Table:
    made = table(
        "layer", "site", "role", "shape", "type", "norm", "cosine",
        right=("layer", "norm", "cosine"),
    )  # fmt: skip
    for row in rows:
        made.add_row(
            _layer(row),
            row.site or "",
            str(row.role),
            "×".join(map(str, row.shape)),
            row.dtype,
            f"{row.norm:.4g}",
            "" if row.cosine is None else f"{row.cosine:+.3f}",
        )
    return made


def _spectra(rows: Sequence["Row"]) -> Table:
    made = table("layer", "singular values", right=("layer",))
    for row in rows:
        if row.singular_values:
            values = ", ".join(f"{value:.4g}" for value in row.singular_values)
            made.add_row(_layer(row), values)
    return made


def _layer(row: "Row") -> str:
    return "" if row.layer is None else str(row.layer)


def _verdict(measured: "Report") -> list[Fact]:
    style = {"passed": "bold green", "failed": "bold red", "inconclusive": "bold yellow"}
    outcome = Text(measured.verdict, style[measured.verdict])
    return [("verification", outcome), ("", measured.headline.line())]


def report(measured: "Report") -> list[RenderableType]:
    """Return what a verification measured."""
    from bake.verify.tables import FAIL, NUMBERS, PASS, gate_of, prompts_of, side_effects_of, tables

    verdicts = {PASS: Text(PASS, "green"), FAIL: Text(FAIL, "bold red")}
    sections = []
    for words in tables(measured):
        body = table(*words.head, right=NUMBERS)
        for row in words.rows:
            body.add_row(*(verdicts.get(cell, cell) for cell in row))
        sections.append(section(", ".join(filter(None, (words.title, words.note))), body))
    return [
        facts(_verdict(measured)),
        facts(
            [
                ("artifact", measured.artifact),
                ("base", measured.base),
                ("plan", f"{measured.exactness}, {measured.plan_digest}"),
                ("stored in", measured.dtype),
                *([("prompts", prompts_of(measured))] if measured.prompts else []),
            ]
        ),
        *sections,
        Text(),
        facts(
            [
                *([("gate", gate)] if (gate := gate_of(measured)) else []),
                *([("side effects", said)] if (said := side_effects_of(measured)) else []),
                ("run with", ", ".join(f"{k} {v}" for k, v in measured.environment.items())),
            ]
        ),
    ]


def verified(result: "Verified") -> list[RenderableType]:
    """Return the report, its files and, of a published artifact, how far it was reproduced."""
    again = [] if result.reproduction is None else _reproduction(result.reproduction)
    files = facts(("written", str(path)) for path in result.written if path.parent.name != "plots")
    return [*report(result.report), Text(), files, *again]


def verified_brief(result: "Verified") -> list[RenderableType]:
    """Return the verdict, its answers, the files of the report and what comes next."""
    from bake.verify.tables import gate_of, side_effects_of

    measured, again = result.report, result.reproduction
    rows = _verdict(measured)
    rows += [
        ("", f"{answer.text} {answer.verdict}" + (f": {answer.reason}" if answer.reason else ""))
        for answer in measured.answers
    ]
    for name, said in (("gate", gate_of(measured)), ("side effects", side_effects_of(measured))):
        rows += [(name, said)] if said else []
    rows += [("report", str(path)) for path in result.written if path.suffix in (".md", ".html")]
    if result.failure() is None and again is None:
        rows.append(next_step("bake", "push", measured.artifact, "OWNER/NAME"))
    return [facts(rows), *([] if again is None else _reproduction(again))]


def _reproduction(result: "Reproduction") -> list[RenderableType]:
    """Return the published numbers beside those that were measured here."""
    from bake.verify.agreement import outcome, shown

    rows = [("artifact", result.source.name)]
    if result.replanned is not None:
        rows.append(("plan", result.replanned.summary))
    if result.rebaked is not None:
        rows.append(("exported again", result.rebaked.summary))
    parts: list[RenderableType] = []
    if result.agreement is not None:
        rows.append(("verification", outcome(result.agreement)))
        sides = ("published", "measured here")
        pairs = table("comparison", *sides, "", right=sides)
        for pair in result.agreement.pairs:
            pairs.add_row(pair.name, shown(pair.published), shown(pair.here), pair.problem or "")
        parts.append(section("Published, and measured here", pairs))
    return [*parts, section("Made again", facts(rows)), *listed("Notes", result.notes)]
