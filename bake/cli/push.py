"""``bake push``: an artifact as one guarded commit on the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.cli.check import passphrase_of
from bake.cli.options import PATH
from bake.cli.output import KEPT, Output, bake_command

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bake.artifact.destination import Pushed


@bake_command("push")
@click.argument("out", type=PATH)
@click.argument("repo", metavar="OWNER/NAME")
@click.option(
    "--record",
    is_flag=True,
    help="OUT is a verification of what is published as OWNER/NAME: add it there.",
)
@click.option("--revision", default="main", metavar="BRANCH", help="Commit to this branch.")
@click.option("--public", is_flag=True, help="Make the repository public, as the last step.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
@click.option("--unverified", is_flag=True, help="Publish without a verification that passed.")
@click.option(
    "--ungated",
    is_flag=True,
    help="Publish although the recipe's gate on side effects is not held.",
)
@click.option("--no-card", is_flag=True, help="Publish without README.md.")
@click.option("--force-card", is_flag=True, help="Replace a card that was edited on the Hub.")
@click.option(
    "--verify-download",
    is_flag=True,
    help="Download everything again and compare it, before the tag and the public view.",
)
@click.option(
    "--sign", "key", type=PATH, metavar="KEY", help="Sign the artifact with this private key."
)
@click.option(
    "--allow",
    multiple=True,
    metavar="WHAT",
    help="licence: its terms are met; paths: home folders in texts; code: Python files.",
)
@click.option(
    "--timeout", type=float, default=120.0, metavar="SECONDS", help="For one answer of the Hub."
)
def command(output: Output, out: Path, repo: str, **given: Any) -> None:
    """Publish OUT as OWNER/NAME, in one commit.

    The artifact is checked first: names, contents, licence, verification. A new repository is
    private. The commit happens as a whole or not at all, and is compared with the files here. The
    same command again takes up a run that was interrupted, and changes nothing when all is there.
    """
    from bake.artifact.destination import Destination
    from bake.publish.follow_up import push_record
    from bake.publish.options import PushOptions
    from bake.publish.preflight import Terms
    from bake.publish.push import push

    options = PushOptions(
        to=Destination(repo, given["revision"], given["public"], given["create_pr"]),
        terms=Terms(
            frozenset(given["allow"]),
            unverified=given["unverified"],
            ungated=given["ungated"],
            no_card=given["no_card"],
        ),
        dry_run=given["dry_run"],
        download=given["verify_download"],
        key=given["key"],
        passphrase=passphrase_of(given["key"]),
        force_card=given["force_card"],
        timeout=given["timeout"],
    )
    click.get_current_context().meta[KEPT] = lambda: (
        "the same command takes the upload up; nothing is public that was not"
    )
    with output.bar(f"reading {out.name}") as move:
        if given["record"]:
            pushed = push_record(out, options, remark=output.remark)
        else:
            pushed = push(out, options, progress=move, remark=output.remark)
    output.present(data=pushed.to_json, view=lambda: _view(pushed))


def _view(pushed: "Pushed") -> list["RenderableType"]:
    from bake.cli.render.pieces import facts, listed

    would = "would be " if pushed.dry_run else ""
    rows = [
        ("repository", f"{pushed.endpoint}/{pushed.repo}"),
        ("visibility", would + ("public" if pushed.public else "private")),
        ("against hooks", "verified" if pushed.unverified is None else pushed.unverified),
        *([("gate", f"not held: {pushed.ungated}")] if pushed.ungated is not None else []),
        *([("download", _compared(pushed))] if pushed.outcome else []),
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
    return [facts(rows), *listed("Notes", pushed.notes)]


def _compared(pushed: "Pushed") -> str:
    from bake.artifact.destination import VERIFIED

    if pushed.outcome == VERIFIED:
        return "every byte is what was sent"
    return "not compared; --verify-download does that"
