"""What a file's bytes hash to: its sha256, or the id that Git gives it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from bake.progress import Tally

_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Stated:
    """What a file must hash to, by the Hub's word or by the file that is here.

    Attributes:
        size: in bytes.
        sha256: None for a small file on the Hub, of which the Hub does not state it.
        git_oid: the id that Git gives it, for a large file that of the pointer to it; empty for a
            file that is here.
    """

    size: int
    sha256: str | None
    git_oid: str

    def matches(self, path: Path, sha256: str | None = None) -> bool:
        """Tell whether a file has these bytes; ``sha256`` is its own, where it is known."""
        if self.sha256 is not None:
            return self.sha256 == (sha256 or sha256_of(path))
        return self.git_oid == git_id_of(path)


def sha256_of(path: Path, tally: Tally | None = None) -> str:
    """Return the sha256 of a file, read in chunks that are counted."""
    return _hashed(path, hashlib.sha256(), tally)


def git_id_of(path: Path) -> str:
    """Return the id that Git gives a file."""
    return _hashed(path, git_hash(path.stat().st_size))


def git_hash(size: int) -> "hashlib._Hash":
    """Return a hash that makes the id that Git gives a file of a size, once it has its bytes."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _hashed(path: Path, digest: "hashlib._Hash", tally: Tally | None = None) -> str:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if tally is not None:
                tally.advance(len(chunk))
    return digest.hexdigest()
