"""What differs beside the weights: the config key by key, other files by their hashes."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bake.checkpoints import folder
from bake.checkpoints.gguf.file import Gguf
from bake.checkpoints.gguf.header import GgufValue
from bake.diff.sources import Model

ABSENT = "(absent)"
Status = Literal["changed", "added", "missing"]


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
    status: Status
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


def metadata_changes(old: Gguf, new: Gguf) -> tuple[KeyChange, ...]:
    """Return the metadata of two GGUF files that differ; long values by their digest."""
    first, second = (
        {name: _shown(value) for name, value in side.parts[0].header.metadata.items()}
        for side in (old, new)
    )
    names = [*first, *(name for name in second if name not in first)]
    return tuple(
        KeyChange(plain(name), plain(first.get(name, ABSENT)), plain(second.get(name, ABSENT)))
        for name in names
        if first.get(name) != second.get(name)
    )


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
        status: Status = "changed"
        if name not in before or name not in after:
            status = "missing" if name in before else "added"
        old, new = None, None
        if not name.endswith("/"):
            pair = base if name in before else None, out if name in after else None
            old, new = _digests(pair, name)
        if status != "changed" or old != new:
            found.append(FileChange(name, status, role, old, new))
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
    if model.hub:
        index = model.checkpoint.index_text
        names = folder.sort_names(model.hub, index, where=model.label)
        side, other = names.side_files, names.left_out
    return {**dict.fromkeys(side, "side"), **dict.fromkeys(other, "other")}


def _digests(models: Sequence[Model | None], name: str) -> list[str | None]:
    """Return the digests of a file in the models that have it, of one kind.

    The Hub states the sha256 of large files, and of small ones the id that Git gives them.
    """
    having = [model for model in models if model is not None]
    stated = [model.hub[name] for model in having if name in model.hub]
    small = len(having) > 1 and bool(stated) and all(file.sha256 is None for file in stated)
    kind: Literal["sha256", "git"] = "git" if small else "sha256"
    return [None if model is None else model.digest(name, kind) for model in models]
