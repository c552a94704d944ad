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

from bake.artifact.destination import Destination, Pushed
from bake.artifact.names import CARD, SIGNATURE, STATEMENT, SUMS, check_names, printable, walk
from bake.artifact.record import RECORD, VERIFICATION, read_json, read_record
from bake.errors import HubError, InputError, UsageError
from bake.publish.commit import patiently
from bake.publish.download import fetch
from bake.publish.failures import told
from bake.publish.preflight import Terms, preflight
from bake.publish.push import TIMEOUT, is_bakes, listening, refuse_offline
from bake.publish.remote import read_tree
from bake.publish.run import Head, Run, short_digest
from bake.seal.manifest import (
    FileEntry,
    Manifest,
    entry_of,
    manifest_of,
    read_manifest,
    read_sums,
    write_text,
)
from bake.seal.provenance import made_by_export
from bake.seal.seal import as_error, seal_of

_AT = re.compile(r"@([0-9a-f]{40})\Z")
_OF_A_REPORT = re.compile(r"verify\.(?:json|md|html)|plots/[^/]+")
_STAYS = ("reproduction.json", "reproduction.md")
"""What a verification writes of this machine; it is no part of an artifact."""


def push_record(
    report: Path,
    to: Destination,
    terms: Terms,
    *,
    download: bool = False,
    timeout: float = TIMEOUT,
    remark: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Add a verification to a published artifact: its record, its plots, the card, the sums.

    Args:
        report: the folder that ``bake verify hf://owner/name`` wrote.
        to: the repository.
        terms: what the user takes on.
        download: download everything again, and compare it.
        timeout: seconds that the Hub may take for one answer.
        remark: told what is being done.

    Raises:
        InputError: the verification is of something else, did not pass, or must not be published.
        HubError: the Hub refuses or fails, or what it holds is not what was sealed.
    """
    refuse_offline()
    if to.pull_request:
        raise UsageError("--record adds to a repository of yours, and opens no pull request")
    names = _report_names(report)
    with (
        tempfile.TemporaryDirectory(prefix="bake-record-") as temporary,
        listening(timeout) as said,
    ):
        follow = _FollowUp(Path(temporary), report, names, to, terms, download, remark)
        pushed = follow.publish()
    return replace(pushed, notes=(*pushed.notes, *said))


def _report_names(report: Path) -> list[str]:
    """Return the files of a report that are published."""
    if report.is_symlink() or not report.is_dir():
        raise InputError(
            "is no folder", where=str(report), fix="name what `bake verify hf://…` wrote"
        )
    found, problems = walk(report)
    names = [name for name in found if name not in _STAYS]
    strange = [name for name in names if not _of_a_report(name)]
    if strange or problems or any((report / name).is_symlink() for name in names):
        named = printable(strange[0]) if strange else "a link or a device"
        raise InputError(
            f"holds {named}, which is no part of a verification",
            where=str(report),
            fix="name the folder that `bake verify hf://…` wrote, and nothing else in it",
        )
    if VERIFICATION not in names:
        raise InputError(f"holds no {VERIFICATION}", where=str(report))
    return names


class _FollowUp:
    def __init__(
        self,
        folder: Path,
        report: Path,
        names: list[str],
        to: Destination,
        terms: Terms,
        download: bool,
        remark: Callable[[str], None],
    ) -> None:
        self.folder, self.report, self.names, self.to = folder, report, names, to
        self.terms, self.download, self.remark = terms, download, remark

    def publish(self) -> Pushed:
        """Read what is there, put the verification into it, and commit."""
        receipt = Path.cwd() / f"{self.to.repo.rpartition('/')[2]}.push.json"
        run = Run(self.folder, self.to, self.terms, receipt, self.remark, download=self.download)
        run.who()
        head = run.head()
        if head.commit is None:
            raise HubError(f"{self.to.repo} is not on the Hub", fix="push the artifact first")
        away = self._bring_here(run, head)
        self._check_report(run, head)
        self._put_report(run)
        found = preflight(self.folder, self.terms, weights=tuple(f.name for f in away))
        error = as_error(found.problems, str(self.report))
        if error is not None:
            raise error
        run.take(found)
        if found.record.base_on_hub:  # a path in a record from elsewhere means nothing here
            run.check_base()
        run.check_head(head)
        run.manifest = self._seal(away)
        run.title = f"Add a verification of plan {short_digest(found.record)}"
        return run.complete(head)

    def _bring_here(self, run: Run, head: Head) -> list[FileEntry]:
        """Download the texts of the artifact and return the entries of what stays on the Hub.

        Raises:
            HubError: a file is not what the Hub or the published sums say.
        """
        assert head.commit is not None
        if RECORD not in head.tree or SUMS not in head.tree:
            raise HubError(
                f"{self.to.repo} holds no artifact that bake has published",
                why=f"it has no {RECORD} or no {SUMS}",
            )
        if SIGNATURE in head.tree:
            raise UsageError(
                f"{self.to.repo} is signed, and its signature would not cover the verification",
                fix="download it, add the verification there, and push it with --sign KEY",
            )
        self._download(run, head, RECORD)
        kind = read_record(self.folder).kind
        problems = check_names(list(head.tree), kind, code=True)
        if problems:  # before a name of somebody's is written to this disk
            raise InputError(str(problems[0]), where=self.to.repo)
        for name, file in head.tree.items():
            if file.sha256 is None and name != RECORD:
                self._download(run, head, name)
        shutil.rmtree(self.folder / ".cache", ignore_errors=True)
        away = [
            FileEntry(name, file.size, file.sha256, "", (0, 0, 0))
            for name, file in head.tree.items()
            if file.sha256 is not None
        ]
        self._check_sums(away)
        return [file for file in away if not _of_a_report(file.name)]

    def _download(self, run: Run, head: Head, name: str) -> None:
        with told(run.account, f"downloading {name}"):
            patiently(lambda: fetch(self.to.repo, str(head.commit), name, self.folder))
        if not head.tree[name].equals(entry_of(self.folder / name, name)):
            raise HubError(
                f"{name} of {self.to.repo} is not what the Hub states",
                why="it was damaged on the way",
                fix="run again",
            )

    def _check_sums(self, away: list[FileEntry]) -> None:
        """Require that the published sums list what the Hub holds, the card apart."""
        listed = read_sums(self.folder)
        files = manifest_of([*read_manifest(self.folder).files, *away])
        found = {f.name: f.sha256 for f in files.files if f.name != SUMS}
        wrong = [
            name
            for name in sorted(listed.keys() | found.keys())
            if listed.get(name) != found.get(name) and name != CARD
        ]
        if wrong:
            raise HubError(
                f"{self.to.repo} does not hold what was sealed: {printable(wrong[0])}",
                why=f"{len(wrong)} files are not what {SUMS} lists",
                fix="push the artifact again",
            )

    def _check_report(self, run: Run, head: Head) -> None:
        """Require a verification of the same plan and, where it names its commit, the same files.

        Raises:
            InputError: it is of something else.
        """
        content = read_json(self.report, VERIFICATION)
        record = read_record(self.folder)
        if content.get("plan_digest") != record.plan_digest:
            raise InputError(
                f"verifies the plan {content.get('plan_digest')}, and {self.to.repo} executes "
                f"{record.plan_digest}",
                where=str(self.report / VERIFICATION),
                fix=f"run `bake verify hf://{self.to.repo}`",
            )
        match = _AT.search(str(content.get("artifact")))
        if match is None:
            run.notes.append("the verification names no commit: only its plan was compared")
            return
        with told(run.account, "reading the commit that was verified"):
            then = patiently(lambda: read_tree(run.api, self.to.repo, match[1]))
        wrong = [
            name
            for name in sorted(then.keys() | head.tree.keys())
            if made_by_export(name) and then.get(name) != head.tree.get(name)
        ]
        if wrong:
            raise InputError(
                f"verifies commit {match[1][:12]}, and {printable(wrong[0])} has changed since",
                where=str(self.report / VERIFICATION),
                fix=f"run `bake verify hf://{self.to.repo}` again",
            )

    def _put_report(self, run: Run) -> None:
        """Replace the verification that is there, and the card if bake wrote it."""
        for path in list(self.folder.iterdir()):
            if path.name.startswith("verify."):
                path.unlink()
        shutil.rmtree(self.folder / "plots", ignore_errors=True)
        for name in self.names:
            (self.folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.report / name, self.folder / name)
        from bake.cards.card import write_card

        card = self.folder / CARD
        if is_bakes(card) if card.exists() else not self.terms.no_card:
            write_card(self.folder, repo=self.to.repo, force=True)
        elif card.exists():
            run.notes.append(f"{CARD} was edited and stays as it is: see whether it still holds")

    def _seal(self, away: list[FileEntry]) -> Manifest:
        for name in (SUMS, STATEMENT):
            (self.folder / name).unlink(missing_ok=True)
        manifest = manifest_of([*read_manifest(self.folder).files, *away])
        sealed = seal_of(read_record(self.folder), manifest, self.to.repo)
        files = sealed.manifest.by_name()
        for name, text in sealed.texts.items():
            files[name] = write_text(self.folder, name, text)
        return manifest_of(files.values())


def _of_a_report(name: str) -> bool:
    return _OF_A_REPORT.fullmatch(name) is not None
