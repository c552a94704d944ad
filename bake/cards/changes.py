"""What of the base an artifact changes: tensors in groups, counts, the files that hold weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bake.artifact.carrier import KINDS
from bake.artifact.record import RECORD
from bake.cards import stored
from bake.cards.facts import Facts
from bake.cards.text import merged


@dataclass(frozen=True, slots=True)
class ChangeRow:
    """Tensors that are changed in the same way, their names run together."""

    names: str
    count: int
    shape: str
    how: str


@dataclass(frozen=True, slots=True)
class Changes:
    """What a plan does to the base's tensors.

    Attributes:
        rows: the tensors that it names, as many groups as a reader looks at.
        more: how many tensors are in no row.
        edited: how many of the base's have other values.
        new: how many the base does not have.
        unchanged: how many keep the base's bytes; None where the record does not count the base's.
        config: changed keys of ``config.json`` with their old and new values.
        reads: whether a weight that reads an edited site is among them.
    """

    rows: tuple[ChangeRow, ...]
    more: int
    edited: int
    new: int
    unchanged: int | None
    config: tuple[tuple[str, str, str], ...]
    reads: bool


_ROWS = 100
_HOW = {
    "output": "edited at its output",
    "input": "edited at its input",
    "update": "updated",
    "replaced": "replaced",
    "copied": "copied",
}


def changes(facts: Facts) -> Changes:
    """Return the changes that a plan makes.

    Raises:
        InputError: the record is malformed.
    """
    tensors = stored.objects(facts.plan, "tensors", RECORD)
    if not KINDS[facts.record.kind].whole:
        # What the plan copies, a head that is untied, stays the base's own.
        tensors = tuple(t for t in tensors if stored.words(t, "sides", RECORD) != ("copied",))
    biases = stored.objects(facts.plan, "biases", RECORD)
    groups: dict[tuple[str, str], list[str]] = {}
    edited = new = 0
    for tensor in tensors:
        name, source = (stored.text(tensor, key, RECORD) for key in ("name", "source"))
        created = stored.flag(tensor, "created", RECORD)
        fresh = source not in ("", name) if created is None else created
        new, edited = new + fresh, edited + (not fresh)
        how = _sides(tensor) + (f", from {source}" if source not in ("", name) else "")
        shape = stored.size(tensor, "shape", RECORD)
        groups.setdefault((shape, f"new: {how}" if fresh else how), []).append(name)
    for bias in biases:
        fresh = bool(stored.flag(bias, "created", RECORD))
        new, edited = new + fresh, edited + (not fresh)
        zero = ", zeros" if stored.flag(bias, "zero", RECORD) else ""
        how = f"new bias{zero}" if fresh else "edited bias"
        size = stored.whole(bias, "size", RECORD)
        groups.setdefault(("" if size is None else str(size), how), []).append(
            stored.text(bias, "name", RECORD)
        )
    total = stored.whole(facts.base, "tensors", RECORD)
    config = (
        () if not KINDS[facts.record.kind].whole else stored.objects(facts.plan, "config", RECORD)
    )
    rows = [
        ChangeRow(name, number, shape, how)
        for (shape, how), names in groups.items()
        for name, number in merged(names)
    ]
    return Changes(
        rows=tuple(rows[:_ROWS]),
        more=sum(row.count for row in rows[_ROWS:]),
        edited=edited,
        new=new,
        unchanged=None if total is None else total - edited,
        config=tuple(
            (stored.text(c, "key", RECORD), _value(c.get("old")), _value(c.get("new")))
            for c in config
        ),
        reads=any("input" in stored.words(t, "sides", RECORD) for t in tensors),
    )


def _sides(tensor: Mapping[str, Any]) -> str:
    sides = stored.words(tensor, "sides", RECORD)
    return " and ".join(_HOW.get(side, side) for side in sides)


def _value(value: object) -> str:
    """Return a value of ``config.json`` as it is written there."""
    if value is None:
        return "absent"
    return str(value).lower() if isinstance(value, bool) else str(value)


def weight_files(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Return the files of weights with the digests that the export recorded."""
    suffix = KINDS[facts.record.kind].suffix
    files = stored.mapping(facts.content, "files", RECORD)
    return tuple(
        (name, str(digest).removeprefix("sha256:"))
        for name, digest in files.items()
        if name.endswith(suffix) and "/" not in name
    )


def gguf_types(facts: Facts) -> tuple[tuple[str, str, int], ...]:
    """Return type, rounding and number of the tensors that a GGUF file holds anew."""
    found: dict[tuple[str, str], int] = {}
    gguf = stored.mapping(facts.content, "gguf", RECORD)
    for tensor in stored.objects(gguf, "tensors", RECORD):
        rounding = stored.text(tensor, "rounding", RECORD) or "as it is"
        key = (stored.text(tensor, "type", RECORD), rounding)
        found[key] = found.get(key, 0) + 1
    return tuple((kind, rounding, n) for (kind, rounding), n in found.items())


def gguf_digests(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Return the GGUF files that an edited one was made from, with their digests where recorded."""
    options = stored.mapping(facts.content, "export", RECORD)
    parts = stored.objects(options, "gguf", RECORD)
    known = {stored.text(p, "name", RECORD): stored.text(p, "sha256", RECORD) for p in parts}
    gguf = stored.mapping(facts.content, "gguf", RECORD)
    names = (stored.text(part, "name", RECORD) for part in stored.objects(gguf, "base", RECORD))
    return tuple((name, known.get(name, "")) for name in names)
