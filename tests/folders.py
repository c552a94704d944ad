"""Folders of files: what they hold, and one bit of it turned."""

from pathlib import Path


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def flip(path: Path, position: int = -1) -> None:
    """Flip the lowest bit of one byte; a negative position counts from the end."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
