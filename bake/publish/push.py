"""``push``: an artifact becomes one commit of a repository on the Hub.

The order is what makes it safe. Everything that can be refused is refused before the first byte is
sent; the repository is private until its contents are known to be right; the commit names its
parent, so that of two runs at most one succeeds and a reply that is lost can be looked up; the tag
and the public view come last. Every step may be repeated, and a run after an interrupted one takes
it up.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub import errors as theirs

from bake import __version__
from bake.errors import HubError, InputError
from bake.publish import licences
from bake.publish.commit import (
    Committed,
    GuardedCommit,
    Parts,
    find_pull_request,
    parts_of,
    patiently,
)
from bake.publish.destination import Destination, Pushed
from bake.publish.failures import RAISED, Account, redact, status_of, told
from bake.publish.frontmatter import card_metadata, read_card
from bake.publish.manifest import Manifest, Progress, manifest_of, stamp, write_text
from bake.publish.preflight import Preflight, Terms, check_terms, preflight
from bake.publish.record import RECORD
from bake.publish.remote import RemoteFile, differences, read_tree
from bake.publish.seal import as_error, prepare
from bake.publish.session import DEADLINE, card_errors, client, patience, within

TIMEOUT = 120.0
"""Seconds that the Hub may take for one answer; it gives a commit up after 60."""


def push(
    folder: Path,
    to: Destination,
    terms: Terms,
    *,
    dry_run: bool = False,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
    remark: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Publish an artifact.

    Args:
        folder: what ``bake export`` wrote.
        to: where.
        terms: what the user takes on.
        dry_run: say what would be done; the Hub is read where it can be reached.
        timeout: seconds that the Hub may take for one answer.
        progress: called with the bytes that are hashed and their total.
        remark: told what is being done.

    Raises:
        InputError: the artifact must not be published as it is.
        HubError: the Hub refuses, fails or holds other bytes than were sent.
    """
    if constants.HF_HUB_OFFLINE and not dry_run:
        raise HubError(
            "publishing needs the Hub, which is switched off", fix="unset HF_HUB_OFFLINE"
        )
    found, manifest = _checked(folder, terms, progress, write=not dry_run)
    if constants.HF_HUB_OFFLINE:
        notes = (*found.notes, "the Hub is switched off and was not asked")
        return _dry(to, found, manifest, Account(to.repo, "", ()), notes, Parts((), (), ()))
    with patience(timeout), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run = _Run(folder.resolve(), to, terms, found, manifest, remark)
        pushed = run.dry() if dry_run else run.publish()
    said = tuple(redact(str(w.message)) for w in warned if "metadata" in str(w.message))
    return _with_notes(pushed, said)


def _checked(
    folder: Path, terms: Terms, progress: Progress | None, *, write: bool
) -> tuple[Preflight, Manifest]:
    """Check and seal a folder that nobody writes to meanwhile."""
    found = preflight(folder, terms)
    error = as_error(found.problems, str(folder))
    if error is not None:
        raise error
    stamps = {name: stamp(folder / name) for name in found.names}
    sealed = prepare(folder, progress)
    for file in sealed.manifest.files:
        if file.name not in sealed.texts and stamps.get(file.name) != file.stamp:
            raise InputError("changed while it was being checked", where=file.name, fix="run again")
    if not write:
        return found, sealed.manifest
    files = sealed.manifest.by_name()
    for name, text in sealed.texts.items():
        files[name] = write_text(folder.resolve(), name, text)
    return found, manifest_of(files.values())


def _tag(manifest: Manifest) -> str:
    return f"bake-{manifest.digest[:12]}"


def _dry(
    to: Destination,
    found: Preflight,
    manifest: Manifest,
    account: Account,
    notes: tuple[str, ...],
    parts: Parts,
) -> Pushed:
    return Pushed(
        repo=to.repo,
        url="",
        commit="",
        tag=_tag(manifest),
        pull_request=None,
        digest=manifest.digest,
        plan_digest=found.record.plan_digest,
        endpoint=constants.ENDPOINT,
        account=account.name,
        public=to.public,
        uploaded=tuple(file.name for file in parts.add),
        copied=tuple(file.name for file, _ in parts.copy),
        deleted=parts.delete,
        unchanged=parts.empty,
        dry_run=True,
        notes=notes,
    )


def _with_notes(pushed: Pushed, more: tuple[str, ...]) -> Pushed:
    return replace(pushed, notes=(*pushed.notes, *more))


@dataclass(frozen=True, slots=True)
class _Head:
    """The state of the repository: None as its commit when it does not exist."""

    commit: str | None
    private: bool
    tree: dict[str, RemoteFile]


