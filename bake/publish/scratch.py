"""A folder for what is on disk for a moment only: one run at a time, and nothing left of it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bake.checkpoints.staging import lock
from bake.errors import UsageError

_LOCK = "lock"


@contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """Yield an empty folder that is removed afterwards; what a killed run left there goes first.

    Raises:
        UsageError: another run is at it, or it is not bake's.
    """
    ours = place.is_dir() and not place.is_symlink()
    if place.exists() and not (ours and (_is_empty(place) or (place / _LOCK).is_file())):
        raise UsageError(f"{place} is in the way and is not bake's", fix="remove it, run again")
    place.mkdir(exist_ok=True)
    with (place / _LOCK).open("a+b", buffering=0) as held:
        lock(held, place)
        try:
            for entry in place.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != _LOCK:
                    entry.unlink()
            yield place
        finally:
            shutil.rmtree(place)


def _is_empty(place: Path) -> bool:
    return not any(place.iterdir())
