"""What an export wrote, what a verification measured, and what an artifact of directions holds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bake.cli.render.pieces import facts, section, table
from bake.cli.render.rounding import rounding
from bake.cli.render.tensors import changed_tensors

if TYPE_CHECKING:
    from bake.artifact import Artifact
    from bake.artifact.schema import GgufTensor
    from bake.checkpoints import Checkpoint
    from bake.directions import Directions
    from bake.directions.describe import Row
    from bake.plan import Plan
    from bake.verify.report import Report


def artifact(
    written: "Artifact",
    planned: "Plan",
    checkpoint: "Checkpoint",
    measured: "Sequence[GgufTensor]",
    *,
    verbose: bool,
) -> list[RenderableType]:
    """Return what an export wrote. Of the base only a checkpoint has copies, byte for byte.

    Args:
        written: the artifact.
        planned: its plan.
        checkpoint: the base.
        measured: what rounding did to tensors of a GGUF, where it did.
        verbose: a row for every tensor and file.
    """
    listed = [
        ("written", str(written.path)),
        ("carrier", written.kind),
        ("size", f"{written.bytes_written:,} bytes in {len(written.files)} files"),
    ]
    if written.kind == "checkpoint":
        rows = changed_tensors(planned, checkpoint)
        edited = sum(row.nbytes for row in rows if not row.new)
        new = sum(row.nbytes for row in rows if row.new)
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        listed += [
            ("copied", f"{total - edited:,} bytes of tensors, as they were"),
            ("edited", f"{edited:,} bytes of tensors"),
            *([("new", f"{new:,} bytes of tensors")] if new else []),
        ]
    if measured:
        edits = f"{written.bytes_edited:,} bytes of tensors; the others as they were"
        listed.append(("edited", edits))
    parts: list[RenderableType] = [Text(), facts(listed), *rounding(measured, verbose=verbose)]
    if verbose:
        files = table("file", "sha256")
        for name, digest in written.files.items():
            files.add_row(name, digest.removeprefix("sha256:"))
        parts.append(section("Files", files))
    return parts


def directions(artifact: "Directions", rows: Sequence["Row"]) -> list[RenderableType]:
    """Return what an artifact holds, one row per tensor."""
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
    return parts


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


def report(measured: "Report") -> list[RenderableType]:
    """Return what a verification measured."""
    from bake.verify.tables import FAIL, NUMBERS, PASS, tables

    verdicts = {PASS: Text(PASS, "green"), FAIL: Text(FAIL, "bold red")}
    sections = []
    for words in tables(measured):
        body = table(*words.head, right=NUMBERS)
        for row in words.rows:
            body.add_row(*(verdicts.get(cell, cell) for cell in row))
        sections.append(section(", ".join(filter(None, (words.title, words.note))), body))
    outcome = Text("passed", "bold green") if measured.passed else Text("failed", "bold red")
    return [
        facts(
            [
                ("artifact", measured.artifact),
                ("base", measured.base),
                ("plan", f"{measured.exactness}, {measured.plan_digest}"),
                ("stored in", measured.dtype),
            ]
        ),
        *sections,
        Text(),
        facts(
            [
                ("verification", outcome),
                ("run with", ", ".join(f"{k} {v}" for k, v in measured.environment.items())),
            ]
        ),
    ]
