"""What the Hub sends back, compared with what was sent: every byte of every file.

The client does not compare: it takes a byte that flipped on the way for the right one.
"""

import tempfile
from pathlib import Path

from bake.publish.hub import Hub
from bake.seal.manifest import FileEntry, Manifest, entry_of
from bake.seal.seal import check

TOGETHER = 1 << 30
"""An artifact up to this size is kept whole and checked by its seal; a longer one file by file."""


def compare_download(hub: Hub, commit: str, manifest: Manifest, *, place: Path) -> list[str]:
    """Download a commit and return the names of the files that are not what the manifest says.

    Args:
        hub: who asks, and the repository.
        commit: to download.
        manifest: what its files have to be.
        place: a folder on a disk with room for the longest file, or for ``TOGETHER``.

    Raises:
        HubError: the Hub refuses or fails.
        InputError: the bytes are those that were sent, and they are no sound artifact.
    """
    keep = manifest.size <= TOGETHER
    wrong = []
    with tempfile.TemporaryDirectory(prefix=".bake-download-", dir=place) as temporary:
        folder = Path(temporary) / "files"
        for file in manifest.files:
            if fetch(hub, commit, file.name, folder).sha256 != file.sha256:
                wrong.append(file.name)
            if not keep:
                (folder / file.name).unlink()
        if keep and not wrong:
            failure = check(folder).failure()
            if failure is not None:  # equal bytes: what was sealed here was never sound
                raise failure
    return wrong


def fetch(hub: Hub, commit: str, name: str, folder: Path) -> FileEntry:
    """Download one file to a folder, from the Hub and never from the cache on this machine.

    Returns:
        what arrived, which nobody has compared yet.

    Raises:
        HubError: the Hub refuses or fails.
    """
    hub.ask(
        f"downloading {name}",
        lambda: hub.api.hf_hub_download(
            hub.to.repo,
            name,
            revision=commit,
            local_dir=folder,
            cache_dir=folder / ".cache" / "none",
        ),
    )
    return entry_of(folder / name, name)
