"""NumPy's .npz: a zip of named .npy arrays, stored or deflated."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from bake.directions.arrays import from_named
from bake.directions.npy import read_array
from bake.directions.reader import Content, Reader, Request
from bake.directions.torch_archive import ZIP_DAMAGE
from bake.errors import DirectionError

# Deflate shrinks zeros a thousandfold. 1 GiB is four stacks of 128 layers of width 16384 in float64
# eight times over, and little enough for any machine that holds the model.
MAX_INFLATED = 1 << 30


def _recognises(path: Path) -> bool:
    return path.suffix == ".npz"


@contextmanager
def opened_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive.

    Raises:
        DirectionError: it is encrypted, or damaged, which may show only where it is read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.flag_bits & 1:  # zipfile says so with a bare RuntimeError
                    raise DirectionError(f"{info.filename!r} of the archive is encrypted")
            yield archive
    except ZIP_DAMAGE as error:
        raise DirectionError(f"the .npz archive cannot be read: {error}") from error


def names_of(path: Path) -> frozenset[str]:
    """Return the names of the arrays of an .npz archive; none of any other file."""
    if path.suffix != ".npz":
        return frozenset()
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(name.removesuffix(".npy") for name in archive.namelist())
    except ZIP_DAMAGE:
        return frozenset()


def _read(request: Request) -> Content:
    with opened_archive(request.path) as archive:
        members = members_of(archive)
        return from_named(tuple(members), lambda name: array_of(archive, members[name]), request)


def members_of(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the arrays by name, after a check of what the archive's own directory says.

    Raises:
        DirectionError: other files, doubled names, or more than the limit.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name == info.filename:
            raise DirectionError(f"the .npz archive holds {name!r}, which is no .npy array")
        if name in members:
            raise DirectionError(f"the .npz archive holds {name!r} twice")
        members[name] = info
    total = sum(info.file_size for info in members.values())
    if total > MAX_INFLATED:
        raise DirectionError(
            f"the .npz archive inflates to {total} bytes; bake reads up to {MAX_INFLATED}",
            fix="save the directions alone",
        )
    return members


def array_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    """Return one array of an archive."""
    # subtle: the size bounds what is inflated; without it a member inflates as far as it likes and
    # is cut to the size that the directory gives it afterwards.
    with archive.open(info) as file:
        return read_array(file.read(info.file_size))


READER = Reader(
    "named NumPy arrays (.npz)", _recognises, _read, frozenset({"key", "shape", "feature"})
)
