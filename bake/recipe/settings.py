"""``--set KEY=VALUE``: values of a recipe that are given beside its file."""

import tomllib
from collections.abc import Sequence

from bake.errors import UsageError
from bake.section import Toml, nearest

_SHAPE = "edits.0.strength=0.8, or 'title=\"Mood\"' for a text"


def with_settings(values: Toml, settings: Sequence[str]) -> Toml:
    """Return the outermost table of a recipe with some of its values replaced.

    A key is the way to a value from the outermost table, with dots between, and a number counts
    the entries of a list from 0: ``edits.0.strength``. A value is spelled as in TOML. What such a
    key may hold is for the recipe's reader to say, as of a file.

    Args:
        values: the table, which stays as it is.
        settings: ``KEY=VALUE``, each applied to what those before it have left.

    Raises:
        UsageError: one has no key or no value of TOML, or leads where there is no such place.
    """
    for setting in settings:
        key, separator, text = setting.partition("=")
        path = [part.strip() for part in key.split(".")]
        if not separator or not all(path):
            raise UsageError(f"--set {setting} is no KEY=VALUE", fix=f"as in {_SHAPE}")
        values = _replaced(values, path, _value(setting, text), f"--set {setting}")
    return values


def _value(setting: str, text: str) -> Toml:
    try:
        found = tomllib.loads(f"value = {text}")
    except ValueError as error:
        key = setting.partition("=")[0]
        raise UsageError(
            f"{text.strip() or 'nothing'} is no value of TOML",
            where=f"--set {setting}",
            fix=f"quote a text, for the shell as well: --set '{key}=\"{text.strip()}\"'",
        ) from error
    if set(found) != {"value"}:
        raise UsageError("it holds more than one value", where=f"--set {setting}", fix=_SHAPE)
    return found["value"]


def _replaced(inside: Toml, path: Sequence[str], value: Toml, where: str) -> Toml:
    """Return a table or a list with one value, at the end of a path, in place of another."""
    if not path:
        return value
    first, rest = path[0], path[1:]
    if isinstance(inside, list):
        known = range(len(inside))
        if not first.isdecimal() or int(first) not in known:
            raise UsageError(
                f"there is no entry {first} in a list of {len(inside)}",
                where=where,
                fix=f"entries are counted from 0: {nearest(first, map(str, known))}",
            )
        place = int(first)
        return [*inside[:place], _replaced(inside[place], rest, value, where), *inside[place + 1 :]]
    if not isinstance(inside, dict):
        raise UsageError(f"{first} leads into {inside!r}, which is no table", where=where)
    return {**inside, first: _replaced(inside.get(first, {}), rest, value, where)}
