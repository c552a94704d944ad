"""``Row``: one measured number, with the limit that it is judged by."""

from dataclasses import dataclass

GROUPS = (
    "effect", "plan", "plan control", "files", "files control", "cost", "cost control", "runtime",
    "floor", "metric", "side", "gate",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number; ``passed`` is None where nothing is demanded of it."""

    name: str
    value: float
    limit: float | None
    passed: bool | None
    note: str = ""
    group: str = "metric"
    """What the number is about, one of ``GROUPS``."""


def at_most(name: str, value: float, limit: float | None, note: str, group: str) -> Row:
    """Return a number that may not exceed its limit; held against nothing where there is none."""
    return Row(name, value, limit, None if limit is None else value <= limit, note, group)


def above(name: str, value: float, limit: float | None, group: str) -> Row:
    """Return a number that has to exceed its limit; held against nothing where there is none."""
    if limit is None:
        return Row(name, value, None, None, "", group)
    return Row(name, value, limit, value > limit, "must be larger", group)


def unjudged(name: str, value: float, note: str = "", group: str = "metric") -> Row:
    """Return a number that nothing is demanded of."""
    return Row(name, value, None, None, note, group)
