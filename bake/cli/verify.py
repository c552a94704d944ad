"""``bake verify``: the baked model against the same edits as hooks on its base."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.cli.options import PATH, run_options, table_options
from bake.cli.output import KEPT, NOTHING_KEPT, Output, bake_command
from bake.errors import UsageError
from bake.verify.runtimes.registry import RUNTIMES, Runtimes

if TYPE_CHECKING:
    from bake.verify.verification import Verification


@bake_command("verify")
@click.argument("out", metavar="ARTIFACT")
@click.option("--base", metavar="MODEL", help="The base model, where it has moved since.")
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice(tuple(RUNTIMES)),
    help="Serve the artifact there as well; may be given again.",
)
@click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="[NAME=]PATH",
    help="The Python of a runtime's environment; of all runtimes without NAME.",
)
@click.option("--converter", type=PATH, metavar="FILE", help="llama.cpp's convert_hf_to_gguf.py.")
@click.option(
    "--prompts",
    type=PATH,
    metavar="FILE",
    help="Text, one prompt a line, or JSONL with prompt, text or messages.",
)
@click.option("--tokens", type=click.IntRange(min=1), help="Compare this many of each prompt.")
@click.option("--generate", type=click.IntRange(min=0), help="Greedy tokens after each prompt.")
@click.option(
    "--score",
    "scores",
    multiple=True,
    metavar="SCORE",
    help="contains:WORD, classifier:MODEL, or a command that reads the texts.",
)
@click.option(
    "--text",
    type=PATH,
    metavar="FILE",
    help="Held-out text for the perplexity, one passage a line.",
)
@click.option(
    "--gate/--no-gate",
    default=True,
    help="Hold side effects against the recipe's [verify.gate], where it has one.",
)
@click.option(
    "--tasks",
    type=PATH,
    metavar="DIR",
    help="Your own tasks of lm-evaluation-harness, which the gate names.",
)
@run_options(gpu="for what is in float32")
@click.option(
    "--as-system",
    is_flag=True,
    help="Hook the edits as their own systems do too: their positions, gates and norms.",
)
@click.option("--most-kl", type=float, metavar="SHARE", help="Limit of KL over the effect's KL.")
@click.option(
    "--report",
    "folder",
    type=PATH,
    metavar="DIR",
    help="Where the report goes: the artifact's folder.",
)
@click.option("--rebake", is_flag=True, help="Export it again and compare every file.")
@click.option("--html", is_flag=True, help="Write the report as one page as well.")
@click.option("--plots/--no-plots", default=None, help="Draw the report's plots.")
@table_options
@click.option("--gguf", type=PATH, metavar="FILE", help="The base's GGUF, where it was edited.")
@click.option("--adapter", type=PATH, metavar="DIR", help="The merged adapter, if it has moved.")
def command(
    output: Output,
    out: str,
    *,
    folder: Path | None,
    html: bool,
    plots: bool | None,
    rebake: bool,
    **options: Any,
) -> None:
    """Measure ARTIFACT against hooks on its base.

    A merge is measured against its adapter in PEFT. The report goes to verify.json, verify.md and
    plots/ in the artifact's folder. A run that is interrupted is taken up by the same command.

    ARTIFACT may be published: owner/name or hf://owner/name@revision. Then it is fetched, its plan
    is made again from the recipe and the base that it names and has to be the recorded one, and
    what is measured is held against what was published. The report goes to ./verify-NAME.

    The exit code is 0 when every limit holds, 1 when one does not or the recipe's gate on side
    effects is not held, 4 when a runtime that was asked for is not installed, 6 when a plan that
    says exact measures otherwise, and 7 when the edit has no effect or no broken bake could have
    failed, which is inconclusive.
    """
    from bake.artifact.staged import runs_of
    from bake.cli.render import results
    from bake.jobs.recorded import find
    from bake.jobs.verifying import ReportFiles, verify

    files = ReportFiles(folder, html, plots, rebake)
    asked = _asked(Path(out), **options)
    source = find(out, weights=True)
    partial = runs_of(files.place(source))
    click.get_current_context().meta[KEPT] = lambda: _kept(partial)
    with output.stages() as stages:
        verified = verify(
            source,
            replace(
                asked,
                artifact=source.folder,
                remark=stages.begin,
                expect=stages.expect,
                resume=partial,
            ),
            files,
            output.bar,
        )
    output.present(
        data=verified.to_json,
        view=lambda: results.verified(verified),
        brief=lambda: results.verified_brief(verified),
        error=verified.failure(),
    )


def _asked(
    artifact: Path,
    *,
    runtimes: tuple[str, ...],
    pythons: tuple[str, ...],
    converter: Path | None,
    tokens: int | None,
    **options: Any,
) -> "Verification":
    from bake.verify.verification import Verification

    places: dict[str, Path] = {}
    for text in pythons:
        name, separator, path = text.partition("=")
        if separator and name not in RUNTIMES:
            raise UsageError(
                f"--python names the runtime {name!r}", fix=f"they are {', '.join(RUNTIMES)}"
            )
        chosen = (name,) if separator else runtimes
        places |= {one: Path(path if separator else text) for one in chosen}
    if not runtimes and (pythons or converter):
        option = "--python" if pythons else "--converter"
        raise UsageError(f"{option} is for a runtime", fix="name it with --runtime")
    named = Runtimes(tuple(dict.fromkeys(runtimes)), places, converter) if runtimes else None
    return Verification(artifact, runtimes=named, longest=tokens, **options)


def _kept(partial: Path) -> str:
    if not any(partial.glob("*.safetensors")):
        return NOTHING_KEPT
    return f"finished runs are in {partial}; the same command takes them up"
