"""``Section``: a table of a TOML file that must be emptied. Family tables are read so.

Every key is taken once, with its type; a key that is left over is an error that names the nearest
known one.
"""

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self, TypeVar

from bake.errors import BakeError

T = TypeVar("T")
Toml = Any  # a value of the file: the one place where the type is the file's, not ours

_WORDS: Mapping[type, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "truth value",
    list: "list",
    dict: "table",
}


class Section:
    """A TOML table whose keys are taken one by one.

    Each kind of file has a subclass, which names the error that is raised.
    """

    error: ClassVar[type[BakeError]]

    def __init__(self, values: Toml, where: str) -> None:
        if not isinstance(values, dict):
            raise self.error(f"a table is meant, not {values!r}", where=where)
        self._values = dict(values)
        self._known: list[str] = []
        self.where = where

    @classmethod
    def parse(cls, text: str, what: str, where: str) -> Self:
        """Return the outermost table of a TOML text; ``parse_toml`` has the arguments."""
        return cls(parse_toml(text, what, cls.error, where), where)

    def take(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return the value of ``key``; raise when it is missing or of another type."""
        value = self.optional(key, kind, default)
        if value is None:
            raise self.missing(key)
        return value

    def optional(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """Return the value of ``key``, or the default when it is absent.

        A whole number may stand where any number is meant. No number may be infinite or nan.
        """
        value = self.raw(key)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = _number(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"{key} = {value!r} is no {_WORDS[kind]}", where=self.where)
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(f"{key} = {value!r} is not finite", where=self.where)
        return value

    def raw(self, key: str) -> Toml:
        """Return the value of ``key`` whatever its type, or None."""
        self._known.append(key)
        return self._values.pop(key, None)

    def table(self, key: str, *, optional: bool = False) -> Self:
        """Return the table below ``key``."""
        values = self.take(key, dict, {} if optional else None)
        return type(self)(values, f"{self.where} [{key}]")

    def missing(self, key: str) -> BakeError:
        """Return the error for a key that is absent, or written in another way."""
        near = difflib.get_close_matches(key, self._values, n=1)
        fix = f"did you mean {key!r} by {near[0]!r}?" if near else "add it"
        return self.error(f"the key {key!r} is missing", where=self.where, fix=fix)

    def close(self) -> None:
        """Raise when a key is left over, naming the nearest known one."""
        for key in self._values:
            raise self.error(
                f"unknown key {key!r}", where=self.where, fix=nearest(key, self._known)
            )


def parse_toml(text: str, what: str, error: type[BakeError], where: str) -> dict[str, Toml]:
    """Return the outermost table of a TOML text.

    Args:
        text: the whole file.
        what: what the file is, for the message.
        error: what is raised where the text is no TOML.
        where: its path.
    """
    try:
        return tomllib.loads(text)
    except RecursionError as cause:
        raise error(f"{what} nests too deeply to be parsed", where=where) from cause
    # subtle: an integer of more digits than Python converts is a bare ValueError.
    except ValueError as cause:
        raise error(f"{what} is not valid TOML: {cause}", where=where) from cause


def nearest(word: str, known: Iterable[str]) -> str:
    """Return advice for a word that is none of the known ones."""
    words = [str(one) for one in known]
    near = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(words)}"


def _number(value: int) -> float:
    """Return a whole number of a file as a float; one beyond all floats is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
