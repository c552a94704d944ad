"""``bake card``: the model card of an artifact, from its records, or a check of the one it has."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.cli.options import PATH
from bake.cli.output import Output, bake_command
from bake.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bake.artifact.names import Problem


@bake_command("card")
@click.argument("out", type=PATH)
@click.option("--repo", metavar="OWNER/NAME", help="What the artifact is, or will be, on the Hub.")
@click.option("--out", "file", type=PATH, metavar="FILE", help="Write here, not to OUT/README.md.")
@click.option("--check", is_flag=True, help="Check the card that is there, and write nothing.")
@click.option(
    "--force", is_flag=True, help="Replace a card that bake did not write, or was edited."
)
def command(
    output: Output, out: Path, *, repo: str | None, file: Path | None, check: bool, force: bool
) -> None:
    """Write the model card of OUT from bake.json and verify.json.

    Every number in it is one of theirs; what they do not hold is left out, or said to be not
    measured. The card is then checked: metadata, links, private paths, and each number against the
    records. --check does this alone, to a card that was edited since.
    """
    from bake.artifact.names import CARD
    from bake.cards.card import check_card, lint_card, render_card, save_card

    if check:
        for option, given in (("--out", file), ("--repo", repo), ("--force", force)):
            if given:
                raise UsageError(f"--check and {option} exclude each other")
        _present(output, out, out / CARD, check_card(out), written=None)
        return
    text = render_card(out, repo=repo)
    target = out / CARD if file is None else file
    problems = lint_card(text, out)
    if not problems:
        save_card(text, target, force=force)
    _present(output, out, target, problems, written=not problems)


def _present(
    output: Output,
    out: Path,
    card: Path,
    problems: tuple["Problem", ...],
    *,
    written: bool | None,
) -> None:
    """Print what came of it; ``written`` is None where only a check was asked for."""
    from bake.cards.card import card_notes
    from bake.cli.render.pieces import facts, listed
    from bake.seal.seal import as_error

    notes = card_notes(out)

    def data() -> dict[str, Any]:
        return {
            "card": str(card),
            "written": bool(written),
            "problems": [str(problem) for problem in problems],
            "notes": list(notes),
        }

    def view() -> Iterable["RenderableType"]:
        rows = [
            ("card", str(card)),
            *([] if written is None else [("written", "yes" if written else "no")]),
            ("problems", str(len(problems)) if problems else "none"),
        ]
        return [facts(rows), *listed("Notes", notes)]

    output.present(data=data, view=view, error=as_error(problems, str(card)))
