"""``Spool``: keep what came over the network for the passes that follow.

A comparison reads a changed tensor several times. From a disk that is cheap; from the Hub it
comes once, into a temporary file that lives as long as the comparison.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from bake.checkpoints.header import TensorInfo
from bake.checkpoints.source import ByteSource, Stamps, chunks


@dataclass(slots=True)
class Spool:
    """A source whose tensors, once ``keep`` has named them, are read from the disk.

    Attributes:
        origin: where the bytes come from.
        folder: an existing folder for the temporary files.
    """

    origin: ByteSource
    folder: Path
    _kept: dict[tuple[str, int], tuple[int, Path]] = field(default_factory=dict)
    """By file and first offset of a tensor: its end, and where its bytes are."""

    @property
    def stamps(self) -> Stamps:
        """What is read of this machine, as it was at first."""
        return self.origin.stamps

    def size(self, file: str) -> int:
        """Return a file's length in bytes."""
        return self.origin.size(file)

    def keep(self, info: TensorInfo) -> None:
        """Fetch a tensor and keep its bytes: whoever asks for it reads all of it, and again."""
        if (info.shard, info.start) in self._kept:
            return  # a head that was tied is compared with the embedding as well
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            for chunk in chunks(self.origin, info.shard, info.start, info.stop):
                file.write(chunk)
        self._kept[info.shard, info.start] = (info.stop, Path(file.name))

    def drop(self, info: TensorInfo) -> None:
        """Forget a tensor and free its space."""
        self._kept.pop((info.shard, info.start))[1].unlink()

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from offset ``start`` on, from the disk where it was kept."""
        for (name, first), (stop, path) in self._kept.items():
            if name == file and first <= start and start + len(buffer) <= stop:
                with path.open("rb") as handle:
                    handle.seek(start - first)
                    handle.readinto(buffer)
                return
        self.origin.read_into(file, start, buffer)
