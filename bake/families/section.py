"""The tables of a family file, with the kinds of value that only they hold."""

from collections.abc import Mapping
from typing import Any

from bake import section
from bake.errors import FamilyError

Json = Any  # a value of config.json: the one place where the type is the file's, not ours


class Section(section.Section):
    """A table of a family file."""

    error = FamilyError

    def strings(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Return a list of texts."""
        values = self.take(key, list, None if default is None else list(default))
        if not all(isinstance(value, str) for value in values):
            raise FamilyError(f"{key} = {values!r} is no list of texts", where=self.where)
        return tuple(values)

    def some_of(self, key: str, allowed: tuple[str, ...]) -> tuple[str, ...] | None:
        """Return a list of words, each one of ``allowed``, or None where it is left out."""
        values = self.raw(key)
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

    def number_or_key(self, key: str) -> float | str:
        """Return a number or the name of a config key; 1 where it is left out."""
        value = self._values.get(key, 1.0)
        if isinstance(value, str):
            return self.take(key, str)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FamilyError(
                f"{key} = {value!r} is neither a number nor a config key", where=self.where
            )
        return self.take(key, float, 1.0)


def strings_by_key(values: Mapping[str, Json], where: str) -> Mapping[str, str]:
    """Return a table whose values are all texts."""
    table = Section(values, where)
    return {key: table.take(key, str) for key in values}


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
