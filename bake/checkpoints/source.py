"""Where a checkpoint's bytes come from: a folder here, or (in ``hub``) the Hub by range."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

from bake.errors import CheckpointError

_CHUNK = 8 << 20


class ByteSource(Protocol):
    """Random access to the files of one checkpoint."""

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
        sizes: the length of each file when the checkpoint was opened.
    """

    paths: Mapping[str, Path]
    sizes: Mapping[str, int]

    def size(self, file: str) -> int:
        """Return a file's length in bytes."""
        return self.sizes[file]

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from offset ``start`` on.

        Raises:
            CheckpointError: the file has changed its length since the checkpoint was opened.
        """
        with self.paths[file].open("rb", buffering=0) as handle:
            found = os.fstat(handle.fileno()).st_size
            if found != self.sizes[file]:
                raise CheckpointError(
                    f"changed while it was in use: it had {self.sizes[file]} bytes, now {found}",
                    where=str(self.paths[file]),
                )
            read_at(handle, start, buffer)


def read_at(file: FileIO, start: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from offset ``start`` of an open file on.

    Raises:
        CheckpointError: the file ends before.
    """
    file.seek(start)
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise CheckpointError(
                f"became shorter while it was read: it ends at byte {start + done}",
                where=str(file.name),
            )
        done += count


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
