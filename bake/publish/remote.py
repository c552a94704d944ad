"""What a repository on the Hub holds, and whether that is what the manifest says."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi

from bake.artifact.names import HUBS_OWN
from bake.seal.manifest import FileEntry, Manifest


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file on the Hub: sha256 of a large one, and the object id that Git gives it."""

    size: int
    sha256: str | None
    git_oid: str

    def equals(self, file: FileEntry) -> bool:
        """Tell whether these are the bytes of a local file, by hash and length."""
        if self.size != file.size:
            return False
        if self.sha256 is not None:
            return self.sha256 == file.sha256
        return file.git_oid != "" and self.git_oid == file.git_oid


def read_tree(api: HfApi, repo: str, revision: str) -> dict[str, RemoteFile]:
    """Return the files of a commit by name, without what the Hub adds by itself."""
    tree: dict[str, RemoteFile] = {}
    for item in api.list_repo_tree(repo, recursive=True, revision=revision):
        blob = getattr(item, "blob_id", None)
        if blob is not None and item.path not in HUBS_OWN:
            tree[item.path] = _remote(item, blob)
    return tree


def _remote(item: Any, blob: str) -> RemoteFile:
    sha256 = None if item.lfs is None else item.lfs.sha256
    return RemoteFile(item.size, sha256, blob)


def differences(tree: dict[str, RemoteFile], manifest: Manifest) -> list[str]:
    """Return what differs between a commit and the manifest, one line each."""
    files = manifest.by_name()
    found = []
    for name in sorted(tree.keys() | files.keys()):
        if name not in files:
            found.append(f"{name} is on the Hub only")
        elif name not in tree:
            found.append(f"{name} is not on the Hub")
        elif not tree[name].equals(files[name]):
            found.append(f"{name} has other bytes on the Hub")
    return found
