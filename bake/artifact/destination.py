"""Where an artifact goes, and what came of it."""

import re
from dataclasses import asdict, dataclass
from typing import Any

from bake.checkpoints.hub_names import is_commit, is_repository, split_hub_id
from bake.errors import UsageError

VERIFIED = "published and verified"
"""The outcome of a push whose files were downloaded again and compared, every byte of them."""
UNVERIFIED = "published but unverified"
"""The outcome of any other: the hashes that the Hub states are right, its bytes were not read."""

_BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where and how to publish.

    Attributes:
        repo: ``owner/name``.
        revision: the branch; created when it is missing.
        public: whether the repository ends up public.
        pull_request: open one instead of committing.
    """

    repo: str
    revision: str = "main"
    public: bool = False
    pull_request: bool = False

    def __post_init__(self) -> None:
        if split_hub_id(self.repo) is None:
            raise UsageError(f"{self.repo!r} is no repository", fix="name it as owner/name")
        if not is_repository(self.repo):
            raise UsageError(f"{self.repo!r} is no repository", fix="name it as owner/name")
        if is_commit(self.revision) or not _BRANCH.fullmatch(self.revision):
            raise UsageError(f"{self.revision!r} is no branch", fix="name a branch, such as main")
        if self.public and self.pull_request:
            raise UsageError("a pull request does not make a repository public")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push did, or would do; without more than it has to be told, one that did nothing yet.

    Attributes:
        repo: ``owner/name``.
        url: of the commit or the pull request; empty in a dry run.
        commit: its id; empty in a dry run.
        tag: what names this artifact in the repository.
        pull_request: its address, or None.
        digest: of the artifact: the sha256 of ``SHA256SUMS``.
        plan_digest: of the plan that the artifact executes.
        endpoint: the Hub.
        account: who published.
        public: whether everybody can see it.
        outcome: ``published and verified`` or ``published but unverified``; empty in a dry run.
        unverified: why the artifact has no verification against hooks that counts, or None.
        ungated: why the recipe's gate on side effects does not count as held, or None.
        uploaded: names of the files that were sent or looked up by their hash.
        copied: names of those that the Hub took from the base's repository.
        deleted: names of those that were on the Hub only.
        unchanged: whether the Hub held all of it already.
        dry_run: whether nothing was done.
        notes: what the user should know.
    """

    repo: str
    url: str = ""
    commit: str = ""
    tag: str = ""
    pull_request: str | None = None
    digest: str
    plan_digest: str
    endpoint: str
    account: str
    public: bool
    outcome: str = ""
    unverified: str | None
    ungated: str | None = None
    uploaded: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    unchanged: bool = False
    dry_run: bool = False
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)
