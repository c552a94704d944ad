"""What ``bake export`` wrote: its record, its edits, and whether its files are still the same."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.edit_store import load_edits
from bake.edits import Edit
from bake.errors import InputError

RECORD, EDITS = "bake.json", "bake/edits.safetensors"
CHECKPOINT = "checkpoint"
_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class Baked:
    """An artifact with the record that it carries."""

    path: Path
    record: Mapping[str, Any]
    edits: tuple[Edit, ...]

    @property
    def kind(self) -> str:
        """Which output wrote it: ``checkpoint``, ``lora``, ``gguf``, …"""
        return str(self.record["kind"])

    @property
    def exactness(self) -> str:
        """What the plan says of the artifact."""
        return str(self.record["plan"]["exactness"])

    @property
    def plan_digest(self) -> str:
        """The digest of the plan that the artifact executes."""
        return str(self.record["plan"]["digest"])

    @property
    def base(self) -> str:
        """Where the base model is: a folder, or a Hub id with its commit."""
        path = self.record["base"].get("path")
        return self.base_name if path is None else str((self.path / path).resolve())

    @property
    def base_name(self) -> str:
        """The base model as the record names it, with its commit."""
        base = self.record["base"]
        return f"{base['model']}@{base['revision']}" if base.get("revision") else str(base["model"])


def open_baked(path: Path) -> Baked:
    """Return an artifact.

    Raises:
        InputError: the folder holds no record of bake, or a malformed one.
    """
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        kind, plan, base = record["kind"], record["plan"], record["base"]
        _ = plan["digest"], plan["exactness"], base["model"]
        files = record.get("files", {})
        known = isinstance(kind, str) and all(
            isinstance(name, str) and isinstance(digest, str) for name, digest in files.items()
        )
        if not known:
            raise ValueError("kind is no text, or files is no object of texts")
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"this is no artifact of bake: {RECORD} cannot be read ({error!r})",
            where=str(path),
            fix="name a folder that `bake export` wrote",
        ) from error
    return Baked(path, record, load_edits(path / EDITS))


def changed_files(baked: Baked) -> tuple[str, ...] | None:
    """Return the names of recorded files that are missing or have other bytes than recorded.

    None where the record has no digests, so that nothing can be said.

    Raises:
        InputError: the record names a file outside the artifact.
    """
    files: Mapping[str, str] | None = baked.record.get("files")
    if files is None:
        return None
    folder = baked.path.resolve()
    changed = []
    for name, digest in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder):
            raise InputError(f"{RECORD} names the file {name}, outside the artifact")
        if not path.is_file() or _sha256(path) != digest.removeprefix("sha256:"):
            changed.append(name)
    return tuple(changed)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
