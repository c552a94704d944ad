"""What jobs return, for a reader: plans, artifacts, and how far they were made again."""

from typing import TYPE_CHECKING

from bake.cli import render

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bake.jobs.exporting import Exported
    from bake.jobs.merging import Merged
    from bake.jobs.published import Reproduction
    from bake.jobs.recorded import Replanned
    from bake.jobs.reproduce import Reproduced
    from bake.jobs.request import Request
    from bake.jobs.verifying import Verified
    from bake.revert.checkpoint import Reverted


def plan(request: "Request", *, verbose: bool) -> list["RenderableType"]:
    """Return the plan of a request."""
    model = request.model
    return render.plan(
        request.plan, request.recipe, model.checkpoint, model.layout, verbose=verbose
    )


def exported(result: "Exported", *, verbose: bool) -> list["RenderableType"]:
    """Return what was written, carrier by carrier."""
    plan, checkpoint = result.request.plan, result.request.model.checkpoint
    return [
        part
        for written in result.artifacts
        for part in render.artifact(
            written, plan, checkpoint, result.rounded(written), verbose=verbose
        )
    ]


def replanned(result: "Replanned", *, verbose: bool) -> list["RenderableType"]:
    """Return the plan, and whether it is that of the record."""
    artifact = f"{result.source.name} ({result.artifact.kind})"
    rows = [("artifact", artifact), ("this is", result.summary)]
    parts = [*plan(result.request, verbose=verbose), render.facts(rows)]
    if result.notes:
        parts.append(render.section("Notes on the artifact", render.indented(result.notes)))
    return parts


def reproduced(result: "Reproduced") -> list["RenderableType"]:
    """Return how many of the files are the recorded ones, and those that are not."""
    rows = [("written", str(result.written.path)), ("as recorded", result.summary)]
    parts: list[RenderableType] = [render.facts(rows)]
    if result.differing:
        files = render.table("file", "recorded", "here")
        for name in result.differing:
            sides = (result.recorded, result.written.files)
            files.add_row(name, *(side.get(name, "absent")[:16] for side in sides))
        parts.append(render.section("Files that differ", files))
    return parts


def reproduction(result: "Reproduction") -> list["RenderableType"]:
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
        pairs = render.table("comparison", *sides, "", right=sides)
        for pair in result.agreement.pairs:
            pairs.add_row(pair.name, shown(pair.published), shown(pair.here), pair.problem or "")
        parts.append(render.section("Published, and measured here", pairs))
    parts.append(render.section("Made again", render.facts(rows)))
    if result.notes:
        parts.append(render.section("Notes", render.indented(result.notes)))
    return parts


def verified(result: "Verified") -> list["RenderableType"]:
    """Return the report, its files and, of a published artifact, how far it was reproduced."""
    from rich.text import Text

    again = [] if result.reproduction is None else reproduction(result.reproduction)
    files = render.facts(
        ("written", str(path)) for path in result.written if path.parent.name != "plots"
    )
    return [*render.report(result.report), Text(), files, *again]


def reverted(result: "Reverted") -> list["RenderableType"]:
    """Return what was restored, and how much of it is the base's to the bit."""
    taken = f"{len(result.edited)} taken from the base ({result.bytes_from_base:,} bytes)"
    absent = f"{', '.join(result.absent)} (an export does not carry them)"
    rows = [
        ("written", f"{result.path} ({result.bytes_written:,} bytes)"),
        ("bit for bit", f"{len(result.equal)} of {len(result.files)} files"),
        ("tensors", f"{taken}, {len(result.removed)} created ones removed"),
        *([("left behind", ", ".join(result.left))] if result.left else []),
        *([("not restored", absent)] if result.absent else []),
        *(("note", note) for note in result.notes),
    ]
    return [render.facts(rows)]


def merged(result: "Merged") -> list["RenderableType"]:
    """Return what a merge wrote."""
    written = result.artifact
    edited = f"{written.bytes_written:,}, of which {written.bytes_edited:,} are edited"
    rows = [
        ("written", str(written.path)),
        ("files", str(len(written.files))),
        ("bytes", edited),
        *(("note", note) for note in result.notes),
    ]
    return [render.facts(rows)]
