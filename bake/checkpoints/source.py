"""Where a checkpoint's bytes come from: a folder here, or (in ``hub``) the Hub by range.

What is read here must not change meanwhile: the output would be a mixture of two models. Every file
is compared with what it was at first, at each time that it is opened, and once more at the end.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Protocol

from bake.errors import CheckpointError

_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Stamps:
    """Files as they were when they were first looked at.

    Attributes:
        found: for each file its device, inode, length in bytes, and the times of the last change of
            its content and of itself in nanoseconds. The last one cannot be set by a program, so
            that a copy which keeps its times is told apart too.
    """

    found: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Iterable[Path]) -> "Stamps":
        """Return the stamps of files as they are now."""
        return cls({path: _stamp(path.stat()) for path in paths})

    def __or__(self, other: "Stamps") -> "Stamps":
        return Stamps({**self.found, **other.found})

    def check(self) -> None:
        """Require that no file has changed.

        Raises:
            CheckpointError: one has, or is gone.
        """
        for path in self.found:
            try:
                self.check_one(path, path.stat())
            except FileNotFoundError as error:
                raise _changed(path) from error

    def check_one(self, path: Path, now: os.stat_result) -> None:
        """Require that a file has not changed, whose status is given.

        Raises:
            CheckpointError: it has.
        """
        if _stamp(now) != self.found[path]:
            raise _changed(path)


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    times = found.st_mtime_ns, found.st_ctime_ns
    return found.st_dev, found.st_ino, found.st_size, *times


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        "changed while it was in use",
        where=str(path),
        why="what is made of it would be a mixture of what it was and what it is",
        fix="run the same command again when nothing writes there",
    )


class ByteSource(Protocol):
    """Random access to the files of one checkpoint."""

    @property
    def stamps(self) -> Stamps:
        """What is read of this machine, as it was at first."""
        ...

    def size(self, file: str) -> int:
        """Return a file's length in bytes."""
        ...

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of ``file`` from offset ``start`` on."""
        ...


def chunks(source: ByteSource, file: str, start: int, stop: int) -> Iterator[memoryview]:
    """Yield the bytes of a file between two offsets; each chunk is valid until the next."""
    buffer = memoryview(bytearray(min(_CHUNK, stop - start)))
    for begin in range(start, stop, _CHUNK):
        chunk = buffer[: min(_CHUNK, stop - begin)]
        source.read_into(file, begin, chunk)
        yield chunk


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """Files in a folder.

    Attributes:
        paths: the checked path of each file, links resolved.
        stamps: of these files when the checkpoint was opened, and of what else belongs to it.
    """

    paths: Mapping[str, Path]
    stamps: Stamps

    def size(self, file: str) -> int:
        """Return a file's length in bytes."""
        return self.stamps.found[self.paths[file]][2]

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from offset ``start`` on.

        Raises:
            CheckpointError: the file has changed since the checkpoint was opened.
        """
        with self.paths[file].open("rb", buffering=0) as handle:
            self.stamps.check_one(self.paths[file], os.fstat(handle.fileno()))
            read_at(handle, start, buffer)


def read_at(file: FileIO, start: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from offset ``start`` of an open file on, whose own position stays.

    Raises:
        CheckpointError: the file ends before.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(file.fileno(), [buffer[done:]], start + done)
        if not count:
            raise CheckpointError(
                f"became shorter while it was read: it ends at byte {start + done}",
                where=str(file.name),
            )
        done += count


@dataclass(slots=True)
class Counted:
    """Another source, and how many bytes were read from it, in all threads together."""

    origin: ByteSource
    count: int = 0
    _turn: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    @property
    def stamps(self) -> Stamps:
        """What is read of this machine, as it was at first."""
        return self.origin.stamps

    def size(self, file: str) -> int:
        """Return a file's length in bytes."""
        return self.origin.size(file)

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from offset ``start`` on."""
        self.origin.read_into(file, start, buffer)
        with self._turn:
            self.count += len(buffer)
