"""A verification that was made after the push: added to what is published, in one guarded commit.

The weights stay where they are and are not touched. What the Hub holds is held together by the
published sums: they have to list exactly the files of the commit, and the verification has to be of
the same plan and, where it names a commit, of the same files.
"""

import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bake.artifact.destination import Pushed
from bake.artifact.names import CARD, SIGNATURE, STATEMENT, SUMS, check_names, printable, walk
from bake.artifact.record import RECORD, read_json, read_record
from bake.artifact.schema import Record
from bake.artifact.verification import VERIFICATION
from bake.cards.card import write_card
from bake.cards.stamp import is_bakes
from bake.checkpoints.hub_names import is_commit
from bake.errors import HubError, InputError, UsageError
from bake.publish.download import fetch
from bake.publish.hub import Head, Hub, check_head, read_head, sign_in
from bake.publish.options import PushOptions
from bake.publish.preflight import preflight
from bake.publish.prepare import Prepared, short_digest
from bake.publish.push import complete, under_terms
from bake.publish.remote import equal
from bake.publish.session import listening, refuse_offline
from bake.seal.manifest import (
    FileEntry,
    Manifest,
    compare_hashes,
    manifest_of,
    read_manifest,
    read_sums,
)
from bake.seal.provenance import made_by_export
from bake.seal.seal import raise_problems, seal_of

_OF_A_REPORT = re.compile(r"verify\.(?:json|md|html)|plots/[^/]+")
_STAYS = ("reproduction.json", "reproduction.md")
"""What a verification writes of this machine; it is no part of an artifact."""


def push_record(
    report: Path, options: PushOptions, *, remark: Callable[[str], None] = lambda text: None
) -> Pushed:
    """Add a verification to a published artifact: its record, its plots, the card, the sums.

    Args:
        report: the folder that ``bake verify hf://owner/name`` wrote.
        options: the repository, and under which terms.
        remark: called with what is being done.

    Raises:
        UsageError: the options ask for what only a whole artifact has.
        InputError: the verification is of something else, did not pass, or must not be published.
        HubError: the Hub refuses or fails, or what it holds is not what was sealed.
    """
    _refuse_options(options)
    refuse_offline()
    names = _report_names(report)
    receipt = Path.cwd() / f"{options.to.repo.rpartition('/')[2]}.push.json"
    with (
        tempfile.TemporaryDirectory(prefix="bake-record-") as temporary,
        listening(options.timeout) as said,
    ):
        hub, folder = sign_in(options.to, remark), Path(temporary)
        head = read_head(hub)
        away = _bring_here(hub, head, folder)
        notes = [
            *_check_report(report, read_record(folder), hub, head),
            *_put_report(report, names, folder, options),
        ]
        found = preflight(folder, options.terms, weights=tuple(f.name for f in away))
        raise_problems(found.problems, str(report))
        ready = Prepared(
            folder,
            _seal(folder, found.record, away, options.to.repo),
            found,
            receipt,
            title=f"Add a verification of plan {short_digest(found.record)}",
            notes=(*notes, *found.notes),
        )
        # A path in a record from elsewhere means nothing here.
        if found.record.base.on_hub:
            ready = under_terms(hub, ready, options.terms)
        check_head(head, hub.to)
        pushed = complete(ready, hub, head, download=options.download)
    return replace(pushed, notes=(*pushed.notes, *said))


def _refuse_options(options: PushOptions) -> None:
    """Refuse what cannot be done to an artifact whose weights are not here.

    Raises:
        UsageError: naming the option.
    """
    if options.dry_run:
        raise UsageError("--record has no --dry-run")
    if options.key is not None:
        raise UsageError(
            "--sign needs every file in one place, and --record does not have them",
            fix="publish without, download the repository, and push that with --sign",
        )
    if options.to.pull_request:
        raise UsageError("--record adds to a repository of yours, and opens no pull request")


def _report_names(report: Path) -> list[str]:
    """Return the files of a verification that travel.

    Raises:
        InputError: the folder is none, or holds other things too.
    """
    if report.is_symlink() or not report.is_dir():
        raise InputError(
            "is no folder", where=str(report), fix="name what `bake verify hf://…` wrote"
        )
    found, problems = walk(report)
    names = [name for name in found if name not in _STAYS]
    strange = [n for n in names if not _OF_A_REPORT.fullmatch(n) or (report / n).is_symlink()]
    if strange or problems:
        named = printable(strange[0]) if strange else "a link or a device"
        raise InputError(
            f"holds {named}, which is no part of a verification",
            where=str(report),
            fix="name the folder that `bake verify hf://…` wrote, and nothing else in it",
        )
    if VERIFICATION not in names:
        raise InputError(f"holds no {VERIFICATION}", where=str(report))
    return names


