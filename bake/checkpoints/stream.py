"""Write one file front to back from pieces, and hash it on the way.

A piece is copied from the file it derives from, given as bytes, or produced tile by tile. Where the
filesystem shares blocks between files (btrfs, XFS) the whole file is cloned first and only the
produced pieces are written. Elsewhere the bytes pass through this process: they have to anyway,
because each output file is hashed.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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

_CHUNK = 8 << 20
_WORTH_A_THREAD = 1 << 16  # bytes: below, hashing takes less than handing it over
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


def write_file(
    target: Path,
    pieces: Sequence[Piece],
    *,
    origin: Path | None,
    advance: Callable[[int], None],
) -> str:
    """Write ``target`` from consecutive pieces, sync it to disk and return its sha256.

    Memory stays at one chunk or one tile, whatever the size of the file or of its tensors.

    Args:
        target: the file to write; an existing one is replaced.
        pieces: in the order of their bytes.
        origin: the file that ``Copy`` pieces come from.
        advance: called with the length of each stretch that is done.

    Raises:
        CheckpointError: a producer's tiles are not the tensor they stand for, or the original
            has become shorter.
    """
    digest = hashlib.sha256()
    with (
        target.open("w+b", buffering=0) as file,
        (origin or target).open("rb", buffering=0) as original,
        ThreadPoolExecutor(1) as pool,
    ):
        cloned = origin is not None and clone(original, file)
        # subtle: a clone is hashed from the clone itself, so that the digest is that of the
        # output even if somebody writes to the original meanwhile.
        stretches = _stretches(pieces, file if cloned else original)
        position = 0
        for stretch, present in stretches:
            # The digest releases the interpreter, so hashing and writing overlap. Both are done
            # before the next stretch is asked for, because it may reuse the memory.
            beside = len(stretch) >= _WORTH_A_THREAD
            hashed = pool.submit(digest.update, stretch) if beside else None
            if not (cloned and present):
                _write_at(file, position, stretch)
            if hashed is None:
                digest.update(stretch)
            else:
                hashed.result()
            position += len(stretch)
            advance(len(stretch))
        file.truncate(position)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _stretches(pieces: Sequence[Piece], reader: FileIO) -> Iterator[tuple[memoryview, bool]]:
    """Yield the bytes of all pieces, and whether a clone holds them already."""
    copied = (piece.stop - piece.start for piece in pieces if isinstance(piece, Copy))
    buffer = memoryview(bytearray(min(_CHUNK, max(copied, default=0))))
    for piece in pieces:
        match piece:
            case Literal(data):
                yield memoryview(data), False
            case Fill(info, produce):
                for tile in tiles(info, produce):
                    yield tile, False
            case Copy(start, stop):
                for begin in range(start, stop, _CHUNK):
                    chunk = buffer[: min(_CHUNK, stop - begin)]
                    read_at(reader, begin, chunk)
                    yield chunk, True


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


def _write_at(file: FileIO, position: int, data: memoryview) -> None:
    file.seek(position)
    done = 0
    while done < len(data):
        done += file.write(data[done:])


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
