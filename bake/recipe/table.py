"""``Table``: a table of a recipe as a class of its keys, read strictly."""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Self, get_args

import msgspec
from msgspec import structs
from msgspec.structs import FieldInfo

from bake.errors import UsageError
from bake.section import Toml, nearest

_EXPECTED = re.compile(r"Expected `(.+?)`, got ")
# msgspec's names of types, in the words of a recipe.
_WORDS = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "truth value",
    "array": "list",
    "object": "table",
}


class Table(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A table of a recipe: its keys, with the type and the range of each.

    ``Meta.extra`` of a type holds what a message says: ``known``, the words that a text may be;
    ``meant``, what else than the type's name the value is not; ``range`` with ``why`` and ``fix``,
    what is said of a value out of its range. ``several`` takes one text for a list of it.
    """

    @classmethod
    def keys(cls, values: Toml, where: str) -> Mapping[str, FieldInfo]:
        """Return the fields by key, where a table has all that it needs and no other.

        Raises:
            UsageError: it is no table, or a key is missing or unknown.
        """
        if not isinstance(values, dict):
            raise UsageError(f"a table is meant, not {values!r}", where=where)
        fields = {field.encode_name: field for field in structs.fields(cls)}
        for key, field in fields.items():
            if field.required and key not in values:
                near = difflib.get_close_matches(key, values, n=1)
                fix = f"did you mean {key!r} by {near[0]!r}?" if near else "add it"
                raise UsageError(f"the key {key!r} is missing", where=where, fix=fix)
        for key in values:
            if key not in fields:
                raise UsageError(f"unknown key {key!r}", where=where, fix=nearest(key, fields))
        return fields

    @classmethod
    def read(cls, values: Toml, where: str) -> Self:
        """Return the table with the values of a file.

        Raises:
            UsageError: it is no table; a key is missing or unknown, or its value of another type,
                out of its range or not finite.
        """
        found = {
            field.name: value_of(key, values[key], field.type, where)
            for key, field in cls.keys(values, where).items()
            if key in values
        }
        return cls(**found)


def value_of(key: str, value: Toml, kind: Any, where: str) -> Any:
    """Return the value of a key as the type that it is meant to be.

    Raises:
        UsageError: it is of another type, out of its range or not finite.
    """
    rules = dict(_rules(kind))
    if "several" in rules and isinstance(value, str):
        value = [value]
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{key} = {value!r} is not finite", where=where)
    try:
        found = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _refusal(key, value, str(error), rules, where) from error
    if isinstance(found, str) and found not in (known := rules.get("known", (found,))):
        raise UsageError(f"{key} = {found!r} is unknown", where=where, fix=nearest(found, known))
    return found


def _rules(kind: Any) -> Iterator[tuple[str, Any]]:
    for meta in getattr(kind, "__metadata__", ()):
        yield from (meta.extra or {}).items()
    for inner in get_args(kind):
        yield from _rules(inner)


def _refusal(key: str, value: Toml, text: str, rules: Mapping[str, Any], where: str) -> UsageError:
    """Return what is wrong with a value, which msgspec says as ``Expected `int`, got `str```."""
    if match := _EXPECTED.match(text):
        words = [_WORDS.get(word, word) for word in match[1].split(" | ") if word != "null"]
        meant = rules.get("meant", f"no {' or '.join(words)}")
        return UsageError(f"{key} = {value!r} is {meant}", where=where)
    if value == []:
        return UsageError(f"{key} is an empty list", where=where)
    if text.startswith("Number out of range"):
        return UsageError(f"{key} = {'inf' if value > 0 else '-inf'} is not finite", where=where)
    shown = float(value) if text.startswith("Expected `float`") else value
    return UsageError(
        f"{key} = {shown} {rules['range']}",
        where=where,
        why=rules.get("why"),
        fix=rules.get("fix"),
    )
