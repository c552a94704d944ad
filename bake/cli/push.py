"""``bake push``: an artifact as one guarded commit on the Hub."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.cli.check import passphrase_of
from bake.cli.output import KEPT, Output
from bake.cli.output import command as bake_command
from bake.cli.request import PATH
from bake.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bake.artifact.destination import Destination, Pushed
    from bake.publish.low_disk import Work


@bake_command("push")
@click.argument("out", type=PATH)
@click.argument("repo", metavar="OWNER/NAME")
@click.option(
    "--low-disk",
    is_flag=True,
    help="OUT is a recipe: bake and send one shard at a time, on a disk that holds no model.",
)
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
@click.option("--no-card", is_flag=True, help="Publish without README.md.")
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
    help="licence: its terms are met; paths: home folders in texts; code: Python files. "
    "With --low-disk also what `bake export --allow` takes.",
)
@click.option("--model", metavar="MODEL", help="With --low-disk: edit this model instead.")
@click.option("--family", type=PATH, metavar="FILE", help="With --low-disk: your own family table.")
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
    low_disk: bool,
    record: bool,
    verify_download: bool,
    key: Path | None,
    allow: tuple[str, ...],
    model: str | None,
    family: Path | None,
    timeout: float,
) -> None:
    """Publish OUT as OWNER/NAME, in one commit.

    The artifact is checked first: names, contents, licence, verification. A new repository is
    private. The commit happens as a whole or not at all, and is compared with the files here. The
    same command again takes up a run that was interrupted, and changes nothing when all is there.
    """
    from bake.artifact.destination import Destination
    from bake.cli import render
    from bake.publish.preflight import ALLOWANCES, Terms

    _check_options(
        low_disk=low_disk,
        record=record,
        dry_run=dry_run,
        sign=key is not None,
        recipe=model is not None or family is not None,
    )
    inexact = tuple(word for word in allow if word not in ALLOWANCES) if low_disk else ()
    to = Destination(repo, revision, public, create_pr)
    terms = Terms(frozenset(allow) - frozenset(inexact), unverified, no_card)
    _quieten(visible=not output.quiet and not output.as_json)
    click.get_current_context().meta[KEPT] = lambda: (
        "the same command takes the upload up; nothing is public that was not"
    )
    passphrase = passphrase_of(key)
    shared: dict[str, Any] = {"timeout": timeout, "remark": output.remark}
    with render.progress(f"reading {out.name}", visible=not output.quiet) as move:
        if low_disk:
            from bake.publish.low_disk import push_low_disk, refuse_at_once

            refuse_at_once(to, terms)
            work = _work(out, to, model=model, family=family, allow=inexact)
            pushed = push_low_disk(
                work, to, terms, download=verify_download, progress=move, **shared
            )
        elif record:
            from bake.publish.follow_up import push_record

            pushed = push_record(out, to, terms, download=verify_download, **shared)
        else:
            from bake.publish.push import push

            pushed = push(
                out,
                to,
                terms,
                dry_run=dry_run,
                download=verify_download,
                key=key,
                passphrase=lambda: passphrase,
                progress=move,
                **shared,
            )
    output.present(data=pushed.to_json, view=lambda: _view(pushed))


def _check_options(
    *, low_disk: bool, record: bool, dry_run: bool, sign: bool, recipe: bool
) -> None:
    """Refuse options that contradict each other.

    Raises:
        UsageError: naming the pair.
    """
    if low_disk and record:
        raise UsageError("--low-disk and --record exclude each other")
    if low_disk and dry_run:
        raise UsageError(
            "--low-disk has no --dry-run: what would be sent is known once it is baked",
            fix="`bake plan RECIPE` says which tensors change",
        )
    if (low_disk or record) and sign:
        raise UsageError(
            "--sign needs every file in one place, and --low-disk and --record do not have them",
            fix="publish without, download the repository, and push that with --sign",
        )
    if record and dry_run:
        raise UsageError("--record has no --dry-run")
    if recipe and not low_disk:
        raise UsageError("--model and --family are for --low-disk, which bakes a recipe")


def _work(
    recipe: Path,
    to: "Destination",
    *,
    model: str | None,
    family: Path | None,
    allow: tuple[str, ...],
) -> "Work":
    """Compile a recipe for a push that bakes as it goes."""
    from bake.cli.request import compile_request
    from bake.publish.low_disk import Work

    if recipe.is_dir():
        raise UsageError(f"{recipe} is a folder", fix="--low-disk takes the recipe")
    request = compile_request(recipe, model=model, family=family, allow=allow, target=())
    carriers = tuple(request.recipe.export.to)
    if carriers != ("checkpoint",):
        raise UsageError(
            f"--low-disk publishes a checkpoint, and the recipe writes {', '.join(carriers)}",
            fix="export and push the others: they are small",
        )
    home = Path.cwd() / to.repo.rpartition("/")[2]
    return Work(
        plan=request.plan,
        checkpoint=request.checkpoint,
        record=request.record(home),
        allow=frozenset(request.recipe.export.allow),
        home=home,
    )


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
        ("against hooks", "verified" if pushed.unverified is None else pushed.unverified),
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
    parts: list[RenderableType] = [render.facts(rows)]
    if pushed.notes:
        parts.append(render.section("Notes", render.indented(pushed.notes)))
    return parts


def _compared(pushed: "Pushed") -> str:
    from bake.artifact.destination import VERIFIED

    if pushed.outcome == VERIFIED:
        return "every byte is what was sent"
    return "not compared; --verify-download does that"
