"""What a repository on the Hub holds, and whether that is what the manifest says."""

from huggingface_hub import HfApi

from bake.artifact.names import HUBS_OWN
from bake.checkpoints.hashes import Stated
from bake.checkpoints.hub_tree import read_tree
from bake.seal.manifest import FileEntry, Manifest


def own_tree(api: HfApi, repo: str, revision: str) -> dict[str, Stated]:
    """Return the files of a commit by name, without what the Hub adds by itself."""
    tree = read_tree(api, repo, revision)
    return {name: file for name, file in tree.items() if name not in HUBS_OWN}


def equal(remote: Stated, file: FileEntry) -> bool:
    """Tell whether a file on the Hub has the bytes of a local one, by hash and length."""
    if remote.size != file.size:
        return False
    if remote.sha256 is not None:
        return remote.sha256 == file.sha256
    return file.git_oid != "" and remote.git_oid == file.git_oid


def differences(tree: dict[str, Stated], manifest: Manifest) -> list[str]:
    """Return what differs between a commit and the manifest, one line each."""
    files = manifest.by_name()
    found = []
    for name in sorted(tree.keys() | files.keys()):
        if name not in files:
            found.append(f"{name} is on the Hub only")
        elif name not in tree:
            found.append(f"{name} is not on the Hub")
        elif not equal(tree[name], files[name]):
            found.append(f"{name} has other bytes on the Hub")
    return found
