"""One guarded commit: what it consists of, and what is done when its reply never comes."""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub import errors as theirs

from bake.checkpoints.hashes import Stated
from bake.checkpoints.hub_errors import RAISED, status_of
from bake.checkpoints.hub_patience import patiently
from bake.errors import HubError, InputError
from bake.publish.hub import Hub
from bake.publish.remote import differences, equal
from bake.seal.manifest import FileEntry, Manifest, stamp

_IN_MEMORY = 1 << 20  # shorter files are read once, checked and sent from memory
_REFUSED = (400, 401, 403, 404, 409, 422, 501)  # how a Hub declines to copy between repositories


@dataclass(frozen=True, slots=True)
class Parts:
    """What a commit changes.

    Attributes:
        add: files to upload.
        copy: files that the base's repository has, by the name they have there.
        delete: names of files that are on the Hub only.
    """

    add: tuple[FileEntry, ...]
    copy: tuple[tuple[FileEntry, str], ...]
    delete: tuple[str, ...]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.add or self.copy or self.delete)

    def without_copies(self) -> "Parts":
        """Return the same change with every file uploaded."""
        return Parts((*self.add, *(file for file, _ in self.copy)), (), self.delete)


def parts_of(manifest: Manifest, tree: dict[str, Stated], base: dict[str, Stated]) -> Parts:
    """Return what makes a commit with the files ``tree`` hold the manifest's.

    Args:
        manifest: the artifact.
        tree: the files at the head.
        base: the files of the base's repository; a large one of equal hash is copied there.
    """
    names = {file.sha256: name for name, file in base.items() if file.sha256 is not None}
    wanted = [f for f in manifest.files if f.name not in tree or not equal(tree[f.name], f)]
    return Parts(
        add=tuple(file for file in wanted if file.sha256 not in names),
        copy=tuple((file, names[file.sha256]) for file in wanted if file.sha256 in names),
        delete=tuple(sorted(tree.keys() - manifest.by_name().keys())),
    )


@dataclass(frozen=True, slots=True)
class Committed:
    """A commit that holds the manifest's files; what was sent for it."""

    commit: str
    pull_request: str | None
    uploaded: tuple[str, ...]
    copied: tuple[str, ...]


@dataclass(slots=True)
class GuardedCommit:
    """A commit on one parent, made once or not at all.

    Attributes:
        hub: who commits where.
        folder: the artifact.
        manifest: what the commit has to hold.
        base: id and commit of the base's repository.
        parent: the commit that the branch has to be at.
        message: the title and the description.
    """

    hub: Hub
    folder: Path
    manifest: Manifest
    base: tuple[str, str | None]
    parent: str
    message: tuple[str, str]
    _additions: dict[str, CommitOperationAdd] = field(default_factory=dict)

    def make(self, parts: Parts) -> Committed:
        """Upload and commit.

        Raises:
            HubError: the Hub refuses or fails, or somebody else has committed; nothing is changed.
            InputError: a file has changed since it was hashed; nothing is changed.
        """
        return self.hub.ask("committing", lambda: self._once(parts))

    def _once(self, parts: Parts) -> Committed:
        """Upload and commit, unless an earlier attempt has whose reply was lost."""
        try:
            return self._attempt(parts)
        except RAISED as error:
            if (settled := self._settled(error)) is not None:
                return settled
            if not (parts.copy and _no_copying(error)):
                raise
        return self._once(parts.without_copies())

    def _attempt(self, parts: Parts) -> Committed:
        additions = [self._addition(file) for file in parts.add]
        self.hub.api.preupload_lfs_files(
            self.hub.to.repo,
            additions=additions,
            revision=self.hub.to.revision,
            create_pr=self.hub.to.pull_request,
        )
        self._check_sent(parts)
        repo, revision = self.base
        copies = [
            CommitOperationCopy(
                name, file.name, src_revision=revision, src_repo_id=repo, src_repo_type="model"
            )
            for file, name in parts.copy
        ]
        deletions = [CommitOperationDelete(name, is_folder=False) for name in parts.delete]
        made = self.hub.api.create_commit(
            self.hub.to.repo,
            [*additions, *copies, *deletions],
            commit_message=self.message[0],
            commit_description=self.message[1],
            revision=self.hub.to.revision,
            parent_commit=self.parent,
            create_pr=self.hub.to.pull_request,
        )
        return Committed(
            commit=str(made.oid),
            pull_request=made.pr_url,
            uploaded=tuple(file.name for file in parts.add),
            copied=tuple(file.name for file, _ in parts.copy),
        )

    def _addition(self, file: FileEntry) -> CommitOperationAdd:
        """Return the operation for one file; the same object again, which knows what it sent."""
        if file.name not in self._additions:
            path = self.folder / file.name
            content = path if file.size > _IN_MEMORY else path.read_bytes()
            self._additions[file.name] = CommitOperationAdd(file.name, content)
        return self._additions[file.name]

    def _check_sent(self, parts: Parts) -> None:
        """Require that what was sent is what was hashed, before anybody can see it."""
        for file in parts.add:
            if stamp(self.folder / file.name) != file.stamp:
                raise _changed(file.name)
            if self._additions[file.name].upload_info.sha256.hex() != file.sha256:
                raise _changed(file.name)

    def _settled(self, error: BaseException) -> Committed | None:
        """Return the commit when it was made although its reply failed; None when it was not.

        Raises:
            HubError: the branch has moved and does not hold the artifact.
        """
        hub, repo = self.hub, self.hub.to.repo
        try:
            if hub.to.pull_request:
                return find_pull_request(hub, self.manifest)
            head = str(patiently(lambda: hub.api.model_info(repo, revision=hub.to.revision).sha))
            if head == self.parent:
                return None
            tree = patiently(lambda: hub.files(head))
        except RAISED:
            if status_of(error) is not None:
                return None  # the Hub has answered: nothing was committed
            failure = HubError(
                f"the Hub went silent while committing to {repo}",
                why="whether the commit was made cannot be told now",
                fix="run the same command again: it will not be made twice",
            )
        else:
            if not differences(tree, self.manifest):
                return Committed(head, None, (), ())
            failure = HubError(
                f"somebody has committed to {repo} since; nothing was changed",
                where="while committing",
                fix=f"look at {hub.account.page}/commits/{hub.to.revision}, then run again",
            )
        raise failure


def _changed(name: str) -> InputError:
    return InputError(
        "changed while it was being published; nothing was committed",
        where=name,
        fix="run again when nobody writes to the folder",
    )


def _no_copying(error: BaseException) -> bool:
    """Tell whether a failure may be the Hub's refusal to copy from the base's repository."""
    status = status_of(error)
    if status is None:
        old = isinstance(error, ValueError) and "xet hash" in str(error)
        return old or isinstance(error, theirs.FileDuplicationError)
    return status in _REFUSED


def find_pull_request(hub: Hub, manifest: Manifest) -> Committed | None:
    """Return the pull request that holds an artifact's files, the newest one, or None."""
    repo = hub.to.repo
    refs = patiently(lambda: hub.api.list_repo_refs(repo, include_pull_requests=True))
    for ref in reversed((refs.pull_requests or [])[-20:]):
        commit, number = str(ref.target_commit), ref.ref.rpartition("/")[2]
        tree = patiently(lambda commit=commit: hub.files(commit))  # type: ignore[misc]
        if not differences(tree, manifest):
            url = f"{hub.api.endpoint}/{repo}/discussions/{number}"
            return Committed(commit, url, (), ())
    return None
