"""``bake verify``: the baked model against the same edits as hooks on its base."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.cli.output import KEPT, NOTHING_KEPT, Output
from bake.cli.output import command as bake_command
from bake.cli.request import PATH
from bake.errors import BakeError, UsageError

if TYPE_CHECKING:
    from bake.verify.report import Report
    from bake.verify.serving import Runtimes

RUNTIMES = ("transformers", "peft", "vllm", "llama.cpp")
PARTIAL = ".bake-verify-partial"


@bake_command("verify")
@click.argument("out", type=PATH)
@click.option("--base", metavar="MODEL", help="The base model, where it has moved since.")
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice(RUNTIMES),
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
    "--stream/--no-stream",
    "streamed",
    default=None,
    help="Hold one block in memory at a time; by itself where the model is too large.",
)
@click.option("--device-map", metavar="MAP", help="As transformers takes it, for example auto.")
@click.option("--most-kl", type=float, metavar="SHARE", help="Limit of KL over the effect's KL.")
@click.option("--report", "folder", type=PATH, metavar="DIR", help="Where the report goes: OUT.")
@click.option("--html", is_flag=True, help="Write the report as one page as well.")
@click.option("--plots/--no-plots", default=None, help="Draw the report's plots.")
@click.option("--family", type=PATH, metavar="FILE", help="Your own family table.")
def command(
    output: Output,
    out: Path,
    *,
    runtimes: tuple[str, ...],
    pythons: tuple[str, ...],
    converter: Path | None,
    prompts: Path | None,
    tokens: int | None,
    folder: Path | None,
    html: bool,
    plots: bool | None,
    **options: Any,
) -> None:
    """Measure the artifact OUT against hooks on its base.

    The report goes to verify.json, verify.md and plots/ in OUT. A run that is interrupted is taken
    up by the same command.

    The exit code is 0 when every limit holds, 1 when one does not or the edit has no effect, 4
    when a runtime that was asked for is not installed, and 6 when a plan that says exact measures
    otherwise.
    """
    from bake.cli import render
    from bake.verify.compare import compare

    if html and plots is False:
        raise UsageError("--html and --no-plots exclude each other")
    asked = _runtimes(runtimes, pythons, converter)
    partial = (folder or out) / PARTIAL
    click.get_current_context().meta[KEPT] = lambda: _kept(partial)
    report = compare(
        out,
        prompts=None if prompts is None else _tokens(out, prompts, tokens),
        runtimes=asked,
        longest=tokens,
        progress=output.remark,
        resume=partial,
        **options,
    )
    written = _write(report, folder or out, html=html, plots=plots)
    output.present(
        data=report.to_json,
        view=lambda: [*render.report(report), *_more(report, written)],
        error=_judgement(report),
    )


def _kept(partial: Path) -> str:
    if not partial.is_dir():
        return NOTHING_KEPT
    return f"finished runs are in {partial}; the same command takes them up"


def _runtimes(
    names: tuple[str, ...], pythons: tuple[str, ...], converter: Path | None
) -> "Runtimes | None":
    if not names:
        return None
    from bake.verify.serving import Runtimes

    found: dict[str, Path] = {}
    for text in pythons:
        name, separator, path = text.partition("=")
        if separator and name not in RUNTIMES:
            raise UsageError(
                f"--python names the runtime {name!r}", fix=f"they are {', '.join(RUNTIMES)}"
            )
        chosen = (name,) if separator else names
        found |= {one: Path(path if separator else text) for one in chosen}
    return Runtimes(names=tuple(dict.fromkeys(names)), pythons=found, converter=converter)


def _write(report: "Report", folder: Path, *, html: bool, plots: bool | None) -> tuple[Path, ...]:
    from bake.verify.files import write_report

    return write_report(report, folder, plots=plots, html=html)


def _more(report: "Report", written: tuple[Path, ...]) -> Iterable[Any]:
    """What the table of comparisons leaves out: runtimes, side effects, files."""
    from rich.text import Text

    from bake.cli import render

    if report.runtimes:
        made = render.table("runtime", "version", "status", "why")
        for record in report.runtimes:
            reason = str(record.get("reason", "")).partition("\n")[0]
            made.add_row(
                str(record["runtime"]), str(record.get("version", "")), record["status"], reason
            )
        yield render.section("Runtimes", made)
    if report.effects:
        made = render.table("side effect", "base", "hooked", "baked")
        for name, found in report.effects.items():
            cells = [
                "{value:.4g} ({low:.4g} to {high:.4g})".format(**found[model])
                if model in found
                else ""
                for model in ("base", "hooked", "baked")
            ]
            made.add_row(name, *cells)
        yield render.section("Side effects, with 95 % confidence intervals", made)
    yield Text()
    yield render.facts(("written", str(path)) for path in written if path.parent.name != "plots")


def _judgement(report: "Report") -> BakeError | None:
    from bake.verify.compare import raise_unless_passed

    try:
        raise_unless_passed(report)
    except BakeError as error:
        return error
    if any(record["status"] == "not run" for record in report.runtimes):
        from bake.verify.serving import not_run

        return not_run(report.runtimes)
    return None


def _tokens(out: Path, prompts: Path, longest: int | None) -> list[list[int]]:
    """Return the token ids of every prompt in the file."""
    from bake.verify.prompts import read_prompts

    return [list(prompt) for prompt in read_prompts(prompts, out, longest).tokens]