@dataclass(slots=True)
class _Run:
    """One push."""

    folder: Path
    to: Destination
    terms: Terms
    found: Preflight
    manifest: Manifest
    remark: Callable[[str], None]
    api: HfApi = field(default_factory=client)
    account: Account = field(init=False)
    notes: list[str] = field(default_factory=list)
    base_gated: str = ""

    def __post_init__(self) -> None:
        self.account = Account(self.to.repo, "this account", ())
        self.notes += self.found.notes

    def dry(self) -> Pushed:
        """Say what would be done; nothing is written, here or there."""
        self._who()
        self._check_base()
        head = self._head()
        self._check_head(head)
        parts = parts_of(self.manifest, head.tree, self._base_tree())
        if head.commit is None:
            self.notes.append(f"{self.to.repo} would be created, private")
        return _dry(self.to, self.found, self.manifest, self.account, tuple(self.notes), parts)

    def publish(self) -> Pushed:
        """Do it, step by step; see the head of this module."""
        self._who()
        self._check_base()
        head = self._head()
        self._check_head(head)
        if head.commit is None:
            head = self._create()
            self._check_head(head)
        assert head.commit is not None
        parts = parts_of(self.manifest, head.tree, {})
        made = Committed(head.commit, None, (), ()) if parts.empty else self._commit(head)
        self._compare(made.commit)
        if not self.to.pull_request:
            self._tag(made.commit)
        public = self._show(head)
        pushed = Pushed(
            repo=self.to.repo,
            url=made.pull_request or f"{self.account.page}/commit/{made.commit}",
            commit=made.commit,
            tag="" if self.to.pull_request else _tag(self.manifest),
            pull_request=made.pull_request,
            digest=self.manifest.digest,
            plan_digest=self.found.record.plan_digest,
            endpoint=constants.ENDPOINT,
            account=self.account.name,
            public=public,
            uploaded=made.uploaded,
            copied=made.copied,
            deleted=parts.delete if made.uploaded or made.copied else (),
            unchanged=not (made.uploaded or made.copied or parts.delete),
            dry_run=False,
            notes=tuple(self.notes),
        )
        return _with_notes(pushed, _receipt(self.folder, pushed))

    def _who(self) -> None:
        """Ask whose token this is, and say where it goes."""
        if constants.ENDPOINT != "https://huggingface.co":
            self.remark(f"the Hub is {constants.ENDPOINT}: your token is sent there")
        with told(self.account, "asking who you are"):
            found = patiently(lambda: self.api.whoami(cache=True))
        spaces = (found["name"], *(org["name"] for org in found.get("orgs", [])))
        self.account = Account(self.to.repo, found["name"], tuple(map(str, spaces)))
        self.remark(f"publishing as {found['name']} to {self.account.page}")

    def _check_base(self) -> None:
        """Ask the Hub for the base's licence and refuse what it does not permit."""
        record = self.found.record
        if record.base_on_hub:
            asking = Account(record.base_repo, self.account.name, self.account.namespaces)
            with told(asking, "reading the base's licence"):
                info = patiently(
                    lambda: self.api.model_info(record.base_repo, revision=record.revision)
                )
            card = {} if info.card_data is None else dict(vars(info.card_data))
            self.base_gated = info.gated if isinstance(info.gated, str) else ""
        else:
            card = self._local_card()
        base = licences.stated(card)
        problems = check_terms(self.found, self.terms, base=base, repo=self.to.repo)
        error = as_error(problems, str(self.folder))
        if error is not None:
            raise error
        if (said := licences.remark(base)) is not None:
            self.notes.append(said)
        if self.base_gated:
            self.notes.append(f"the base is gated ({self.base_gated}): keep to its terms")

    def _local_card(self) -> dict[str, Any]:
        """Return the metadata of the card in the folder of a local base."""
        path = self.found.record.content["base"].get("path")
        text = read_card(self.folder / path) if isinstance(path, str) else None
        return {} if text is None else card_metadata(text)

    def _head(self) -> _Head:
        """Return what the repository holds at the branch."""
        repo = self.to.repo
        try:
            info = patiently(lambda: self.api.model_info(repo))
        except theirs.GatedRepoError as error:
            with told(self.account, "reading the repository"):
                raise error
        except theirs.RepositoryNotFoundError:
            if self.to.pull_request:
                with told(self.account, "reading the repository"):
                    raise
            return _Head(None, True, {})
        except RAISED as error:
            with told(self.account, "reading the repository"):
                raise error
        with told(self.account, "reading the repository"):
            commit = self._branch(str(info.sha))
            tree = patiently(lambda: read_tree(self.api, repo, commit))
        return _Head(commit, bool(info.private), tree)

    def _branch(self, main: str) -> str:
        """Return the commit of the branch; that of main where there is no such branch yet."""
        if self.to.revision == "main":
            return main
        try:
            info = patiently(lambda: self.api.model_info(self.to.repo, revision=self.to.revision))
        except theirs.RevisionNotFoundError:
            return main
        return str(info.sha)

    def _check_head(self, head: _Head) -> None:
        """Refuse a repository that is not ours to overwrite, or public against expectation."""
        if head.commit is None or self.to.pull_request:
            return
        if head.tree and RECORD not in head.tree:
            raise HubError(
                f"{self.to.repo} exists and holds something that bake did not make",
                why=f"it has {len(head.tree)} files and no {RECORD}",
                fix="choose another name, or propose the change with --create-pr",
            )
        if not head.private and not self.to.public:
            raise HubError(
                f"{self.to.repo} is public: everybody would see this at once",
                fix="say so with --public, make it private, or choose another name",
            )

    def _create(self) -> _Head:
        """Create the repository, private, and return its state."""
        self.remark(f"creating {self.to.repo}, private")
        with told(self.account, "creating the repository"):
            within(
                DEADLINE,
                lambda: patiently(
                    lambda: self.api.create_repo(self.to.repo, private=True, exist_ok=True)
                ),
            )
        return self._head()

    def _base_tree(self) -> dict[str, RemoteFile]:
        """Return the base's files on the Hub, for copying; none where they cannot be read."""
        record = self.found.record
        if not record.base_on_hub or not record.pinned:
            return {}
        try:
            return patiently(lambda: read_tree(self.api, record.base_repo, str(record.revision)))
        except RAISED as error:
            if status_of(error) in (401, 403, 404):
                return {}  # nothing to copy from then: every file is uploaded
            with told(self.account, "reading the base"):
                raise

    def _commit(self, head: _Head) -> Committed:
        assert head.commit is not None
        parts = parts_of(self.manifest, head.tree, self._base_tree())
        record, repo = self.found.record, self.to.repo
        if self.to.pull_request:
            with told(self.account, "looking for the pull request"):
                there = find_pull_request(self.api, repo, self.manifest)
            if there is not None:
                return there
        elif self.to.revision != "main":
            with told(self.account, "creating the branch"):
                patiently(
                    lambda: self.api.create_branch(
                        repo, branch=self.to.revision, revision=head.commit, exist_ok=True
                    )
                )
        size = sum(file.size for file in parts.add)
        self.remark(f"uploading {len(parts.add)} files with {size:,} bytes")
        self._validate_card()
        title = f"Publish {record.kind} of plan {record.plan_digest.removeprefix('sha256:')[:12]}"
        text = f"Artifact {self.manifest.digest}, made by bake {record.content.get('bake')}."
        guarded = GuardedCommit(
            api=self.api,
            account=self.account,
            folder=self.folder,
            manifest=self.manifest,
            base=(record.base_repo, record.revision),
            revision=self.to.revision,
            parent=head.commit,
            message=(title, text),
            pull_request=self.to.pull_request,
        )
        return guarded.make(parts)

    def _validate_card(self) -> None:
        """Have the Hub read the card before gigabytes are sent for nothing."""
        if self.found.card is None:
            return
        card = self.found.card
        with told(self.account, "checking the card"):
            errors = patiently(lambda: card_errors(card))
        if errors:
            raise HubError(
                f"the Hub refuses the card: {redact('; '.join(errors))}", fix="correct README.md"
            )

    def _compare(self, commit: str) -> None:
        """Require that the Hub holds these bytes, by the hashes that it states."""
        with told(self.account, "comparing what the Hub holds"):
            tree = patiently(lambda: read_tree(self.api, self.to.repo, commit))
        wrong = differences(tree, self.manifest)
        if wrong:
            raise HubError(
                f"{self.to.repo} does not hold what was sent: {wrong[0]}",
                where=commit,
                why=f"{len(wrong)} files differ; it was neither tagged nor made public",
                fix="run the same command again",
            )

    def _tag(self, commit: str) -> None:
        with told(self.account, "tagging"):
            patiently(
                lambda: self.api.create_tag(
                    self.to.repo, tag=_tag(self.manifest), revision=commit, exist_ok=True
                )
            )

    def _show(self, head: _Head) -> bool:
        """Make the repository public when that was asked, and tell whether it is."""
        if not self.to.public or not head.private:
            return not head.private
        settings: dict[str, Any] = {"private": False}
        if self.base_gated:
            settings["gated"] = self.base_gated
        with told(self.account, "making the repository public"):
            patiently(lambda: self.api.update_repo_settings(self.to.repo, **settings))
        return True


def _receipt(folder: Path, pushed: Pushed) -> tuple[str, ...]:
    """Write what was done beside the folder; return what there is to say about that."""
    name = f"{folder.name}.push.json"
    versions = {"bake": __version__, "huggingface_hub": huggingface_hub.__version__}
    content = {**pushed.to_json(), "versions": versions}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        write_text(folder.parent, name, text)
    except OSError as error:
        return (f"the receipt could not be written: {error.strerror}",)
    return (f"the receipt is {folder.parent / name}",)
