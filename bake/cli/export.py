"""``bake export``: the edited checkpoint, or another carrier of the same edit."""

from pathlib import Path
from typing import Any

import click

from bake.artifact.carrier import CARRIERS
from bake.cli.options import (
    DEQUANTIZE,
    FORCE,
    JOBS,
    OUT,
    PATH,
    names_artifact,
    planned_again,
    recipe_options,
)
from bake.cli.output import Output, bake_command
from bake.jobs.request import compile_request

_EXPORT = ("gguf", "llama_cpp", "gguf_type", "outtype", "rounding", "dequantize")
"""What an export is told beyond its plan, each by itself where the command line says nothing."""


@bake_command("export")
@recipe_options
@OUT
@click.option(
    "--to",
    multiple=True,
    metavar="CARRIER",
    help=f"What to write, instead of the recipe's list: {', '.join(CARRIERS)}. May be repeated; "
    "several go to folders below --out.",
)
@click.option("--gguf", type=PATH, metavar="FILE", help="For gguf: the base's GGUF, to be edited.")
@click.option(
    "--llama-cpp",
    type=PATH,
    metavar="DIR",
    help="For gguf: convert the baked checkpoint with this.",
)
@click.option(
    "--gguf-type",
    multiple=True,
    metavar="[PART=]TYPE",
    help="For --gguf: the type of edited tensors, instead of the recipe's: auto, keep, Q8_0 … "
    "For a kind of tensor alone embed=TYPE, head=, writers= or readers=. May be repeated.",
)
@click.option(
    "--outtype",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="For --llama-cpp: the type of the weights.",
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "feedback"]),
    help="feedback cancels what the edit's directions see of rounding errors; it is what --gguf "
    "does, while a checkpoint is rounded to nearest.",
)
@DEQUANTIZE
@FORCE
@JOBS
@click.option("--dry-run", is_flag=True, help="Do everything but write.")
def command(
    output: Output,
    recipe: str,
    out: Path,
    *,
    base: str | None,
    dry_run: bool,
    force: bool,
    **options: Any,
) -> None:
    """Write what RECIPE says to a new folder.

    Untouched tensors keep their bytes, their order and their files. The folder appears when it is
    complete. A run that is interrupted is taken up by the same command.

    For an ARTIFACT (a folder, owner/name or hf://owner/name@revision) the same artifact is made
    again from its record and its base, and its files are compared with the recorded ones. The
    exit code is 1 when one of them differs.
    """
    from bake.artifact.staged import check_before

    check_before(out, force=force)
    if names_artifact(recipe, base):
        _make_again(output, recipe, out, base=base, dry_run=dry_run, force=force, **options)
    else:
        _export(output, Path(recipe), out, dry_run=dry_run, force=force, **options)


def _export(
    output: Output, recipe: Path, out: Path, *, dry_run: bool, force: bool, **options: Any
) -> None:
    """Write what a recipe says, once its plan has been shown."""
    from bake.checkpoints.gguf.storage import storage_words
    from bake.cli.render.pieces import facts
    from bake.cli.render.plans import brief, plan
    from bake.cli.render.results import exported, exported_brief
    from bake.jobs.exporting import export, would_be
    from bake.plan.record import plan_record

    named = {name: options.pop(name) for name in _EXPORT}
    named["gguf_type"] = storage_words(named["gguf_type"], "--gguf-type")
    request = compile_request(recipe, bars=output.bar, **options)
    given = {name: value for name, value in named.items() if value not in (None, False)}
    chosen = request.export(out, force=force, **given)
    refusal = request.refusal(chosen)
    if not output.as_json or refusal is not None:
        output.present(
            data=lambda: {
                **request.provenance(out).to_json(),
                "plan": plan_record(request.plan).to_json(),
            },
            view=lambda: plan(request, verbose=output.verbose > 1),
            # What was written says it again.
            brief=lambda: [facts(brief(request))] if dry_run and refusal is None else [],
            error=refusal,
        )
    if dry_run:
        found = would_be(request, chosen, out)
        output.present(data=lambda: found, view=lambda: _would_be(found))
        return
    output.keeps(out)
    written = export(request, out, chosen, output.bar)
    output.present(
        data=written.to_json,
        view=lambda: exported(written, verbose=output.verbose > 1),
        brief=lambda: exported_brief(written),
    )


def _make_again(
    output: Output,
    text: str,
    out: Path,
    *,
    base: str | None,
    dry_run: bool,
    force: bool,
    **options: Any,
) -> None:
    """Make an artifact again from its record, and compare the files."""
    from bake.cli.render import plans
    from bake.cli.render.pieces import facts
    from bake.cli.render.results import reproduced
    from bake.jobs.reproduce import recorded_options, reproduce
    from bake.plan.record import plan_record

    files = {name: options.pop(name) for name in ("gguf", "llama_cpp")}
    replanned = planned_again(text, base, **options)
    chosen = recorded_options(replanned, out=out, force=force, **files)
    refusal = replanned.failure() or replanned.request.refusal(chosen)
    if not output.as_json or refusal is not None or dry_run:
        output.present(
            data=lambda: {
                "dry_run": dry_run,
                "plan": plan_record(replanned.request.plan).to_json(),
                "again": replanned.to_json(),
            },
            view=lambda: [
                *plans.plan(replanned.request, verbose=output.verbose > 1),
                *plans.again(replanned),
            ],
            brief=lambda: (
                []
                if refusal is not None
                else [facts(plans.brief(replanned.request)), *plans.again(replanned)]
            ),
            error=refusal,
        )
    if dry_run:
        return
    output.keeps(out)
    done = reproduce(replanned, chosen, out, output.bar)
    output.present(
        data=lambda: {
            **done.written.to_json(),
            "plan_digest": replanned.request.plan.digest,
            "again": replanned.to_json(),
            "reproduced": done.to_json(),
        },
        view=lambda: reproduced(done),
        error=done.failure(),
    )


def _would_be(found: dict[str, Any]) -> list[str]:
    lines = [f"\ndry run: {found['out']} would hold {' and '.join(found['carriers'])}"]
    if "weight_bytes" in found:
        lines.append(f"the checkpoint has {found['weight_bytes']:,} bytes of weights")
    return lines
