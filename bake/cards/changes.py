"""What of the base an artifact changes: tensors in groups, counts, the files that hold weights."""

from collections import Counter
from dataclasses import dataclass

from bake.artifact.schema import KeyChange
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
        config: changed keys of ``config.json``.
        reads: whether a weight that reads an edited site is among them.
    """

    rows: tuple[ChangeRow, ...]
    more: int
    edited: int
    new: int
    unchanged: int | None
    config: tuple[KeyChange, ...]
    reads: bool


_ROWS = 100
_HOW = {"output": "edited at its output", "input": "edited at its input", "update": "updated"}


def changes(facts: Facts) -> Changes:
    """Return the changes that a plan makes."""
    plan, whole = facts.record.plan, facts.carrier.whole
    # What the plan copies, a head that is untied, stays the base's own in an adapter.
    tensors = [row for row in plan.tensors if whole or row.sides != ("copied",)]
    groups: dict[tuple[str, str], list[str]] = {}
    for row in tensors:
        how = " and ".join(_HOW.get(side, side) for side in row.sides)
        how += f", from {row.source}" if row.source not in ("", row.name) else ""
        shape = "×".join(map(str, row.shape))
        groups.setdefault((shape, f"new: {how}" if row.is_new else how), []).append(row.name)
    for bias in plan.biases:
        how = f"new bias{', zeros' if bias.zero else ''}" if bias.created else "edited bias"
        groups.setdefault(("×".join(map(str, bias.shape)), how), []).append(bias.name)
    fresh = [row.is_new for row in tensors] + [bias.created for bias in plan.biases]
    edited, total = len(fresh) - sum(fresh), facts.record.base.tensors
    rows = [
        ChangeRow(name, number, shape, how)
        for (shape, how), names in groups.items()
        for name, number in merged(names)
    ]
    return Changes(
        rows=tuple(rows[:_ROWS]),
        more=sum(row.count for row in rows[_ROWS:]),
        edited=edited,
        new=sum(fresh),
        unchanged=None if total is None else total - edited,
        config=plan.config if whole else (),
        reads=any("input" in row.sides for row in tensors),
    )


def weight_files(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Return the files of weights with the digests that the export recorded."""
    return tuple(
        (name, digest.removeprefix("sha256:"))
        for name, digest in (facts.record.files or {}).items()
        if name.endswith(facts.carrier.suffix) and "/" not in name
    )


def gguf_types(facts: Facts) -> tuple[tuple[str, str, int], ...]:
    """Return type, rounding and number of the tensors that a GGUF file holds anew."""
    gguf = facts.record.gguf
    if gguf is None:
        return ()
    found = Counter((row.type, row.rounding or "as it is") for row in gguf.tensors)
    return tuple((kind, rounding, number) for (kind, rounding), number in found.items())


def gguf_digests(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Return the GGUF files that an edited one was made from, with their digests where recorded."""
    if facts.record.gguf is None:
        return ()
    parts = () if facts.record.export is None else facts.record.export.gguf
    known = {part.name: part.sha256 for part in parts}
    return tuple((part.name, known.get(part.name, "")) for part in facts.record.gguf.base)
