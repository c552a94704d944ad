"""``bake revert``: from a baked model back to its base."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bake.cli.options import PATH
from bake.cli.output import Output
from bake.cli.output import command as bake_command
from bake.errors import InputError, UsageError

if TYPE_CHECKING:
    from bake.revert.checkpoint import Reverted
    from bake.revert.record import Revertible


@bake_command("revert")
@click.argument("artifact", metavar="OUT")
@click.option("--out", type=PATH, required=True, metavar="DIR", help="The folder to create.")
@click.option(
    "--base",
    metavar="MODEL",
    help="The base: a folder or a Hub id; for a GGUF its file. The recorded one else.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of --base on the Hub.")
@click.option("--force", is_flag=True, help="Replace the artifact of bake that is at --out.")
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
def command(
    output: Output,
    artifact: str,
    out: Path,
    *,
    base: str | None,
    revision: str | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Write the base of the baked model OUT to a new folder.

    OUT is a folder, a download or hf://owner/name. The result is the base's, bit for bit: only
    the edited tensors are read of the base, and every file is compared with the base's by hash.
    """
    from bake.artifact.staged import check_before
    from bake.jobs.recorded import find
    from bake.revert.record import read_revertible

    if revision is not None and base is None:
        raise UsageError("--revision is of --base, which is not named")
    check_before(out, force=force)
    source = find(artifact, weights=True)
    for note in source.notes:
        output.remark(note)
    baked = read_revertible(source.folder)
    if source.published and base is None:
        _refuse_folder(baked, source.name)
    output.keeps(out)
    if baked.record.kind == "gguf":
        if revision is not None:
            raise UsageError("a GGUF file has no revision", fix="leave --revision out")
        _restore_gguf(output, baked, base, out, force=force, dry_run=dry_run)
    else:
        _restore(output, baked, base, revision, out, force=force, dry_run=dry_run)


def _refuse_folder(baked: "Revertible", name: str) -> None:
    """Refuse to look for the base of a stranger's artifact in a folder: it means nothing here."""
    if baked.base_path is not None:
        raise InputError(
            f"the base {baked.record.base.model} is a folder of the machine that the model was "
            "made on",
            where=name,
            fix="name it with --base MODEL",
        )


def _restore(
    output: Output,
    baked: "Revertible",
    named: str | None,
    revision: str | None,
    out: Path,
    *,
    force: bool,
    dry_run: bool,
) -> None:
    from bake.revert.base import open_base
    from bake.revert.checkpoint import base_hashes, prepare_revert, revert_checkpoint

    base = open_base(baked, named, revision)
    output.remark(f"the base is {base.checkpoint.source}")
    with output.bar("checking the base") as move:
        plan = prepare_revert(baked, base, move)
    if dry_run:
        _present_dry(output, out, plan.edited_bytes, base.checkpoint.source)
        return
    with output.bar("reading the base") as move:
        stated = base_hashes(plan, move)
    with output.bar(f"writing {out.name}") as move:
        made = revert_checkpoint(plan, out, stated=stated, force=force, progress=move)
    _present_restored(output, made)


def _restore_gguf(
    output: Output,
    baked: "Revertible",
    named: str | None,
    out: Path,
    *,
    force: bool,
    dry_run: bool,
) -> None:
    from bake.revert.gguf import prepare_gguf_revert, revert_gguf

    if named is None:
        raise UsageError(
            "a GGUF is reverted to the file that it was made of, which its record does not locate",
            fix="name it with --base FILE.gguf",
        )
    plan = prepare_gguf_revert(baked, Path(named))
    if dry_run:
        _present_dry(output, out, plan.edited_bytes, named)
        return
    with output.bar(f"writing {out.name}") as move:
        made = revert_gguf(plan, out, force=force, progress=move)
    _present_restored(output, made)


def _present_dry(output: Output, out: Path, size: int, base: str) -> None:
    output.present(
        data=lambda: {
            "dry_run": True,
            "out": str(out),
            "base": base,
            "bytes_from_base": size,
        },
        view=lambda: [f"dry run: {out} would be restored with {size:,} bytes of tensors of {base}"],
    )


def _present_restored(output: Output, made: "Reverted") -> None:
    from bake.cli import render

    equal, files = len(made.equal), len(made.files)
    data = {
        "kind": "reverted",
        "path": str(made.path),
        "files": dict(made.files),
        "bit_for_bit": made.bit_for_bit,
        "compared": sorted(made.equal),
        "edited": list(made.edited),
        "removed": list(made.removed),
        "bytes_written": made.bytes_written,
        "bytes_from_base": made.bytes_from_base,
        "left": list(made.left),
        "absent": list(made.absent),
        "notes": list(made.notes),
    }
    taken = f"{len(made.edited)} taken from the base ({made.bytes_from_base:,} bytes)"
    rows = [
        ("written", f"{made.path} ({made.bytes_written:,} bytes)"),
        ("bit for bit", f"{equal} of {files} files"),
        ("tensors", f"{taken}, {len(made.removed)} created ones removed"),
        *_others(made),
        *(("note", note) for note in made.notes),
    ]
    output.present(data=lambda: data, view=lambda: [render.facts(rows)])


def _others(made: "Reverted") -> list[tuple[str, str]]:
    rows = []
    if made.left:
        rows.append(("left behind", ", ".join(made.left)))
    if made.absent:
        rows.append(("not restored", f"{', '.join(made.absent)} (an export does not carry them)"))
    return rows
