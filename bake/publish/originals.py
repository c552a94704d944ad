"""The shards of a base that never lies here as a whole: one of them at a time, each one checked."""

from dataclasses import dataclass, field
from pathlib import Path

from bake.artifact.names import CARD
from bake.checkpoints import Checkpoint
from bake.checkpoints.source import LocalFiles
from bake.errors import CheckpointError, HubError
from bake.publish.commit import patiently
from bake.publish.download import fetch
from bake.publish.failures import Account, told
from bake.publish.remote import RemoteFile
from bake.seal.manifest import FileEntry, entry_of


@dataclass(slots=True)
class Originals:
    """A base's shards as files. It serves as the base's byte source, too.

    A shard of a base on the Hub is compared with the hash that the Hub states before anything is
    read from it, wherever it comes from.

    Attributes:
        checkpoint: the base.
        tree: its files on the Hub; None for a base in a folder.
        folder: where one shard at a time is downloaded to.
        account: who reads the base, for messages.
    """

    checkpoint: Checkpoint
    tree: dict[str, RemoteFile] | None
    folder: Path
    account: Account
    _checked: set[str] = field(default_factory=set)
    _here: str | None = None

    @property
    def downloads(self) -> bool:
        """Whether shards have to be downloaded."""
        return self.tree is not None and not isinstance(self.checkpoint.files, LocalFiles)

    def path(self, shard: str) -> Path:
        """Return a shard on this machine, in place of the one before if it has to be downloaded.

        Raises:
            HubError: the Hub fails, or the bytes are not those that it states.
        """
        if not self.downloads:
            path = self.checkpoint.file(shard)
            if self.tree is not None and shard not in self._checked:
                self._check(shard, path)
                self._checked.add(shard)
            return path
        path = self.folder / shard
        if self._here != shard:
            self.drop()
            self._check(shard, self.fetch(shard))
            self._here = shard
        return path

    def fetch(self, name: str) -> Path:
        """Download one of the base's files to the folder."""
        with told(self.account, f"downloading {name} of the base"):
            return patiently(
                lambda: fetch(self.account.repo, str(self.checkpoint.revision), name, self.folder)
            )

    def drop(self) -> None:
        """Remove the shard that was downloaded last."""
        if self._here is not None:
            (self.folder / self._here).unlink()
            self._here = None

    def _check(self, name: str, path: Path) -> None:
        assert self.tree is not None
        if name not in self.tree or not self.tree[name].equals(entry_of(path, name)):
            raise HubError(
                f"{name} of {self.account.repo} is not what the Hub states",
                where=str(path),
                why="it was damaged on the way or on this disk",
                fix="run again; remove the file from the cache if it stays so",
            )

    def side_files(self) -> Path:
        """Download the card and every file that travels beside the weights; return their folder.

        Raises:
            HubError: the Hub fails, or the bytes are not those that it states.
        """
        if self.tree is None:
            return self.checkpoint.path
        for name in (*self.checkpoint.side_files, CARD):
            if name != CARD or CARD in self.tree:
                self._check(name, self.fetch(name))
        return self.folder

    def entry(self, shard: str, name: str) -> FileEntry:
        """Return the manifest's entry of an untouched shard; one on the Hub is not downloaded.

        Args:
            shard: its name in the base.
            name: its name in the artifact.
        """
        stated = None if self.tree is None else self.tree.get(shard)
        if stated is None or stated.sha256 is None:
            return entry_of(self.path(shard), name)
        return FileEntry(name, stated.size, stated.sha256, "", (0, 0, 0))

    def size(self, file: str) -> int:
        """Return a shard's length in bytes."""
        return self.checkpoint.shard_sizes[file]

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from offset ``start`` on.

        Raises:
            CheckpointError: the shard is shorter than its header says.
        """
        done = 0
        with self.path(file).open("rb", buffering=0) as handle:
            handle.seek(start)
            while done < len(buffer):
                count = handle.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(f"ends at byte {start + done}", where=file)
                done += count
