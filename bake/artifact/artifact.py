"""``Artifact``: what an output wrote."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Artifact:
    """Files on disk that a runtime loads."""

    kind: str
    path: Path
    files: Mapping[str, str]
    """Every file below ``path`` with its SHA-256, in hexadecimal."""
    bytes_written: int
    bytes_edited: int

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {"path": str(self.path), "files": dict(self.files)}
