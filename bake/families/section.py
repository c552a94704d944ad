"""``Section``: a table of a TOML file that must be emptied, and the kinds of value in one."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from bake.errors import FamilyError

T = TypeVar("T")
Json = Any  # a value of config.json: the one place where the type is the file's, not ours


class Section:
    """A TOML table that must be emptied: every key is taken once, with its type."""

    def __init__(self, values: Mapping[str, Json], where: str) -> None:
        if not isinstance(values, Mapping):
            raise FamilyError(f"a table is meant, not {values!r}", where=where)
        self._values = dict(values)
        self._known: list[str] = []
        self.where = where

    def take(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return the value of ``key``; raise when it is missing or of another type."""
        self._known.append(key)
        if key not in self._values:
            if default is None:
                raise FamilyError(f"the key {key!r} is missing", where=self.where)
            return default
        value = self._values.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise FamilyError(f"{key} = {value!r} is no {kind.__name__}", where=self.where)
        return value

    def take_optional(self, key: str) -> Json:
        """Return the value of ``key`` whatever its type, or None."""
        self._known.append(key)
        return self._values.pop(key, None)

    def strings(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Return a list of strings."""
        values = self.take(key, list, None if default is None else list(default))
        if not all(isinstance(value, str) for value in values):
            raise FamilyError(f"{key} = {values!r} is no list of strings", where=self.where)
        return tuple(values)

    def some_of(self, key: str, allowed: tuple[str, ...]) -> tuple[str, ...] | None:
        """Return a list of words, each one of ``allowed``, or None where it is left out."""
        values = self.take_optional(key)
        if values is None:
            return None
        if not isinstance(values, list) or not all(value in allowed for value in values):
            raise FamilyError(
                f"{key} = {values!r} is no list of {', '.join(allowed)}", where=self.where
            )
        return tuple(values)

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> Any:
        """Return one of ``allowed``."""
        value = self.take(key, str, default)
        if value not in allowed:
            raise FamilyError(
                f"{key} = {value!r} is not one of {', '.join(allowed)}", where=self.where
            )
        return value

    def text(self, key: str) -> str | None:
        """Return a text, or None where it is left out."""
        value = self.take_optional(key)
        if value is not None and not isinstance(value, str):
            raise FamilyError(f"{key} = {value!r} is no str", where=self.where)
        return value

    def boolean(self, key: str) -> bool | None:
        """Return a truth value, or None where it is left out."""
        value = self.take_optional(key)
        if value is not None and not isinstance(value, bool):
            raise FamilyError(f"{key} = {value!r} is no bool", where=self.where)
        return value

    def number_or_key(self, key: str) -> float | str:
        """Return a number or the name of a config key; 1 where it is left out."""
        value = self.take_optional(key)
        if value is None:
            return 1.0
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise FamilyError(
            f"{key} = {value!r} is neither a number nor a config key", where=self.where
        )

    def close(self) -> None:
        """Raise when a key is left over, naming the nearest known one."""
        for key in self._values:
            raise FamilyError(
                f"unknown key {key!r}", where=self.where, fix=nearest(key, self._known)
            )


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return advice for a word that is none of the known ones."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"


def strings_by_key(values: Mapping[str, Json], where: str) -> Mapping[str, str]:
    """Return a table whose values are all texts."""
    section = Section(values, where)
    return {key: section.take(key, str) for key in values}


def conditions(values: Mapping[str, Json], where: str) -> Mapping[str, tuple[Json, ...]]:
    """Return config keys with the values that each may have."""
    for key, allowed in values.items():
        if not isinstance(allowed, list):
            raise FamilyError(f"{key} = {allowed!r} is no list of allowed values", where=where)
    # TOML has no null: the table writes "null" for it.
    return {
        key: tuple(None if value == "null" else value for value in allowed)
        for key, allowed in values.items()
    }
