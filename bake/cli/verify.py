"""``bake verify``: the baked model against the same edits as hooks on its base."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bake.cli.output import Output
from bake.cli.output import command as bake_command
from bake.cli.request import PATH
from bake.errors import BakeError, InputError

if TYPE_CHECKING:
    from bake.verify.report import Report


@bake_command("verify")
@click.argument("out", type=PATH)
@click.option("--base", metavar="MODEL", help="The base model, where it has moved since.")
@click.option(
    "--prompts",
    type=PATH,
    metavar="FILE",
    help="One prompt a line, for the artifact's own tokenizer; random tokens otherwise.",
)
@click.option("--family", type=PATH, metavar="FILE", help="Your own family table.")
def command(
    output: Output, out: Path, *, base: str | None, prompts: Path | None, family: Path | None
) -> None:
    """Measure the baked checkpoint OUT against hooks on its base.

    The exit code is 0 when every limit holds, 1 when the edit has no effect, and 6 when a plan
    that says exact measures otherwise.
    """
    from bake.cli import render
    from bake.verify.compare import compare

    report = compare(
        out,
        base=base,
        prompts=None if prompts is None else _tokens(out, prompts),
        family=family,
        progress=output.remark,
    )
    output.present(
        data=report.to_json, view=lambda: render.report(report), error=_judgement(report)
    )


def _judgement(report: "Report") -> BakeError | None:
    from bake.verify.compare import raise_unless_passed

    try:
        raise_unless_passed(report)
    except BakeError as error:
        return error
    return None


def _tokens(out: Path, prompts: Path) -> list[list[int]]:
    """Return the token ids of every line that is not empty."""
    from transformers import AutoTokenizer

    try:
        lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prompts cannot be read: {error}", where=str(prompts)) from error
    if not lines:
        raise InputError("the file holds no prompt", where=str(prompts), fix="write one a line")
    try:
        tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            "the artifact has no tokenizer that transformers loads",
            where=str(out),
            why=str(error).partition("\n")[0],
            fix="leave --prompts out to measure on random tokens",
        ) from error
    return [tokenizer(line)["input_ids"] for line in lines]
