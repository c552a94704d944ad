"""What ``bake export`` wrote: its record, its edits, and whether its files are still the same."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from bake.artifact.carrier import KINDS, Carrier
from bake.checkpoints import strictjson
from bake.checkpoints.folder import regular_file
from bake.edit_store import EDITS, FITTED, load_edits
from bake.edits import Edit
from bake.errors import BakeError, FamilyError, InputError
from bake.families import Family
from bake.families.table import parse_family

RECORD = "bake.json"
_CHUNK = 8 << 20
_LIMIT = 64_000_000
# What a record has to hold, and of which type; NoneType where it may be absent.
_TYPES: Mapping[tuple[str, ...], tuple[type, ...]] = {
    ("kind",): (str,),
    ("bake",): (str, NoneType),
    ("plan",): (dict,),
    ("plan", "digest"): (str,),
    ("plan", "exactness"): (str,),
    ("base",): (dict,),
    ("base", "model"): (str,),
    ("base", "revision"): (str, NoneType),
    ("base", "digest"): (str, NoneType),
    ("base", "path"): (str, NoneType),
    ("recipe",): (dict, NoneType),
    ("recipe", "title"): (str, NoneType),
    ("recipe", "digest"): (str, NoneType),
    ("family",): (dict, NoneType),
    ("family", "text"): (str, NoneType),
    ("verify",): (dict, NoneType),
    ("export",): (dict, NoneType),
    ("sketch",): (dict, NoneType),
    ("allow",): (list, NoneType),
    ("target",): (list, NoneType),
    ("files",): (dict, NoneType),
}


@dataclass(frozen=True, slots=True)
class Baked:
    """An artifact with the record that it carries."""

    path: Path
    record: Mapping[str, Any]
    edits: tuple[Edit, ...]
    """What the hooks apply."""
    fitted: tuple[Edit, ...] | None = None
    """What the weights hold instead, where stand-ins were fitted for some of the edits."""

    @property
    def kind(self) -> str:
        """Which output wrote it: ``checkpoint``, ``lora``, ``gguf``, …"""
        return str(self.record["kind"])

    @property
    def carrier(self) -> Carrier:
        """What kind of files it is."""
        return KINDS[self.kind]

    @property
    def merged(self) -> bool:
        """Whether it executes an adapter that was merged, and no edits: no export wrote it."""
        return not self.carrier.exported

    @property
    def exactness(self) -> str:
        """What the plan says of the artifact."""
        return str(self.record["plan"]["exactness"])

    @property
    def plan_digest(self) -> str:
        """The digest of the plan that the artifact executes."""
        return str(self.record["plan"]["digest"])

    @property
    def most_kl(self) -> float | None:
        """The share of the effect's KL that the recipe allows, where it names one."""
        found = (self.record.get("verify") or {}).get("most_kl")
        return None if found is None else float(found)

    def family(self) -> Family | None:
        """Return the table of the user's own that the artifact was made with, or None.

        Raises:
            FamilyError: it is malformed.
        """
        table = self.record.get("family")
        if table is None:
            return None
        return parse_family(str(table.get("text")), f"{RECORD}: family")

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
    """Return an artifact. Its record may be anybody's: what is used of it is checked here.

    Raises:
        InputError: the folder holds no record of bake, or a malformed one.
    """
    where = str(path / RECORD)
    try:
        file = _own_file(path, RECORD)
        if file.stat().st_size > _LIMIT:
            raise InputError(f"is {file.stat().st_size} bytes long; the limit is {_LIMIT}")
        text = strictjson.decode(file.read_bytes(), where=RECORD)
        record = strictjson.parse_object(text, where=RECORD, constants=True)
        _check_record(record)
    except (OSError, InputError, FamilyError) as error:
        reason = error.what if isinstance(error, BakeError) else error.strerror or str(error)
        raise InputError(
            f"this is no artifact of bake: {RECORD} cannot be read ({reason})",
            where=str(path),
            fix="name a folder that `bake export` wrote",
        ) from error
    if Baked(path, record, ()).merged:
        return Baked(path, record, ())
    if not (path / EDITS).is_file():
        return Baked(path, record, load_edits(path / EDITS))  # which says that it is missing
    edits = load_edits(_own_file(path, EDITS))
    for edit in edits:
        if not edit.concept.isprintable():
            raise InputError(f"the concept {edit.concept!r} cannot be shown", where=where)
    fitted = load_edits(_own_file(path, FITTED)) if "calibration" in record else None
    return Baked(path, record, edits, fitted)


def _check_record(record: Mapping[str, Any]) -> None:
    """Require the types of everything that is read from a record later.

    Raises:
        InputError: naming the key.
    """
    for names, kinds in _TYPES.items():
        value: Any = record
        for key in names[:-1]:
            value = value.get(key, {}) if isinstance(value, Mapping) else {}
        found = value.get(names[-1]) if isinstance(value, Mapping) else None
        shown = names[-1] == "text" or not isinstance(found, str) or found.isprintable()
        if not isinstance(found, kinds) or not shown:
            raise InputError(f"{'.'.join(names)} is missing or not what is meant there")
    if record["kind"] not in KINDS:
        raise InputError(f"its kind {record['kind']!r} is none of {', '.join(KINDS)}")
    for key in ("allow", "target"):
        if not all(isinstance(word, str) for word in record.get(key) or ()):
            raise InputError(f"{key} is no list of texts")
    for name, digest in (record.get("files") or {}).items():
        if not isinstance(digest, str) or not name.isprintable():
            raise InputError("files is no object of names and digests")
    limit = (record.get("verify") or {}).get("most_kl")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float)):
        raise InputError("verify.most_kl is no number")
    if limit is not None and not 0 < limit < math.inf:
        raise InputError(f"verify.most_kl is {limit}")


def changed_files(baked: Baked) -> tuple[str, ...] | None:
    """Return the names of recorded files that are missing or have other bytes than recorded.

    None where the record has no digests, so that nothing can be said.

    Raises:
        InputError: the record names a file outside the artifact.
    """
    files: Mapping[str, str] | None = baked.record.get("files")
    if files is None:
        return None
    changed = []
    for name, digest in files.items():
        if not is_inside(name):
            raise InputError(f"{RECORD} names the file {name}, outside the artifact")
        if not (baked.path / name).is_file():
            changed.append(name)
        elif _sha256(_own_file(baked.path, name)) != digest.removeprefix("sha256:"):
            changed.append(name)
    return tuple(changed)


def is_inside(name: str) -> bool:
    """Tell whether a name from a record stays below the folder that it is taken from."""
    parts = PurePosixPath(name).parts
    drive = "\\" in name or ":" in parts[0] if parts else True
    return not (drive or name.startswith("/") or ".." in parts)


def _own_file(folder: Path, name: str) -> Path:
    """Return a file of the artifact: no link out of it, but for those of the Hub's cache.

    Raises:
        InputError: it is missing, or lies outside.
    """
    resolved = folder.resolve()
    if not (resolved / name).parent.resolve().is_relative_to(resolved):
        raise InputError(f"{name} lies outside the artifact", where=str(folder))
    return regular_file(resolved, name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
