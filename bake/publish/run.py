"""One push, step by step: who, the base's terms, the repository, the commit, what comes after it.

``push`` brings a whole folder, ``follow_up`` a verification that was made later. The steps and
their order are the same, and every one of them may be repeated.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub import errors as theirs

from bake import __version__
from bake.artifact.destination import UNVERIFIED, VERIFIED, Destination, Pushed
from bake.artifact.record import RECORD, ArtifactRecord
from bake.cards import licences
from bake.cards.frontmatter import card_metadata, read_card
from bake.errors import HubError
from bake.publish.commit import (
    Committed,
    GuardedCommit,
    Parts,
    find_pull_request,
    parts_of,
    patiently,
)
from bake.publish.download import compare_download
from bake.publish.failures import RAISED, Account, redact, status_of, told
from bake.publish.preflight import Preflight, Terms, check_terms
from bake.publish.remote import RemoteFile, differences, read_tree
from bake.publish.session import DEADLINE, card_errors, client, within
from bake.seal.manifest import Manifest, write_text
from bake.seal.seal import as_error


@dataclass(frozen=True, slots=True)
class Head:
    """The state of the repository: None as its commit when it does not exist."""

    commit: str | None
    private: bool
    tree: dict[str, RemoteFile]


@dataclass(slots=True)
class Run:
    """One push.

    Attributes:
        folder: where the files are that are not brought.
        to: where they go.
        terms: what the user takes on.
        receipt: the file that says afterwards what was done.
        remark: told what is being done.
        manifest: what the repository is to hold.
        found: what the preflight found; see ``take``.
        download: whether everything is downloaded again and compared.
        title: of the commit; None for that of an artifact.
    """

    folder: Path
    to: Destination
    terms: Terms
    receipt: Path
    remark: Callable[[str], None]
    manifest: Manifest = field(default_factory=lambda: Manifest(()))
    download: bool = False
    title: str | None = None
    api: HfApi = field(default_factory=client)
    found: Preflight = field(init=False)
    account: Account = field(init=False)
    notes: list[str] = field(default_factory=list)
    base_gated: str = ""

    def __post_init__(self) -> None:
        self.account = Account(self.to.repo, "this account", ())

    def take(self, found: Preflight) -> None:
        """Go on with what a preflight found, and pass its notes on."""
        self.found = found
        self.notes += found.notes

    @property
    def tag(self) -> str:
        """What names the artifact in the repository."""
        return f"bake-{self.manifest.digest[:12]}"

    def dry(self) -> Pushed:
        """Say what would be done; nothing is written, here or there."""
        self.who()
        self.check_base()
        head = self.head()
        self.check_head(head)
        parts = parts_of(self.manifest, head.tree, self.base_tree())
        if head.commit is None:
            self.notes.append(f"{self.to.repo} would be created, private")
        return self.would(parts)

    def would(self, parts: Parts) -> Pushed:
        """Return what a push would do."""
        return replace(
            self._pushed(Committed("", None, (), ()), parts, public=self.to.public),
            url="",
            tag=self.tag,
            outcome="",
            uploaded=tuple(file.name for file in parts.add),
            copied=tuple(file.name for file, _ in parts.copy),
            deleted=parts.delete,
            unchanged=parts.empty,
            dry_run=True,
        )

    def begin(self) -> Head:
        """Ask all that has to be known before a byte is sent, and make the repository."""
        self.who()
        self.check_base()
        head = self.head()
        self.check_head(head)
        if head.commit is None:
            head = self._create()
            self.check_head(head)
        return head

    def complete(self, head: Head) -> Pushed:
        """Commit, compare, tag and show; see the head of ``push``."""
        assert head.commit is not None
        parts = parts_of(self.manifest, head.tree, {})
        made = Committed(head.commit, None, (), ()) if parts.empty else self._commit(head)
        self._compare(made.commit)
        if self.download:
            self._check_download(made, parts, head)
        if not self.to.pull_request:
            self._tag(made.commit)
        return self._noted(self._pushed(made, parts, public=self._show(head)))

    def _pushed(self, made: Committed, parts: Parts, *, public: bool) -> Pushed:
        return Pushed(
            repo=self.to.repo,
            url=made.pull_request or f"{self.account.page}/commit/{made.commit}",
            commit=made.commit,
            tag="" if self.to.pull_request else self.tag,
            pull_request=made.pull_request,
            digest=self.manifest.digest,
            plan_digest=self.found.record.plan_digest,
            endpoint=constants.ENDPOINT,
            account=self.account.name,
            public=public,
            outcome=VERIFIED if self.download else UNVERIFIED,
            unverified=self.found.unverified,
            uploaded=made.uploaded,
            copied=made.copied,
            deleted=parts.delete if made.uploaded or made.copied else (),
            unchanged=not (made.uploaded or made.copied or parts.delete),
            dry_run=False,
            notes=tuple(self.notes),
        )

    def _noted(self, pushed: Pushed) -> Pushed:
        """Write the receipt; return the result with what there is to say about that."""
        versions = {"bake": __version__, "huggingface_hub": huggingface_hub.__version__}
        content = {**pushed.to_json(), "versions": versions}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        try:
            write_text(self.receipt.parent, self.receipt.name, text)
        except OSError as error:
            note = f"the receipt could not be written: {error.strerror}"
        else:
            note = f"the receipt is {self.receipt}"
        return replace(pushed, notes=(*pushed.notes, note))

    def _check_download(self, made: Committed, parts: Parts, head: Head) -> None:
        """Download everything again, and require that it is what was sent.

        Raises:
            HubError: other bytes came, or none; the receipt says that nothing is verified.
        """
        self.remark(f"downloading {self.manifest.size:,} bytes again, to compare them")
        wrong = compare_download(
            self.to.repo,
            made.commit,
            self.manifest,
            place=self.receipt.parent,
            account=self.account,
        )
        if not wrong:
            return
        self.download = False
        self._noted(replace(self._pushed(made, parts, public=not head.private), tag=""))
        raise HubError(
            f"{self.to.repo} is published but unverified: {len(wrong)} files came back with other "
            f"bytes, {', '.join(wrong[:8])}" + (" …" if len(wrong) > 8 else ""),
            where=made.commit,
            why="the Hub states the right hashes; it was neither tagged nor made public",
            fix="run the same command again: it compares the download anew",
        )

    def who(self) -> None:
        """Ask whose token this is, and say where it goes."""
        if constants.ENDPOINT != "https://huggingface.co":
            self.remark(f"the Hub is {constants.ENDPOINT}: your token is sent there")
        with told(self.account, "asking who you are"):
            found = patiently(lambda: self.api.whoami(cache=True))
        spaces = (found["name"], *(org["name"] for org in found.get("orgs", [])))
        self.account = Account(self.to.repo, found["name"], tuple(map(str, spaces)))
        self.remark(f"publishing as {found['name']} to {self.account.page}")

    def check_base(self) -> None:
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

    def head(self) -> Head:
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
            return Head(None, True, {})
        except RAISED as error:
            with told(self.account, "reading the repository"):
                raise error
        with told(self.account, "reading the repository"):
            commit = self._branch(str(info.sha))
            tree = patiently(lambda: read_tree(self.api, repo, commit))
        return Head(commit, bool(info.private), tree)

    def _branch(self, main: str) -> str:
        """Return the commit of the branch; that of main where there is no such branch yet."""
        if self.to.revision == "main":
            return main
        try:
            info = patiently(lambda: self.api.model_info(self.to.repo, revision=self.to.revision))
        except theirs.RevisionNotFoundError:
            return main
        return str(info.sha)

    def check_head(self, head: Head) -> None:
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

    def _create(self) -> Head:
        """Create the repository, private, and return its state."""
        self.remark(f"creating {self.to.repo}, private")
        with told(self.account, "creating the repository"):
            within(
                DEADLINE,
                lambda: patiently(
                    lambda: self.api.create_repo(self.to.repo, private=True, exist_ok=True)
                ),
            )
        return self.head()

    def base_tree(self) -> dict[str, RemoteFile]:
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

    def _commit(self, head: Head) -> Committed:
        assert head.commit is not None
        parts = parts_of(self.manifest, head.tree, self.base_tree())
        record, repo = self.found.record, self.to.repo
        if self.to.pull_request:
            with told(self.account, "looking for the pull request"):
                there = find_pull_request(self.api, repo, self.manifest)
            if there is not None:
                return there
        self.make_branch(head)
        size = sum(file.size for file in parts.add)
        self.remark(f"uploading {len(parts.add)} files with {size:,} bytes")
        self._validate_card()
        title = self.title or f"Publish {record.kind} of plan {short_digest(record)}"
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

    def make_branch(self, head: Head) -> None:
        """Create the branch where the repository lacks it."""
        if self.to.revision == "main" or self.to.pull_request:
            return
        with told(self.account, "creating the branch"):
            patiently(
                lambda: self.api.create_branch(
                    self.to.repo, branch=self.to.revision, revision=head.commit, exist_ok=True
                )
            )

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
                    self.to.repo, tag=self.tag, revision=commit, exist_ok=True
                )
            )

    def _show(self, head: Head) -> bool:
        """Make the repository public when that was asked, and tell whether it is."""
        if not self.to.public or not head.private:
            return not head.private
        settings: dict[str, Any] = {"private": False}
        if self.base_gated:
            settings["gated"] = self.base_gated
        with told(self.account, "making the repository public"):
            patiently(lambda: self.api.update_repo_settings(self.to.repo, **settings))
        return True


def short_digest(record: ArtifactRecord) -> str:
    """Return the beginning of the plan's digest, for titles."""
    return record.plan_digest.removeprefix("sha256:")[:12]
