"""What the Hub states of a repository's files, so that equal files are not downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download

from bake import __version__
from bake.checkpoints.hub_errors import translated


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit: the sha256 of a large one, and the id that Git gives it.

    A large file's Git id is that of the pointer to it, and not of its content.
    """

    size: int
    sha256: str | None
    git_oid: str


@dataclass(frozen=True, slots=True, eq=False)
class Repository:
    """A repository at one commit, with what the Hub states of every file."""

    repo: str
    commit: str
    tree: Mapping[str, HubFile] = field(repr=False)

    def fetch(self, name: str) -> Path:
        """Return the path in the cache of one small file, downloaded when it is not there.

        Raises:
            HubError: the Hub refuses or cannot be reached.
        """
        with translated(self.repo, self.commit):
            return Path(hf_hub_download(self.repo, name, revision=self.commit))


def read_repository(repo: str, commit: str) -> Repository | None:
    """Return what the Hub states of a commit; None where the Hub is switched off.

    Raises:
        HubError: the Hub refuses or cannot be reached.
    """
    if constants.HF_HUB_OFFLINE:
        return None
    api = HfApi(library_name="bake", library_version=__version__)
    tree: dict[str, HubFile] = {}
    with translated(repo, commit):
        for item in api.list_repo_tree(repo, recursive=True, revision=commit):
            blob = getattr(item, "blob_id", None)
            if blob is not None:
                lfs = getattr(item, "lfs", None)
                sha256 = None if lfs is None else lfs.sha256
                tree[item.path] = HubFile(int(getattr(item, "size", 0)), sha256, blob)
    return Repository(repo, commit, tree)
