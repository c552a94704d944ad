"""Count what is read, and keep what came over the network for the passes that follow.

A comparison reads a changed tensor several times. From a disk that is cheap; from the Hub every
range comes once, into a temporary file that lives as long as the comparison.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from bake.checkpoints.header import TensorInfo
from bake.checkpoints.source import ByteSource


@dataclass(slots=True)
class Counted:
    """Another source, and how many bytes were read from it."""

    origin: ByteSource
    count: int = 0

    def size(self, file: str) -> int:
        """Return a file's length in bytes."""
        return self.origin.size(file)

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from offset ``start`` on."""
        self.origin.read_into(file, start, buffer)
        self.count += len(buffer)


@dataclass(slots=True)
class _Kept:
    """The bytes of one tensor: a sparse file, and which stretches of it are there."""

    path: Path
    start: int
    stop: int
    present: list[tuple[int, int]] = field(default_factory=list)

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the stretches between two offsets that are not there yet."""
        gaps, position = [], start
        for low, high in self.present:
            if low > position:
                gaps.append((position, min(low, stop)))
            position = max(position, high)
            if position >= stop:
                break
        if position < stop:
            gaps.append((position, stop))
        return [(low, high) for low, high in gaps if low < high]

    def add(self, start: int, stop: int) -> None:
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self.present, (start, stop)]):
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        self.present = merged


@dataclass(slots=True)
class Spool:
    """A source whose tensors, once ``keep`` has named them, are fetched once.

    Attributes:
        origin: where the bytes come from.
        folder: an existing folder for the temporary files.
    """

    origin: ByteSource
    folder: Path
    _kept: dict[str, list[_Kept]] = field(default_factory=dict)

    def size(self, file: str) -> int:
        """Return a file's length in bytes."""
        return self.origin.size(file)

    def keep(self, info: TensorInfo) -> None:
        """Keep from now on what is read of a tensor."""
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            file.truncate(info.nbytes)
        kept = self._kept.setdefault(info.shard, [])
        kept.append(_Kept(Path(file.name), info.start, info.stop))

    def drop(self, info: TensorInfo) -> None:
        """Forget a tensor and free its space."""
        for kept in self._kept.get(info.shard, []):
            if kept.start == info.start:
                kept.path.unlink()
        self._kept[info.shard] = [k for k in self._kept[info.shard] if k.start != info.start]

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from offset ``start`` on, from the disk where it was read before."""
        stop = start + len(buffer)
        for kept in self._kept.get(file, []):
            if kept.start <= start and stop <= kept.stop:
                self._read_kept(kept, file, start, buffer)
                return
        self.origin.read_into(file, start, buffer)

    def _read_kept(self, kept: _Kept, file: str, start: int, buffer: memoryview) -> None:
        stop = start + len(buffer)
        with kept.path.open("r+b") as handle:
            for low, high in kept.missing(start, stop):
                piece = buffer[low - start : high - start]
                self.origin.read_into(file, low, piece)
                handle.seek(low - kept.start)
                handle.write(piece)
                kept.add(low, high)
            handle.seek(start - kept.start)
            handle.readinto(buffer)
