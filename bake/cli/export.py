"""``bake export``: the edited checkpoint, or another carrier of the same edit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.cli.output import KEPT, NOTHING_KEPT, Output
from bake.cli.output import command as bake_command
from bake.cli.recorded import find, is_artifact, plan_again, refuse_overrides
from bake.cli.request import PATH, Request, compile_request, recipe_options
from bake.errors import UsageError

if TYPE_CHECKING:
    from bake.artifact import Artifact
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
    recipe: str,
    out: Path,
    *,
    base: str | None,
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

    For an ARTIFACT (a folder, owner/name or hf://owner/name@revision) the same artifact is made
    again from its record and its base, and its files are compared with the recorded ones. The
    exit code is 1 when one of them differs.
    """
    from bake.cli import render
    from bake.outputs.carry import Options
    from bake.plan.record import plan_record

    check_out(out, force=force)
    if is_artifact(recipe):
        _make_again(
            output, recipe, out, base, dry_run, force, gguf, llama_cpp, **options, **_given()
        )
        return
    if base is not None:
        raise UsageError("--base is for artifacts", fix="a recipe takes another model with --model")
    request = compile_request(Path(recipe), visible=not output.quiet, **options)
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
        _say_what_would_be(request, out, chosen, output)
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


def _given() -> dict[str, Any]:
    """Return the options of a GGUF that the command line gives, which have defaults."""
    context = click.get_current_context()
    names = ("edited_type", "outtype", "rounding")
    return {n: context.params[n] for n in names if _is_given(context, n)}


def _is_given(context: click.Context, name: str) -> bool:
    from click.core import ParameterSource

    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _make_again(
    output: Output,
    text: str,
    out: Path,
    base: str | None,
    dry_run: bool,
    force: bool,
    gguf: Path | None,
    llama_cpp: Path | None,
    *,
    family: Path | None,
    **options: Any,
) -> None:
    """Make an artifact again from its record, and compare the files."""
    from bake.cli import plan, render
    from bake.cli.reproduce import recorded_options, reproduce, view
    from bake.plan.record import plan_record

    refuse_overrides(options, fix="name the base with --base, where it has moved")
    again = plan_again(find(text, weights=False), base=base, family=family)
    chosen = recorded_options(again, out=out, gguf=gguf, llama_cpp=llama_cpp, force=force)
    request = again.request
    refusal = again.failure() or request.refusal(chosen)
    if not output.as_json or refusal is not None or dry_run:
        output.present(
            data=lambda: {
                "dry_run": dry_run,
                "plan": plan_record(request.plan),
                "again": again.to_json(),
            },
            view=lambda: [
                *render.plan(request, verbose=output.verbose),
                *plan.view(again),
            ],
            error=refusal,
        )
    if dry_run:
        return
    done = reproduce(again, out, chosen, output)
    output.present(
        data=lambda: {
            **_data(done.made, request),
            "again": again.to_json(),
            "reproduced": done.to_json(),
        },
        view=lambda: view(done),
        error=done.failure(),
    )


def _say_what_would_be(request: Request, out: Path, options: "Options", output: Output) -> None:
    """Print what an export would write, once everything but writing has been tried."""
    from bake.outputs.carry import check

    carriers = request.recipe.export.to
    for carrier in carriers:
        check(carrier, request.plan, request.checkpoint, options)
    data: dict[str, Any] = {"dry_run": True, "out": str(out), "carriers": list(carriers)}
    lines = [f"\ndry run: {out} would hold {' and '.join(carriers)}"]
    if "checkpoint" in carriers:
        size = sum(info.nbytes for info in request.checkpoint.tensors.values())
        data["weight_bytes"] = size = size + request.plan.created_bytes
        lines += [f"the checkpoint has {size:,} bytes of weights"]
    output.present(data=lambda: data, view=lambda: lines)


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
    """Write every carrier: one to ``out``, several to folders of their names in it, or none."""
    from bake.checkpoints import open_checkpoint
    from bake.cli import render
    from bake.outputs.carry import write

    checkpoint, carriers = request.checkpoint, request.recipe.export.to
    if not checkpoint.complete:
        # The plan needed headers only; the files are fetched once it is known to be exact.
        base = request.recipe.base
        checkpoint = open_checkpoint(base.source, revision=checkpoint.revision, complete=True)
    meta = click.get_current_context().meta
    if len(carriers) > 1:
        from bake.outputs.several import write_several

        meta[KEPT] = kept_at(out, "several")
        return list(
            write_several(
                carriers,
                request.plan,
                checkpoint,
                out,
                record=lambda place: _record(request, place.name, options, place),
                options=options,
                bar=lambda name: render.progress(f"writing {name}", visible=not output.quiet),
            )
        )
    meta[KEPT] = kept_at(out)
    with render.progress(f"writing {out.name}", visible=not output.quiet) as move:
        made = write(
            carriers[0],
            request.plan,
            checkpoint,
            out,
            record=_record(request, carriers[0], options, out),
            options=options,
            progress=move,
        )
    return [made]


def _record(request: Request, carrier: str, options: "Options", out: Path) -> dict[str, Any]:
    """Return what the record keeps of the request, and of the options that decide this carrier."""
    from bake.cli.reproduce import export_record

    return {**request.record(out), **export_record(carrier, options, out)}


def kept_at(out: Path, kind: str = "partial") -> Callable[[], str]:
    """Return what says, after an interrupt, what of an output is kept."""
    return partial(_kept, out, kind)


def _kept(out: Path, kind: str) -> str:
    unfinished = out.absolute().with_name(f".{out.name}.bake-{kind}")
    if not unfinished.exists():
        return NOTHING_KEPT
    return (
        f"{out} was not written; finished files are in {unfinished}; the same command takes them up"
    )
