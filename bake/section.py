"""``Table``: a table of a TOML file as a class of its keys, read strictly.

Recipes and family tables are read so: a key that is missing, unknown or of another type than its
field is an error that names the nearest known one.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeGuard, get_args, get_origin

import msgspec
from msgspec import structs
from msgspec.structs import FieldInfo

from bake.errors import BakeError
from bake.unseen import unseen

Toml = Any  # a value of the file: the one place where the type is the file's, not ours

_EXPECTED = re.compile(r"Expected `(.+?)`, got ")
# msgspec's names of types, in the words of our messages.
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
    """A table of a file: its keys, with the type and the range of each.

    Each kind of file has a subclass, which names the error that is raised. ``Meta.extra`` of a type
    holds what a message says: ``known``, the words that a text may be; ``meant``, what else than
    the type's name the value is not; ``range`` with ``why`` and ``fix``, what is said of a value
    out of its range. ``several`` takes one text for a list of it.
    """

    error: ClassVar[type[BakeError]]
    named: ClassVar[str] = ""
    """The field that is no key, but the table's own name among several; empty where none is."""

    @classmethod
    def keys(cls, values: Toml, where: str, known: Iterable[str] = ()) -> Mapping[str, FieldInfo]:
        """Return the fields by key, where a table has all that it needs and no other.

        Args:
            values: the table.
            where: its place, for messages.
            known: fields that are no keys here.

        Raises:
            BakeError: it is no table, or a key is missing or unknown.
        """
        if not isinstance(values, dict):
            raise cls.error(f"a table is meant, not {values!r}", where=where)
        fields = {f.encode_name: f for f in structs.fields(cls) if f.name not in known}
        for key, field in fields.items():
            if field.required and key not in values:
                strange = [other for other in values if other not in fields]
                near = difflib.get_close_matches(key, strange, n=1)
                fix = f"did you mean {key!r} by {near[0]!r}?" if near else "add it"
                raise cls.error(f"the key {key!r} is missing", where=where, fix=fix)
        for key in values:
            if key not in fields:
                raise cls.error(f"unknown key {key!r}", where=where, fix=nearest(key, fields))
        return fields

    @classmethod
    def read(cls, values: Toml, where: str, **known: Any) -> Self:
        """Return the table with the values of a file, and with those of fields that are no keys.

        Raises:
            BakeError: it is no table; a key is missing or unknown, or its value of another type,
                out of its range or not finite.
        """
        found = {
            field.name: cls.value(key, values[key], field.type, where)
            for key, field in cls.keys(values, where, known).items()
            if key in values
        }
        return cls(**found, **known)

    @classmethod
    def value(cls, key: str, value: Toml, kind: Any, where: str) -> Any:
        """Return the value of a key as the type that it is meant to be, tables below it included.

        Raises:
            BakeError: it is of another type, out of its range or not finite.
        """
        plain = _plain(kind)
        items = get_args(plain)
        if _is_table(plain):
            return plain.read(cls.value(key, value, dict, where), f"{where} [{key}]")
        if get_origin(plain) is Mapping:
            return cls._mapping(key, cls.value(key, value, dict, where), items[1], where)
        if items and _is_table(items[0]):
            rows = cls.value(key, value, list, where)
            return tuple(items[0].read(row, f"{where} [[{key}]] {_label(row)}") for row in rows)
        return cls._plain_value(key, value, kind, where)

    @classmethod
    def _mapping(cls, key: str, values: Mapping[str, Toml], kind: Any, where: str) -> Any:
        if not _is_table(kind):
            inside = f"{where} [{key}]"
            return {name: cls.value(name, value, kind, inside) for name, value in values.items()}
        return {
            name: kind.read(
                row, f"{where} [{key}.{name}]", **({kind.named: name} if kind.named else {})
            )
            for name, row in values.items()
        }

    @classmethod
    def _plain_value(cls, key: str, value: Toml, kind: Any, where: str) -> Any:
        rules = dict(reversed([*_rules(kind)]))  # of two that say the same, the outer counts
        if "several" in rules and isinstance(value, str):
            value = [value]
        for odd in () if kind in (dict, list) else _not_finite(value):  # those hold other keys
            raise cls.error(f"{key} = {odd!r} is not finite", where=where)
        try:
            found = msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise cls._refusal(key, value, str(error), rules, where) from error
        if isinstance(found, str) and found not in (known := rules.get("known", (found,))):
            raise cls.error(f"{key} = {found!r} is unknown", where=where, fix=nearest(found, known))
        return found

    @classmethod
    def _refusal(
        cls, key: str, value: Toml, text: str, rules: Mapping[str, Any], where: str
    ) -> BakeError:
        """Return what is wrong with a value; msgspec says it as ``Expected `int`, got `str```."""
        match = _EXPECTED.match(text)
        if match or (text.startswith("Invalid enum value") and "range" not in rules):
            words = match[1].split(" | ") if match else []
            plain = " or ".join(_WORDS.get(word, word) for word in words if word != "null")
            meant = rules.get("meant", f"no {plain}")
            fix = _fix(key, value, words[:1])
            return cls.error(f"{key} = {value!r} is {meant}", where=where, fix=fix)
        if value == []:
            return cls.error(f"{key} is an empty list", where=where)
        if text.startswith("Number out of range"):
            infinite = "-inf" if isinstance(value, int) and value < 0 else "inf"
            return cls.error(f"{key} = {infinite} is not finite", where=where)
        shown = float(value) if text.startswith("Expected `float`") else value
        return cls.error(
            f"{key} = {shown} {rules['range']}",
            where=where,
            why=rules.get("why"),
            fix=rules.get("fix"),
        )


