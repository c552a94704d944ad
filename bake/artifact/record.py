"""What an artifact says of itself: ``bake.json``, and ``verify.json`` where it was verified."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.artifact.carrier import KINDS
from bake.artifact.names import regular
from bake.checkpoints import strictjson
from bake.errors import CheckpointError, InputError

RECORD = "bake.json"
VERIFICATION = "verify.json"
_LIMIT = 64_000_000
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class ArtifactRecord:
    """The facts of ``bake.json`` that publishing depends on.

    Attributes:
        content: all of it.
        kind: which output wrote the artifact.
        plan_digest: of the plan that it executes.
        base: the base model as the recipe names it.
        revision: its commit on the Hub, or None for a folder.
        changed: the tensors that the plan changes or adds.
    """

    content: Mapping[str, Any]
    kind: str
    plan_digest: str
    base: str
    revision: str | None
    changed: frozenset[str]

    @property
    def base_on_hub(self) -> bool:
        """Whether the base is a repository at a commit, and not somebody's folder."""
        path = self.content["base"].get("path")
        return path is None and re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", self.base) is not None

    @property
    def base_repo(self) -> str:
        """The base's id on the Hub, without the revision."""
        return self.base.partition("@")[0]

    @property
    def pinned(self) -> bool:
        """Whether the record names the commit that the base was read at."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON file of an artifact, read strictly.

    Raises:
        InputError: it is missing, too long or malformed.
    """
    path = regular(folder.resolve(), name)
    if path.stat().st_size > _LIMIT:
        raise InputError(f"is {path.stat().st_size} bytes long; the limit is {_LIMIT}", where=name)
    text = strictjson.decode(path.read_bytes(), where=name)
    return strictjson.parse_object(text, where=name, constants=True)


def read_record(folder: Path) -> ArtifactRecord:
    """Return the record of an artifact.

    Raises:
        InputError: the folder holds none, or a malformed one.
    """
    where = str(folder / RECORD)
    try:
        content = read_json(folder, RECORD)
    except (CheckpointError, OSError) as error:
        raise InputError(
            f"this is no artifact of bake: {RECORD} cannot be read",
            where=str(folder),
            why=str(error),
            fix="name a folder that `bake export` wrote",
        ) from error
    plan, base = _object(content, "plan", where), _object(content, "base", where)
    kind = _text(content, "kind", where)
    if kind not in KINDS:
        raise InputError(
            f"the kind {kind!r} is unknown", where=where, fix=f"known are {', '.join(KINDS)}"
        )
    revision = base.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise InputError("base.revision is no text", where=where)
    return ArtifactRecord(
        content=content,
        kind=kind,
        plan_digest=_text(plan, "digest", where),
        base=_text(base, "model", where),
        revision=revision,
        changed=frozenset(_names(plan, where)),
    )


def _names(plan: Mapping[str, Any], where: str) -> list[str]:
    """Return the names of the tensors that a plan changes or adds."""
    names = []
    for key in ("tensors", "biases"):
        rows = plan.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"plan.{key} is no list of objects", where=where)
        names += [_text(row, "name", where) for row in rows]
    return names


def _object(content: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    found = content.get(key)
    if not isinstance(found, dict):
        raise InputError(f"{key} is missing or no object", where=where)
    return found


def _text(content: Mapping[str, Any], key: str, where: str) -> str:
    found = content.get(key)
    if not isinstance(found, str) or not found:
        raise InputError(f"{key} is missing or no text", where=where)
    return found


def unverified(folder: Path, record: ArtifactRecord) -> str | None:
    """Return why an artifact does not count as verified, or None when it does.

    Raises:
        InputError: ``verify.json`` is there and malformed.
    """
    if not (folder / VERIFICATION).is_file():
        return "there is no verify.json"
    content = read_json(folder, VERIFICATION)
    if content.get("plan_digest") != record.plan_digest:
        return "verify.json is of another plan"
    rows = content.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("rows is no list of objects", where=VERIFICATION)
    failed = [str(row.get("name")) for row in rows if row.get("passed") is False]
    if content.get("passed") is not True or failed:
        return "the verification failed" + (f": {failed[0]}" if failed else "")
    if not any(row.get("passed") is True for row in rows):
        return "verify.json holds no comparison that passed"
    return None
