"""The pieces that a file is written from, each at its own place.

A piece is copied from the file it derives from, given as bytes, or produced tile by tile. Where the
filesystem shares blocks between files (btrfs, XFS) the whole file is cloned first and only the
produced pieces are written. ``bake.checkpoints.workers`` puts files together from them.
"""

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from bake.checkpoints.header import TensorInfo
from bake.checkpoints.source import read_at
from bake.errors import CheckpointError
from bake.tiles import row_count

if TYPE_CHECKING:
    from torch import Tensor

Producer = Callable[[], "Iterator[Tensor]"]
"""Yields consecutive tiles of a tensor, in the storage type: any split of axis 0, or of the rows
that count through all axes but the last.

A tile may live in a buffer that the producer fills again for the next one.
"""

CHUNK = 1 << 18
"""Bytes that are read at a time: few enough to be in the processor's cache for what comes next."""

_NO_SUCH_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of the original, at the same offsets."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that are given."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Fill:
    """A tensor that is produced; ``info`` says where it goes in the new file."""

    info: TensorInfo
    produce: Producer


Piece = Copy | Literal | Fill


@dataclass(frozen=True, slots=True)
class Draft:
    """A file that is to be written.

    Attributes:
        target: where; a file that is there is replaced, and its second names keep its bytes.
        pieces: what it consists of, in the order of its bytes.
        origin: the file that ``Copy`` pieces come from.
    """

    target: Path
    pieces: Sequence[Piece]
    origin: Path | None = None


def length_of(piece: Piece) -> int:
    """Return the bytes of a piece."""
    match piece:
        case Copy(start, stop):
            return stop - start
        case Literal(data):
            return len(data)
        case Fill(info, _):
            return info.nbytes


def put(piece: Piece, file: FileIO, position: int, original: FileIO | None) -> Iterator[int]:
    """Write a piece at its place in a file, and yield the length of every stretch that is done.

    Files have no common position here, so that several threads may write to one.

    Args:
        piece: to be written.
        file: open for writing.
        position: where in it the piece begins.
        original: what a ``Copy`` is taken from; None where the file is a clone and has it already.

    Raises:
        CheckpointError: a producer's tiles are not the tensor they stand for, or the original
            has become shorter.
    """
    match piece:
        case Literal(data):
            write_at(file, position, memoryview(data))
            yield len(data)
        case Fill(info, produce):
            for tile in tiles(info, produce):
                write_at(file, position, tile)
                position += len(tile)
                yield len(tile)
        case Copy(start, stop):
            if original is not None:
                _copy(original, start, file, position, stop - start)
            yield stop - start


def _copy(original: FileIO, start: int, file: FileIO, position: int, count: int) -> None:
    """Copy bytes within the kernel, which may share them or let a server do it.

    What it cannot copy (two filesystems, no such call) passes through memory.
    """
    done = 0
    if sys.platform == "linux":
        source, target = original.fileno(), file.fileno()
        try:
            while done < count and (
                copied := os.copy_file_range(
                    source, target, count - done, start + done, position + done
                )
            ):
                done += copied
        except OSError as error:
            if error.errno not in _NO_SUCH_COPY:
                raise
    buffer = memoryview(bytearray(min(CHUNK, count - done)))
    while done < count:
        chunk = buffer[: min(CHUNK, count - done)]
        read_at(original, start + done, chunk)
        write_at(file, position + done, chunk)
        done += len(chunk)


def tiles(info: TensorInfo, produce: Producer) -> Iterator[memoryview]:
    """Yield the bytes of a producer's tiles, once each is checked against the tensor.

    Raises:
        CheckpointError: another type or shape than the tensor's, or too few or too many rows.
    """
    import torch

    where = f"{info.shard}: {info.name}"
    expected, rows = row_count(info.shape), 0
    for tile in produce():
        if tile.dtype != info.torch_dtype:
            raise CheckpointError(
                f"a tile of type {tile.dtype} was produced for a tensor of {info.torch_dtype}",
                where=where,
            )
        inner = tuple(tile.shape[1:]) if info.shape else tuple(tile.shape)
        if inner not in (info.shape[1:], info.shape[1:][-1:]) or (info.shape and not tile.dim()):
            raise CheckpointError(
                f"a tile of shape {list(tile.shape)} is no part of shape {list(info.shape)}",
                where=where,
            )
        rows += row_count(tile.shape)
        if rows > expected:
            break
        yield tile.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    if rows != expected:
        more = "more than " if rows > expected else f"{rows} of "
        raise CheckpointError(f"the producer gave {more}{expected} rows", where=where)


def write_at(file: FileIO, position: int, data: memoryview) -> None:
    """Write all of some bytes at a place in a file."""
    done = 0
    while done < len(data):
        done += os.pwrite(file.fileno(), data[done:], position + done)


def clone(origin: FileIO, target: FileIO) -> bool:
    """Make ``target`` share the blocks of ``origin`` and tell whether the filesystem can do that.

    See ioctl_ficlone(2).
    """
    if sys.platform != "linux":
        return False
    import fcntl  # POSIX only

    try:
        fcntl.ioctl(target.fileno(), _FICLONE, origin.fileno())
    except OSError:
        return False  # no such call here, or two filesystems: the bytes are copied instead
    return True


def can_clone(origin: Path, folder: Path) -> bool:
    """Tell whether a clone of ``origin`` in ``folder`` takes no space."""
    with (
        origin.open("rb", buffering=0) as original,
        tempfile.TemporaryFile(dir=folder, buffering=0) as trial,
    ):
        return clone(original, trial)
