"""A small file that appears whole or not at all."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, data: bytes, *, beside: Path | None = None) -> None:
    """Write a file under a name of its own, and rename it once it is on the disk.

    Args:
        path: the file; one that is there is replaced.
        data: all of it.
        beside: where it is written first, on the same file system; the file's own folder unless
            given. A killed run leaves it there.
    """
    partial = (beside or path.parent) / f".bake-{secrets.token_hex(8)}.partial"
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
