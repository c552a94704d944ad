"""``Artifact``: what an output wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Artifact:
    """Files on disk that a runtime loads."""

    kind: str
    path: Path
    files: Mapping[str, str]
    """Every file below ``path`` with its SHA-256, in hexadecimal."""
    bytes_written: int
    bytes_edited: int
