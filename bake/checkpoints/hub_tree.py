"""What the Hub states of a repository's files, so that equal files are not downloaded."""

from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download

from bake import __version__
from bake.checkpoints.hashes import Stated
from bake.checkpoints.hub_errors import translated


def fetch_file(repo: str, commit: str, name: str) -> Path:
    """Return the path in the cache of one small file, downloaded when it is not there.

    Raises:
        HubError: the Hub refuses or cannot be reached.
    """
    with translated(repo, commit):
        return Path(hf_hub_download(repo, name, revision=commit))


def stated_files(repo: str, commit: str) -> dict[str, Stated]:
    """Return what the Hub states of every file of a commit; nothing where it is switched off.

    Raises:
        HubError: the Hub refuses or cannot be reached.
    """
    if constants.HF_HUB_OFFLINE:
        return {}
    api = HfApi(library_name="bake", library_version=__version__)
    with translated(repo, commit):
        return read_tree(api, repo, commit)


def read_tree(api: HfApi, repo: str, commit: str) -> dict[str, Stated]:
    """Return what the Hub states of every file of a commit; failures are the client's own."""
    tree = {}
    for item in api.list_repo_tree(repo, recursive=True, revision=commit):
        blob = getattr(item, "blob_id", None)  # a folder has none
        if blob is not None:
            lfs = getattr(item, "lfs", None)
            sha256 = None if lfs is None else lfs.sha256
            tree[item.path] = Stated(int(getattr(item, "size", 0)), sha256, blob)
    return tree
