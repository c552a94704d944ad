"""The Hub as one account sees it: the repository that is published to, and the base's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub import errors as theirs

from bake.artifact.destination import Destination
from bake.artifact.record import RECORD
from bake.artifact.schema import BaseRef
from bake.checkpoints.hashes import Stated
from bake.checkpoints.hub_errors import RAISED, status_of
from bake.checkpoints.hub_patience import patiently
from bake.errors import HubError
from bake.publish.failures import Account, explained
from bake.publish.remote import own_tree
from bake.publish.session import client, in_time

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Hub:
    """An account at work on one repository.

    Attributes:
        api: the client.
        account: who it is.
        to: where it publishes.
        remark: called with what is being done.
        kept: files of the repository that are not ours: no tree shows them.
    """

    api: HfApi
    account: Account
    to: Destination
    remark: Callable[[str], None]
    kept: frozenset[str] = frozenset()

    def ask(self, doing: str, call: Callable[[], T]) -> T:
        """Return what an idempotent call returns.

        Args:
            doing: what is being done, to continue "while" in a message.
            call: to the client; tried again when its failure may pass.

        Raises:
            HubError: the Hub refuses or fails.
        """
        with explained(self.account, doing):
            return patiently(call)

    def tree(self, doing: str, commit: str) -> dict[str, Stated]:
        """Return the files of a commit by name.

        Raises:
            HubError: the Hub refuses or fails.
        """
        return self.ask(doing, lambda: self.files(commit))

    def files(self, commit: str) -> dict[str, Stated]:
        """Return the files of a commit by name; whatever the client raises is raised."""
        tree = own_tree(self.api, self.to.repo, commit)
        return {name: file for name, file in tree.items() if name not in self.kept}


@dataclass(frozen=True, slots=True)
class Head:
    """The state of the repository: None as its commit when it does not exist."""

    commit: str | None
    private: bool
    tree: dict[str, Stated]


def sign_in(to: Destination, remark: Callable[[str], None]) -> Hub:
    """Ask whose token this is, and say where it goes.

    Raises:
        HubError: it is nobody's, or the Hub fails.
    """
    if constants.ENDPOINT != "https://huggingface.co":
        remark(f"the Hub is {constants.ENDPOINT}: your token is sent there")
    stranger = Hub(client(), Account(to.repo, "this account", ()), to, remark)
    found = stranger.ask("asking who you are", lambda: stranger.api.whoami(cache=True))
    spaces = (found["name"], *(org["name"] for org in found.get("orgs", [])))
    account = Account(to.repo, found["name"], tuple(map(str, spaces)))
    remark(f"publishing as {found['name']} to {account.page}")
    return Hub(stranger.api, account, to, remark)


def read_head(hub: Hub) -> Head:
    """Return what the repository holds at the branch.

    Raises:
        HubError: it may not be read, or the Hub fails.
    """
    with explained(hub.account, "reading the repository"):
        try:
            info = patiently(lambda: hub.api.model_info(hub.to.repo))
        except theirs.RepositoryNotFoundError as error:
            if hub.to.pull_request or isinstance(error, theirs.GatedRepoError):
                raise
            return Head(None, True, {})
        commit = _branch(hub, str(info.sha))
    return Head(commit, bool(info.private), hub.tree("reading the repository", commit))


def _branch(hub: Hub, main: str) -> str:
    """Return the commit of the branch; that of main where there is no such branch yet."""
    if hub.to.revision == "main":
        return main
    try:
        info = patiently(lambda: hub.api.model_info(hub.to.repo, revision=hub.to.revision))
    except theirs.RevisionNotFoundError:
        return main
    return str(info.sha)


def check_head(head: Head, to: Destination) -> None:
    """Refuse a repository that is not ours to overwrite, or public against expectation.

    Raises:
        HubError: it is.
    """
    if head.commit is None or to.pull_request:
        return
    if head.tree and RECORD not in head.tree:
        raise HubError(
            f"{to.repo} exists and holds something that bake did not make",
            why=f"it has {len(head.tree)} files and no {RECORD}",
            fix="choose another name, or propose the change with --create-pr",
        )
    if not head.private and not to.public:
        raise HubError(
            f"{to.repo} is public: everybody would see this at once",
            fix="say so with --public, make it private, or choose another name",
        )


def create_repository(hub: Hub) -> Head:
    """Create the repository, private, and return its state.

    Raises:
        HubError: the Hub refuses or fails, or somebody else has made another one meanwhile.
    """
    hub.remark(f"creating {hub.to.repo}, private")
    with explained(hub.account, "creating the repository"):
        in_time(
            lambda: patiently(lambda: hub.api.create_repo(hub.to.repo, private=True, exist_ok=True))
        )
    head = read_head(hub)
    check_head(head, hub.to)
    return head


def create_branch(hub: Hub, commit: str) -> None:
    """Create the branch at a commit, where the repository lacks it."""
    if hub.to.revision != "main" and not hub.to.pull_request:
        hub.ask(
            "creating the branch",
            lambda: hub.api.create_branch(
                hub.to.repo, branch=hub.to.revision, revision=commit, exist_ok=True
            ),
        )


def read_base(hub: Hub, base: BaseRef) -> Any:
    """Return what the Hub says of the base at its commit.

    Raises:
        HubError: it may not be read, or the Hub fails.
    """
    asking = Account(base.repo, hub.account.name, hub.account.namespaces)
    with explained(asking, "reading the base's licence"):
        return patiently(lambda: hub.api.model_info(base.repo, revision=base.revision))


def base_tree(hub: Hub, base: BaseRef) -> dict[str, Stated]:
    """Return the base's files on the Hub, for copying; none where they cannot be read."""
    if not base.on_hub or not base.pinned:
        return {}
    with explained(hub.account, "reading the base"):
        try:
            return patiently(lambda: own_tree(hub.api, base.repo, str(base.revision)))
        except RAISED as error:
            if status_of(error) in (401, 403, 404):
                return {}  # nothing to copy from then: every file is uploaded
            raise


def create_tag(hub: Hub, tag: str, commit: str) -> None:
    """Name a commit."""
    hub.ask(
        "tagging",
        lambda: hub.api.create_tag(hub.to.repo, tag=tag, revision=commit, exist_ok=True),
    )


def show(hub: Hub, head: Head, *, gated: str) -> bool:
    """Make the repository public when that was asked, and tell whether it is.

    Args:
        hub: where.
        head: the state of the repository before.
        gated: how access to the base is gated, and so to the model; empty where it is not.
    """
    if not hub.to.public or not head.private:
        return not head.private
    settings: dict[str, Any] = {"private": False, **({"gated": gated} if gated else {})}
    hub.ask(
        "making the repository public",
        lambda: hub.api.update_repo_settings(hub.to.repo, **settings),
    )
    return True
