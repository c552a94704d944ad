"""The tables of a family file, and the kinds of value that only they hold."""

from typing import Annotated, Any

from msgspec import Meta

from bake import section
from bake.errors import FamilyError

Json = Any  # a value of config.json: the one place where the type is the file's, not ours
Texts = Annotated[tuple[str, ...], Meta(extra={"meant": "no list of texts"})]
Modules = Annotated[tuple[str, ...], Meta(extra={"several": True, "meant": "no list of texts"})]
"""A path, or several."""
NumberOrKey = Annotated[float | str, Meta(extra={"meant": "neither a number nor a config key"})]
"""A number, or the config key that holds it."""
Factors = Annotated[
    float | str | tuple[str, ...], Meta(extra={"meant": "neither a number nor config keys"})
]
"""The same, or several keys whose product it is."""
Size = Annotated[str | int | tuple[str, ...], Meta(extra={"meant": "neither a key nor a size"})]
"""A config key, several that versions of the class call the same, or the size itself; ``len:KEY``
is how many the list of a key has, and ``rows:TENSOR`` of a branch's own sizes how many rows a
tensor of the block has, where the class computes it: ``/head_dim`` behind it divides by that."""
Allowed = Annotated[tuple[Json, ...], Meta(extra={"meant": "no list of allowed values"})]
"""The values that a config key may have."""


class Table(section.Table, frozen=True, kw_only=True):
    """A table of a family file."""

    error = FamilyError

    @classmethod
    def value(cls, key: str, value: section.Toml, kind: Any, where: str) -> Any:
        """Return the value of a key; TOML has no null, and a list of values has "null" for it."""
        found = super().value(key, value, kind, where)
        return tuple(None if v == "null" else v for v in found) if kind == Allowed else found


def size_keys(size: str | int | tuple[str, ...]) -> tuple[str, ...]:
    """Return the config keys of a size, ``len:`` before those of lists."""
    if isinstance(size, int) or rows_of(size):
        return ()
    return (size,) if isinstance(size, str) else size


def length_of(key: str) -> str | None:
    """Return the key whose list has a size as its length, or None where it holds the size."""
    return key.removeprefix("len:") if key.startswith("len:") else None


def rows_of(size: str | int | tuple[str, ...]) -> str:
    """Return the tensor below the block whose rows are a size, or nothing."""
    of = size if isinstance(size, str) else ""
    return of.removeprefix("rows:") if of.startswith("rows:") else ""
