"""``bake export``: the edited checkpoint, or another carrier of the same edit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.cli.output import KEPT, NOTHING_KEPT, Output
from bake.cli.output import command as bake_command
from bake.cli.request import PATH, Request, compile_request, recipe_options
from bake.errors import UsageError

if TYPE_CHECKING:
    from bake.outputs import Artifact
    from bake.outputs.carry import Options


@bake_command("export")
@recipe_options
@click.option("--out", type=PATH, required=True, metavar="DIR", help="The folder to create.")
@click.option(
    "--to",
    multiple=True,
    metavar="CARRIER",
    help="What to write, instead of the recipe's list: checkpoint, lora, gguf-lora, "
    "control-vector or gguf. May be repeated; several go to folders below --out.",
)
@click.option("--gguf", type=PATH, metavar="FILE", help="For gguf: the base's GGUF, to be edited.")
@click.option(
    "--llama-cpp",
    type=PATH,
    metavar="DIR",
    help="For gguf: convert the baked checkpoint with this.",
)
@click.option(
    "--edited-type", metavar="TYPE", help="For --gguf: the type of edited tensors; their own else."
)
@click.option(
    "--outtype",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    default="f16",
    help="For --llama-cpp: the type of the weights.",
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "feedback"]),
    default="feedback",
    help="For --gguf: feedback keeps the edit, where nearest loses most of it in few bits.",
)
@click.option("--force", is_flag=True, help="Replace the artifact of bake that is at --out.")
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
def command(
    output: Output,
    recipe: Path,
    out: Path,
    *,
    dry_run: bool,
    force: bool,
    gguf: Path | None,
    llama_cpp: Path | None,
    edited_type: str | None,
    outtype: str,
    rounding: str,
    **options: Any,
) -> None:
    """Write what RECIPE says to a new folder.

    Untouched tensors keep their bytes, their order and their files. The folder appears when it is
    complete. A run that is interrupted is taken up by the same command.
    """
    from bake.cli import render
    from bake.outputs.carry import Options
    from bake.plan.record import plan_record

    check_out(out, force=force)
    request = compile_request(recipe, **options)
    chosen = Options(
        allow=frozenset(request.recipe.export.allow),
        force=force,
        gguf=gguf,
        llama_cpp=llama_cpp,
        edited_type=edited_type,
        outtype=outtype,
        rounding=rounding,
    )
    refusal = request.refusal(chosen)
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
            view=lambda: [f"\ndry run: a checkpoint at {out} would hold {size:,} bytes of weights"],
        )
        return
    made = _write_all(request, out, chosen, output)
    output.present(
        data=lambda: (
            _data(made[0], request)
            if len(made) == 1
            else {"artifacts": [_data(artifact, request) for artifact in made]}
        ),
        view=lambda: [
            part
            for artifact in made
            for part in render.artifact(artifact, request, verbose=output.verbose)
        ],
    )


def _data(made: "Artifact", request: Request) -> dict[str, Any]:
    return {
        "kind": made.kind,
        "path": str(made.path),
        "files": dict(made.files),
        "bytes_written": made.bytes_written,
        "bytes_edited": made.bytes_edited,
        "plan_digest": request.plan.digest,
    }


def check_out(out: Path, *, force: bool) -> None:
    """Refuse an output that is in the way before anything is read or downloaded."""
    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists and is not empty", fix="name another output, or use --force"
        )


def _write_all(request: Request, out: Path, options: "Options", output: Output) -> list["Artifact"]:
    """Write every carrier: a single one to ``out``, several to folders of their names below it."""
    from bake.checkpoints import open_checkpoint
    from bake.cli import render
    from bake.outputs.carry import write

    checkpoint, carriers = request.checkpoint, request.recipe.export.to
    if not checkpoint.complete:
        # The plan needed headers only; the files are fetched once it is known to be exact.
        base = request.recipe.base
        checkpoint = open_checkpoint(base.source, revision=checkpoint.revision, complete=True)
    made = []
    for carrier in carriers:
        place = out if len(carriers) == 1 else out / carrier
        place.parent.mkdir(parents=True, exist_ok=True)
        click.get_current_context().meta[KEPT] = kept_at(place)
        with render.progress(f"writing {place.name}", visible=not output.quiet) as move:
            made.append(
                write(
                    carrier,
                    request.plan,
                    checkpoint,
                    place,
                    record=request.record(place),
                    options=options,
                    progress=move,
                )
            )
    return made


def kept_at(out: Path) -> Callable[[], str]:
    """Return what says, after an interrupt, what of an output is kept."""
    return partial(_kept, out)


def _kept(out: Path) -> str:
    unfinished = out.absolute().with_name(f".{out.name}.bake-partial")
    if not unfinished.exists():
        return NOTHING_KEPT
    return (
        f"{out} was not written; finished files are in {unfinished}; the same command takes them up"
    )
