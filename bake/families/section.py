"""The tables of a family file: each is a dataclass, whose fields are its keys."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from bake import section
from bake.errors import FamilyError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Json = Any  # a value of config.json: the one place where the type is the file's, not ours
Row = TypeVar("Row", bound="DataclassInstance")
KEY = "key"
"""In the metadata of a field: its key in the file, where that is another word."""

# What a value is said not to be, by the type of its field.
_MEANT = {
    str: "no text",
    int: "no whole number",
    bool: "no truth value",
    float | str: "neither a number nor a config key",
    tuple[str, ...]: "no list of texts",
    tuple[Any, ...]: "no list of allowed values",
}


class Section(section.Section):
    """A table of a family file."""

    error = FamilyError

    def read(self, kind: type[Row], **known: Any) -> Row:
        """Return the whole table as a dataclass: its fields are the keys, and there are no others.

        Args:
            kind: the dataclass; a field with a default may be left out of the file.
            known: fields that come from elsewhere than from a key of their name.

        Raises:
            FamilyError: a key is missing, unknown, or of another type than its field.
        """
        hints = get_type_hints(kind)
        for field in fields(kind):
            if field.name in known:
                continue
            key = field.metadata.get(KEY, field.name)
            value = self.value(key, hints[field.name])
            if value is not None:
                known[field.name] = value
            elif field.default is MISSING and field.default_factory is MISSING:
                raise self.missing(key)
        self.close()
        return kind(**known)

    def value(self, key: str, kind: Any, default: Any = None) -> Any:
        """Return the value of ``key`` as a type of ours, or the default when it is absent."""
        value = self.raw(key)
        if value is None:
            return default
        if get_origin(kind) is Mapping:
            if not isinstance(value, dict):
                raise FamilyError(f"{key} = {value!r} is no table", where=self.where)
            table = Section(value, f"{self.where} [{key}]")
            return {each: table.value(each, get_args(kind)[1]) for each in value}
        try:
            found = msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise FamilyError(f"{key} = {value!r} is {_meant(kind)}", where=self.where) from error
        if isinstance(found, float) and not math.isfinite(found):
            raise FamilyError(f"{key} = {value!r} is not finite", where=self.where)
        return found

    def conditions(self, key: str) -> Mapping[str, tuple[Json, ...]]:
        """Return a table of config keys with the values that each may have."""
        found = self.value(key, Mapping[str, tuple[Json, ...]], {})
        # TOML has no null: the table writes "null" for it.
        return {
            key: tuple(None if value == "null" else value for value in allowed)
            for key, allowed in found.items()
        }


def _meant(kind: Any) -> str:
    """Return what a value of another type than ``kind`` is not."""
    if NoneType in get_args(kind):
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    if get_origin(kind) is Literal:
        return f"not one of {', '.join(get_args(kind))}"
    items = get_args(kind)[:1]
    if items and get_origin(items[0]) is Literal:
        return f"no list of {', '.join(get_args(items[0]))}"
    return _MEANT[kind]
