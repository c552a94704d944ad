"""What differs beside the weights: the config key by key, other files by their hashes."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bake.checkpoints import folder
from bake.checkpoints.gguf.header import GgufValue
from bake.checkpoints.hashes import git_id_of, sha256_of
from bake.diff.sources import Model
from bake.diff.weights import GgufWeights

ABSENT = "(absent)"


def plain(text: str) -> str:
    """Return a text from a stranger's file as a terminal may print it."""
    return text if text.isprintable() else ascii(text)


@dataclass(frozen=True, slots=True)
class KeyChange:
    """One key whose value differs.

    Attributes:
        key: its path, with dots between the names.
        old: the value before as JSON text, or ``ABSENT``.
        new: the value after.
    """

    key: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file beside the weights that differs.

    Attributes:
        name: relative to the model's folder.
        status: ``changed``, ``added`` or ``missing``.
        role: ``side`` for what travels with a model and runtimes read, ``other`` for the rest.
        old: digest before, ``sha256:…`` or ``git:…``, or None.
        new: digest after, or None.
    """

    name: str
    status: Literal["changed", "added", "missing"]
    role: str
    old: str | None
    new: str | None


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[KeyChange, ...]:
    """Return the keys whose values differ; objects are compared inside, lists as a whole."""
    return tuple(_keys(old, new, ()))


def _keys(
    old: Mapping[str, Any], new: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[KeyChange]:
    for key in [*old, *(key for key in new if key not in old)]:
        here = (*path, key)
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            yield from _keys(old[key], new[key], here)
            continue
        # As text, because 1 equals 1.0 and True, and NaN differs from itself.
        pair = [
            json.dumps(side[key], ensure_ascii=False) if key in side else ABSENT
            for side in (old, new)
        ]
        if pair[0] != pair[1]:
            yield KeyChange(plain(".".join(here)), *map(plain, pair))


def metadata_changes(old: GgufWeights, new: GgufWeights) -> tuple[KeyChange, ...]:
    """Return the metadata of two GGUF files that differ; long values by their digest."""
    first, second = (_metadata(side) for side in (old, new))
    names = [*first, *(name for name in second if name not in first)]
    return tuple(
        KeyChange(plain(name), plain(first.get(name, ABSENT)), plain(second.get(name, ABSENT)))
        for name in names
        if first.get(name) != second.get(name)
    )


def _metadata(weights: GgufWeights) -> dict[str, str]:
    metadata = weights.model.parts[0].header.metadata
    return {name: _shown(found) for name, found in metadata.items()}


def _shown(found: GgufValue) -> str:
    """Return a value as text; an array, and a long text, by its digest."""
    if isinstance(found.value, bytes) and len(found.value) <= 200:
        return json.dumps(found.value.decode("utf-8", errors="replace"), ensure_ascii=False)
    if found.value is None or isinstance(found.value, bytes):
        return f"sha256:{hashlib.sha256(found.raw).hexdigest()}"
    return json.dumps(found.value)


def file_changes(base: Model, out: Model) -> tuple[FileChange, ...]:
    """Return the files beside the weights that differ, in alphabetical order.

    Raises:
        HubError: the Hub refuses or cannot be reached.
        CheckpointError: a file has gone, or is a link out of its folder.
    """
    before, after = _names(base), _names(out)
    found = []
    for name in sorted({*before, *after}):
        role = after.get(name, before.get(name, "side"))
        if name.endswith("/"):
            if (name in before) != (name in after):
                status: Any = "added" if name in after else "missing"
                found.append(FileChange(name, status, "other", None, None))
            continue
        if name not in before:
            found.append(FileChange(name, "added", role, None, _digest(out, name)))
        elif name not in after:
            found.append(FileChange(name, "missing", role, _digest(base, name), None))
        else:
            pair = _pair(base, out, name)
            if pair[0] != pair[1]:
                found.append(FileChange(name, "changed", role, *pair))
    return tuple(found)


def _names(model: Model) -> Mapping[str, str]:
    """Return the files beside the weights: name, and whether a runtime may read it.

    The value is ``side`` for what travels with a model, ``other`` for its card, its records and
    weights in other formats; the name of a folder ends in ``/``. It is the Hub's list where the
    cache may hold a part of them.
    """
    if model.checkpoint is None:
        return {}
    side, other = model.checkpoint.side_files, model.checkpoint.left_out
    if model.repository is not None:
        index = model.checkpoint.index_text
        names = folder.sort_names(model.repository.tree, index, where=model.label)
        side, other = names.side_files, names.left_out
    return {**dict.fromkeys(side, "side"), **dict.fromkeys(other, "other")}


def _pair(base: Model, out: Model, name: str) -> tuple[str, str]:
    """Return two digests of one kind.

    The Hub states the sha256 of large files, and of small ones the id that Git gives them.
    """
    stated = [
        None if model.repository is None else model.repository.tree.get(name)
        for model in (base, out)
    ]
    if all(file is None or file.sha256 is None for file in stated) and any(stated):
        return tuple(  # type: ignore[return-value] # of two
            f"git:{git_id_of(_local(model, name)) if file is None else file.git_oid}"
            for model, file in zip((base, out), stated, strict=True)
        )
    return _digest(base, name), _digest(out, name)


def _digest(model: Model, name: str) -> str:
    file = None if model.repository is None else model.repository.tree.get(name)
    if file is not None and file.sha256 is not None:
        return f"sha256:{file.sha256}"
    return f"sha256:{sha256_of(_local(model, name))}"


def _local(model: Model, name: str) -> Path:
    if model.repository is not None:
        return model.repository.fetch(name)
    assert model.checkpoint is not None  # GGUF files have no files beside them
    return folder.regular_file(model.checkpoint.path, name)
