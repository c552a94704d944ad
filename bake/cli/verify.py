"""``bake verify``: the baked model against the same edits as hooks on its base."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.cli.output import KEPT, NOTHING_KEPT, Output
from bake.cli.output import command as bake_command
from bake.cli.recorded import base_of, find
from bake.cli.request import PATH
from bake.errors import BakeError, UsageError
from bake.verify.runtimes.registry import RUNTIMES, Runtimes

if TYPE_CHECKING:
    from bake.cli.published import Record
    from bake.cli.recorded import Source
    from bake.verify.report import Report

PARTIAL = ".bake-verify-partial"


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
    "--stream/--no-stream",
    "streamed",
    default=None,
    help="Hold one block in memory at a time; by itself where the model is too large.",
)
@click.option("--device-map", metavar="MAP", help="As transformers takes it, for example auto.")
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
@click.option("--family", type=PATH, metavar="FILE", help="Your own family table.")
@click.option("--adapter", type=PATH, metavar="DIR", help="The merged adapter, if it has moved.")
def command(
    output: Output,
    out: str,
    *,
    rebake: bool,
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
    """Measure ARTIFACT against hooks on its base.

    A merge is measured against its adapter in PEFT. The report goes to verify.json, verify.md and
    plots/ in the artifact's folder. A run that is interrupted is taken up by the same command.

    ARTIFACT may be published: owner/name or hf://owner/name@revision. Then it is fetched, its plan
    is made again from the recipe and the base that it names and has to be the recorded one, and
    what is measured is held against what was published. The report goes to ./verify-NAME.

    The exit code is 0 when every limit holds, 1 when one does not or the edit has no effect, 4
    when a runtime that was asked for is not installed, and 6 when a plan that says exact measures
    otherwise.
    """
    from bake.cli import render
    from bake.verify.artifact import open_baked
    from bake.verify.compare import compare

    if html and plots is False:
        raise UsageError("--html and --no-plots exclude each other")
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"the report's folder {folder} is a file", fix="name another --report")
    _runtimes(runtimes, pythons, converter)  # before anything is fetched
    source = find(out, weights=True)
    place = folder or (Path(f"verify-{source.short}") if source.published else source.folder)
    if source.published:
        artifact = open_baked(source.folder)
        options["base"] = base_of(source, artifact, options["base"])
        # The one runtime of an adapter that is here wherever bake is.
        runtimes = runtimes or (("peft",) if artifact.kind == "lora" else ())
    asked = _runtimes(runtimes, pythons, converter)
    if asked is None and (pythons or converter):
        option = "--python" if pythons else "--converter"
        raise UsageError(f"{option} is for a runtime", fix="name it with --runtime")
    record = _record_again(source, place, options, rebake=rebake, output=output)
    partial = place / PARTIAL
    click.get_current_context().meta[KEPT] = lambda: _kept(partial)
    report = compare(
        source.folder,
        prompts=prompts,
        runtimes=asked,
        longest=tokens,
        progress=output.remark,
        resume=partial,
        **options,
    )
    # An artifact in the cache is called by its commit there.
    report = replace(report, artifact=source.name) if source.published else report
    written = _write(report, place, html=html, plots=plots)
    if record is not None:
        record = record.beside(report)
        written = (*written, *record.write(place))
    output.present(
        data=lambda: {
            **report.to_json(),
            **({} if record is None else {"reproduction": record.to_json()}),
        },
        view=lambda: [
            *render.report(report),
            *_more(report, written),
            *([] if record is None else record.view()),
        ],
        error=_judgement(report) or (None if record is None else record.failure()),
    )


def _record_again(
    source: "Source", place: Path, options: Mapping[str, Any], *, rebake: bool, output: Output
) -> "Record | None":
    """Return what the record of a published artifact gives again, and of any other when asked."""
    if not source.published and not rebake:
        return None
    from bake.cli.published import record_again

    return record_again(
        source,
        base=options["base"],
        family=options["family"],
        beside=place if rebake else None,
        output=output,
    )


def _kept(partial: Path) -> str:
    if not partial.is_dir():
        return NOTHING_KEPT
    return f"finished runs are in {partial}; the same command takes them up"


def _runtimes(
    names: tuple[str, ...], pythons: tuple[str, ...], converter: Path | None
) -> Runtimes | None:
    if not names:
        return None

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
