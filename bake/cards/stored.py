"""Values out of a record: of the type that is meant, or an error that names the key.

A record that was downloaded is somebody's text. What is absent is empty here, because a card leaves
out what nobody recorded; what has another type is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

from bake.errors import InputError


def mapping(content: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """Return an object; empty where it is absent or null."""
    found = content.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(f"{key} is no object", where=where)
    return found


def objects(content: Mapping[str, Any], key: str, where: str) -> tuple[Mapping[str, Any], ...]:
    """Return a list of objects; empty where it is absent or null."""
    found = content.get(key)
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise InputError(f"{key} is no list of objects", where=where)
    return tuple(found)


def words(content: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """Return a list of texts, or a text as a list of one; empty where it is absent or null."""
    found = content.get(key)
    if found is None:
        return ()
    values = [found] if isinstance(found, str) else found
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise InputError(f"{key} is no list of texts", where=where)
    return tuple(values)


def text(content: Mapping[str, Any], key: str, where: str) -> str:
    """Return a text; empty where it is absent or null."""
    found = content.get(key)
    if found is None:
        return ""
    if not isinstance(found, str):
        raise InputError(f"{key} is no text", where=where)
    return found


def number(content: Mapping[str, Any], key: str, where: str) -> float | int | None:
    """Return a finite number, or None where it is absent or null."""
    found = content.get(key)
    if found is None:
        return None
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise InputError(f"{key} is no number", where=where)
    if isinstance(found, int) and abs(found) > 1 << 62:
        raise InputError(f"{key} is too large a number", where=where)
    return found if math.isfinite(found) else None


def whole(content: Mapping[str, Any], key: str, where: str) -> int | None:
    """Return a whole number, or None where it is absent or null."""
    found = number(content, key, where)
    if isinstance(found, float):
        raise InputError(f"{key} is no whole number", where=where)
    return found


def flag(content: Mapping[str, Any], key: str, where: str) -> bool | None:
    """Return a truth value, or None where it is absent or null."""
    found = content.get(key)
    if found is not None and not isinstance(found, bool):
        raise InputError(f"{key} is no truth value", where=where)
    return found


def size(content: Mapping[str, Any], key: str, where: str) -> str:
    """Return a shape as it is read out, ``128×384``; empty where it is absent or null."""
    found = content.get(key)
    if found is None:
        return ""
    if not isinstance(found, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in found):
        raise InputError(f"{key} is no shape", where=where)
    return "×".join(map(str, found))
