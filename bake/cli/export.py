"""``bake export``: the edited checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.cli.output import KEPT, NOTHING_KEPT, Output
from bake.cli.output import command as bake_command
from bake.cli.request import PATH, Request, compile_request, recipe_options
from bake.errors import UsageError

if TYPE_CHECKING:
    from bake.outputs import Artifact


@bake_command("export")
@recipe_options
@click.option("--out", type=PATH, required=True, metavar="DIR", help="The folder to create.")
@click.option("--to", multiple=True, metavar="OUTPUT", help="What to write: checkpoint.")
@click.option("--force", is_flag=True, help="Replace the checkpoint that is at --out.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
def command(
    output: Output, recipe: Path, out: Path, *, force: bool, dry_run: bool, **options: Any
) -> None:
    """Write what RECIPE says to a new folder.

    Untouched tensors keep their bytes, their order and their files. The folder appears when it is
    complete. A run that is interrupted is taken up by the same command.
    """
    from bake.cli import render
    from bake.plan.record import plan_record

    _check_out(out, force=force)
    request = compile_request(recipe, **options)
    refusal = request.refusal()
    if not output.as_json or refusal is not None:
        output.present(
            data=lambda: {**request.record(out), "plan": plan_record(request.plan)},
            view=lambda: render.plan(request, verbose=output.verbose),
            error=refusal,
        )
    if dry_run:
        size = sum(info.nbytes for info in request.checkpoint.tensors.values())
        size += request.plan.created_bytes
        output.present(
            data=lambda: {"dry_run": True, "out": str(out), "weight_bytes": size},
            view=lambda: [f"\ndry run: {out} would hold {size:,} bytes of weights"],
        )
        return
    made = _write(request, out, force=force, output=output)
    output.present(
        data=lambda: {
            "kind": made.kind,
            "path": str(made.path),
            "files": dict(made.files),
            "bytes_written": made.bytes_written,
            "bytes_edited": made.bytes_edited,
            "plan_digest": request.plan.digest,
        },
        view=lambda: render.artifact(made, request, verbose=output.verbose),
    )


def _check_out(out: Path, *, force: bool) -> None:
    """Refuse an output that is in the way before anything is read or downloaded."""
    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists and is not empty", fix="name another output, or use --force"
        )


def _write(request: Request, out: Path, *, force: bool, output: Output) -> "Artifact":
    from bake.checkpoints import open_checkpoint
    from bake.cli import render
    from bake.outputs.checkpoint import export_checkpoint

    checkpoint = request.checkpoint
    if not checkpoint.complete:
        # The plan needed headers only; the files are fetched once it is known to be exact.
        base = request.recipe.base
        checkpoint = open_checkpoint(base.source, revision=checkpoint.revision, complete=True)
    click.get_current_context().meta[KEPT] = lambda: _kept(out)
    with render.progress(f"writing {out.name}", visible=not output.quiet) as move:
        return export_checkpoint(
            request.plan,
            checkpoint,
            out,
            record=request.record(out),
            allow=frozenset(request.recipe.export.allow),
            force=force,
            progress=move,
        )


def _kept(out: Path) -> str:
    partial = out.absolute().with_name(f".{out.name}.bake-partial")
    if not partial.exists():
        return NOTHING_KEPT
    return f"{out} was not written; finished files are in {partial}; the same command takes them up"
