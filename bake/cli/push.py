"""``bake push``: an artifact as one guarded commit on the Hub."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bake.cli.output import KEPT, Output
from bake.cli.output import command as bake_command
from bake.cli.request import PATH

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bake.publish.destination import Pushed


@bake_command("push")
@click.argument("out", type=PATH)
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--revision", default="main", metavar="BRANCH", help="Commit to this branch.")
@click.option("--public", is_flag=True, help="Make the repository public, as the last step.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
@click.option("--unverified", is_flag=True, help="Publish without a verification that passed.")
@click.option("--no-card", is_flag=True, help="Publish without README.md.")
@click.option(
    "--allow",
    multiple=True,
    metavar="WHAT",
    help="licence: its terms are met; paths: home folders in texts; code: Python files.",
)
@click.option(
    "--timeout", type=float, default=120.0, metavar="SECONDS", help="For one answer of the Hub."
)
def command(
    output: Output,
    out: Path,
    repo: str,
    *,
    revision: str,
    public: bool,
    create_pr: bool,
    dry_run: bool,
    unverified: bool,
    no_card: bool,
    allow: tuple[str, ...],
    timeout: float,
) -> None:
    """Publish OUT as OWNER/NAME, in one commit.

    The artifact is checked first: names, contents, licence, verification. A new repository is
    private. The commit happens as a whole or not at all, and is compared with the files here. The
    same command again takes up a run that was interrupted, and changes nothing when all is there.
    """
    from bake.cli import render
    from bake.publish.destination import Destination
    from bake.publish.preflight import Terms
    from bake.publish.push import push

    to = Destination(repo, revision, public, create_pr)
    terms = Terms(frozenset(allow), unverified, no_card)
    _quieten(visible=not output.quiet and not output.as_json)
    click.get_current_context().meta[KEPT] = lambda: (
        "the same command takes the upload up; nothing is public that was not"
    )
    with render.progress(f"reading {out.name}", visible=not output.quiet) as move:
        pushed = push(
            out,
            to,
            terms,
            dry_run=dry_run,
            timeout=timeout,
            progress=move,
            remark=output.remark,
        )
    output.present(data=pushed.to_json, view=lambda: _view(pushed))


def _quieten(*, visible: bool) -> None:
    """Leave the client's own progress bars to terminals."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not (visible and sys.stderr.isatty()):
        disable_progress_bars()


def _view(pushed: "Pushed") -> list["RenderableType"]:
    from bake.cli import render

    would = "would be " if pushed.dry_run else ""
    rows = [
        ("repository", f"{pushed.endpoint}/{pushed.repo}"),
        ("visibility", would + ("public" if pushed.public else "private")),
        *([("commit", pushed.commit)] if pushed.commit else []),
        *([("pull request", pushed.pull_request)] if pushed.pull_request else []),
        *([("tag", pushed.tag)] if pushed.tag else []),
        ("digest", pushed.digest),
    ]
    if pushed.unchanged:
        rows.append(("files", "all of them are there already"))
    for verb, names in (
        ("uploaded", pushed.uploaded),
        ("copied", pushed.copied),
        ("deleted", pushed.deleted),
    ):
        if names:
            rows.append((f"{would}{verb}", ", ".join(names)))
    parts: list[RenderableType] = [render.facts(rows)]
    if pushed.notes:
        parts.append(render.section("Notes", render.indented(pushed.notes)))
    return parts