def _fix(key: str, value: Toml, meant: list[str]) -> str | None:
    """Return how a value is spelled that is of a type beside the one that is meant, or None."""
    if meant == ["array"] and isinstance(value, dict):
        return f"write [[{key}]], with two brackets, for every one of them"
    if meant == ["array"] and isinstance(value, str):
        return f'write {key} = ["{value}"]'
    if meant == ["object"] and isinstance(value, list):
        return f"write [{key}], with one bracket"
    if meant and meant[0] in ("float", "int", "bool") and isinstance(value, str):
        return f"write {key} = {value}, without quotes"
    return None


def _not_finite(value: Toml) -> Iterator[float]:
    """Yield the numbers of a value, those in its lists and tables included, that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield value
    for inner in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from _not_finite(inner)


def _plain(kind: Any) -> Any:
    """Return a type without what is said of it, and without None."""
    if get_origin(kind) is Annotated:
        return _plain(get_args(kind)[0])
    others = [one for one in get_args(kind) if one is not NoneType]
    return _plain(others[0]) if NoneType in get_args(kind) and len(others) == 1 else kind


def _is_table(kind: Any) -> TypeGuard[type[Table]]:
    return isinstance(kind, type) and issubclass(kind, Table)


def _label(row: Toml) -> str:
    """Return what a table in a list calls itself."""
    return str(row.get("name", row.get("module", ""))) if isinstance(row, dict) else ""


def _rules(kind: Any) -> Iterator[tuple[str, Any]]:
    for meta in getattr(kind, "__metadata__", ()):
        yield from (meta.extra or {}).items()
    words = [get_args(one) for one in get_args(kind)[:1] if get_origin(one) is Literal]
    if get_origin(kind) is Literal:
        yield "meant", f"not one of {', '.join(map(str, get_args(kind)))}"
    elif words:
        yield "meant", f"no list of {', '.join(map(str, words[0]))}"
    for inner in get_args(kind):
        yield from _rules(inner)


def parse_toml(text: str, what: str, error: type[BakeError], where: str) -> dict[str, Toml]:
    """Return the outermost table of a TOML text.

    Args:
        text: the whole file.
        what: what the file is, for the message.
        error: what is raised where the text is no TOML, or holds characters that hide others.
        where: its path.
    """
    try:
        found = tomllib.loads(text)
    except RecursionError as cause:
        raise error(f"{what} nests too deeply to be parsed", where=where) from cause
    # subtle: an integer of more digits than Python converts is a bare ValueError.
    except ValueError as cause:
        raise error(f"{what} is not valid TOML: {cause}", where=where) from cause
    for strange in unseen(found):
        raise error(
            strange,
            where=where,
            why="whoever reads it would see another text than the one that is there",
            fix="remove the character",
        )
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """Return advice for a word that is none of the known ones."""
    words = [str(one) for one in known]
    near = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(words)}"