def _bring_here(hub: Hub, head: Head, folder: Path) -> list[FileEntry]:
    """Download the texts of the artifact and return the entries of what stays on the Hub.

    Raises:
        HubError: there is no such artifact, or a file is not what the Hub or its sums say.
    """
    repo = hub.to.repo
    if head.commit is None:
        raise HubError(f"{repo} is not on the Hub", fix="push the artifact first")
    if RECORD not in head.tree or SUMS not in head.tree:
        raise HubError(
            f"{repo} holds no artifact that bake has published",
            why=f"it has no {RECORD} or no {SUMS}",
        )
    if SIGNATURE in head.tree:
        raise UsageError(
            f"{repo} is signed, and its signature would not cover the verification",
            fix="download it, add the verification there, and push it with --sign KEY",
        )
    _download(hub, head, RECORD, folder)
    problems = check_names(list(head.tree), read_record(folder).kind, code=True)
    if problems:  # before a name of somebody's is written to this disk
        raise InputError(str(problems[0]), where=repo)
    for name, file in head.tree.items():
        if file.sha256 is None and name != RECORD:
            _download(hub, head, name, folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    away = [
        FileEntry(name, file.size, file.sha256, "", (0, 0, 0))
        for name, file in head.tree.items()
        if file.sha256 is not None
    ]
    _check_sums(folder, away, repo)
    return [file for file in away if not _OF_A_REPORT.fullmatch(file.name)]


def _download(hub: Hub, head: Head, name: str, folder: Path) -> None:
    if not equal(head.tree[name], fetch(hub, str(head.commit), name, folder)):
        raise HubError(
            f"{name} of {hub.to.repo} is not what the Hub states",
            why="it was damaged on the way",
            fix="run again",
        )


def _check_sums(folder: Path, away: list[FileEntry], repo: str) -> None:
    """Require that the published sums list what the Hub holds, the card apart."""
    listed = read_sums(folder)
    there = manifest_of([*read_manifest(folder).files, *away]).covered
    wrong = [name for name, _ in compare_hashes(listed, there) if name != CARD]
    if wrong:
        raise HubError(
            f"{repo} does not hold what was sealed: {wrong[0]}",
            why=f"{len(wrong)} files are not what {SUMS} lists",
            fix="push the artifact again",
        )


def _check_report(report: Path, record: Record, hub: Hub, head: Head) -> list[str]:
    """Require a verification of the same plan and, where it names its commit, the same files.

    Raises:
        InputError: it is of something else.
    """
    content = read_json(report, VERIFICATION)
    if content.get("plan_digest") != record.plan.digest:
        raise InputError(
            f"verifies the plan {content.get('plan_digest')}, and {hub.to.repo} executes "
            f"{record.plan.digest}",
            where=str(report / VERIFICATION),
            fix=f"run `bake verify hf://{hub.to.repo}`",
        )
    commit = str(content.get("artifact")).rpartition("@")[2]
    if not is_commit(commit):
        return ["the verification names no commit: only its plan was compared"]
    then = hub.tree("reading the commit that was verified", commit)
    wrong = [
        name
        for name in sorted(then.keys() | head.tree.keys())
        if made_by_export(name) and then.get(name) != head.tree.get(name)
    ]
    if wrong:
        raise InputError(
            f"verifies commit {commit[:12]}, and {printable(wrong[0])} has changed since",
            where=str(report / VERIFICATION),
            fix=f"run `bake verify hf://{hub.to.repo}` again",
        )
    return []


def _put_report(report: Path, names: list[str], folder: Path, options: PushOptions) -> list[str]:
    """Replace the verification that is there, and the card if bake wrote it."""
    for path in list(folder.iterdir()):
        if path.name.startswith("verify."):
            path.unlink()
    shutil.rmtree(folder / "plots", ignore_errors=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(report / name, folder / name)
    card = folder / CARD
    if is_bakes(card) if card.exists() else not options.terms.no_card:
        write_card(folder, repo=options.to.repo, force=True)
        return []
    edited = f"{CARD} was edited and stays as it is: see whether it still holds"
    return [edited] if card.exists() else []


def _seal(folder: Path, record: Record, away: list[FileEntry], where: str) -> Manifest:
    """Seal the files that are here together with those that stay on the Hub."""
    for name in (SUMS, STATEMENT):
        (folder / name).unlink(missing_ok=True)
    return seal_of(record, manifest_of([*read_manifest(folder).files, *away]), where).write(folder)
