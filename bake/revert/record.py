"""What a revert needs of ``bake.json``: which base, which tensors, which keys of the config."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.artifact.base_digests import recorded_digests
from bake.checkpoints import strictjson
from bake.checkpoints.folder import regular_file
from bake.errors import CheckpointError, InputError, UsageError

RECORD = "bake.json"
REVERTIBLE = ("checkpoint", "merge", "gguf")
_LIMIT = 64_000_000
_ADAPTERS = {
    "lora": "leave the adapter away when you load the base",
    "gguf-lora": "start the base's GGUF without --lora",
    "control-vector": "start the base's GGUF without --control-vector",
}


@dataclass(frozen=True, slots=True)
class RevertRecord:
    """The facts of an artifact's record.

    Attributes:
        folder: the artifact's, resolved.
        content: the whole record.
        kind: one of ``REVERTIBLE``.
        model: the base as the recipe names it.
        revision: the base's commit on the Hub, or None.
        base_path: where a local base was, or None.
        base_digest: ``Checkpoint.digest`` of the base, or None in records that lack it.
        edited: tensors of the base that the plan changes.
        created: tensors that the base does not have.
        base_tensors: the sha256 of the edited tensors in the base; empty in records that lack it.
    """

    folder: Path
    content: Mapping[str, Any]
    kind: str
    model: str
    revision: str | None
    base_path: Path | None
    base_digest: str | None
    edited: frozenset[str]
    created: frozenset[str]
    base_tensors: Mapping[str, str]

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan, as the record has it."""
        found: Mapping[str, Any] = self.content["plan"]
        return found

    @property
    def exported(self) -> frozenset[str]:
        """The names of the files that the export wrote."""
        return frozenset(self.content.get("files", {}))


def read_revertible(folder: Path) -> RevertRecord:
    """Return the record of an artifact that there is something to revert in.

    Raises:
        UsageError: the artifact leaves its base as it is.
        InputError: the folder is no artifact of bake, or its record is malformed.
    """
    where = str(folder / RECORD)
    content = _read(folder, where)
    kind = content.get("kind")
    if kind in _ADAPTERS:
        raise UsageError(
            f"there is nothing to revert: a {kind} leaves its base as it is",
            fix=_ADAPTERS[kind],
        )
    if kind not in REVERTIBLE:
        raise InputError(
            f"an artifact of kind {kind!r} cannot be reverted",
            where=where,
            why="its record names no plan that says which tensors were changed",
            fix="use the base that the record names",
        )
    try:
        return _parsed(folder, content, str(kind))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"the record is malformed: {error!r}", where=where, fix="download the artifact again"
        ) from error


def _read(folder: Path, where: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError("there is no such folder", where=str(folder))
    try:
        path = regular_file(folder.resolve(), RECORD)
        if path.stat().st_size > _LIMIT:
            raise InputError(f"is {path.stat().st_size} bytes long; the limit is {_LIMIT}")
        text = strictjson.decode(path.read_bytes(), where=where)
        return strictjson.parse_object(text, where=where, constants=True)
    except (CheckpointError, OSError) as error:
        raise InputError(
            f"this is no artifact of bake: {RECORD} cannot be read",
            where=str(folder),
            why=str(error),
            fix="name a folder that `bake export` wrote",
        ) from error


def _parsed(folder: Path, content: dict[str, Any], kind: str) -> RevertRecord:
    plan, base = content["plan"], content["base"]
    tensors = {str(row["name"]): str(row["source"]) for row in plan["tensors"]}
    biases = {str(row["name"]): bool(row["created"]) for row in plan["biases"]}
    created = {name for name, source in tensors.items() if source != name}
    created |= {name for name, new in biases.items() if new}
    for change in plan["config"]:
        _ = change["key"], change["old"], change["new"]
    _check_rest(content)
    path = base.get("path")
    edited = frozenset((tensors.keys() | biases.keys()) - created)
    before = recorded_digests(content)
    if before and before.keys() != edited:
        raise ValueError(f"base_tensors and the plan disagree on {min(before.keys() ^ edited)}")
    return RevertRecord(
        folder=folder.resolve(),
        content=content,
        kind=kind,
        model=str(base["model"]),
        revision=None if base.get("revision") is None else str(base["revision"]),
        base_path=None if path is None else folder.resolve() / str(path),
        base_digest=None if base.get("digest") is None else str(base["digest"]),
        edited=edited,
        created=frozenset(created),
        base_tensors=before,
    )


def _check_rest(content: Mapping[str, Any]) -> None:
    """Require the form of what is read later."""
    if not isinstance(content.get("files", {}), dict):
        raise TypeError("files is no object")
    for key in ("allow", "target"):
        words = content.get(key, [])
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise TypeError(f"{key} is no list of texts")
    own = content.get("family")
    if own is not None:
        _ = own["text"], own["file"]
