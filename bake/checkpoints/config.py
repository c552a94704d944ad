"""Patch ``config.json`` key by key, as text.

A config that is parsed and dumped again comes back with other spacing, other number spellings and,
through a configuration class, with keys that the author never wrote. Here the parser only locates
the bytes of one member at a time; every byte that no change names stays.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from bake.checkpoints import strictjson
from bake.errors import CheckpointError

CONFIG = "config.json"


class _Delete(Enum):
    DELETE = "delete"


DELETE: Final = _Delete.DELETE
"""In place of a value: remove the key."""


def patch_config(text: str, changes: Mapping[str, Any]) -> str:
    """Return the text of a JSON object with some of its own members changed.

    An existing key gets the new value in its place. A new key goes after the last one, indented as
    that one is. A deleted key takes its comma along.

    Args:
        text: a JSON object as it stands in the file.
        changes: new value, or ``DELETE``, by key.

    Raises:
        CheckpointError: the text is no JSON object, a key to delete is absent, or a value is not
            JSON.
    """
    expected = strictjson.parse_object(text, where=CONFIG, constants=True)
    for key, value in changes.items():
        text = _patch_one(text, key, value)
        # The same change on the parsed object, as the check of the change on the text.
        if value is DELETE:
            del expected[key]
        else:
            expected[key] = value
    patched = strictjson.parse_object(text, where=CONFIG, constants=True)
    # subtle: compared as text, because NaN differs from itself and 1 equals 1.0 and True.
    if json.dumps(patched) != json.dumps(expected):
        raise CheckpointError("the patched text does not read back as meant", where=CONFIG)
    return text


@dataclass(frozen=True, slots=True)
class _Member:
    """The span of one ``"key": value``: offsets into the text."""

    name: str
    begin: int  # of the key's opening quote
    colon: int  # past the key's closing quote
    value: int
    end: int


@dataclass(frozen=True, slots=True)
class _Object:
    """The span of one ``{…}`` and its members in order."""

    begin: int  # of the opening brace
    end: int  # past the closing brace
    members: tuple[_Member, ...]


_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _scan(text: str, begin: int) -> _Object:
    """Locate the members of the object whose opening brace is at ``begin``; the text is valid."""
    members = []
    position = _skip(text, begin + 1)
    while text[position] != "}":
        name, colon = _DECODER.raw_decode(text, position)
        value = _skip(text, _skip(text, colon) + 1)
        _, end = _DECODER.raw_decode(text, value)
        members.append(_Member(name, position, colon, value, end))
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return _Object(begin, position + 1, tuple(members))


def _patch_one(text: str, name: str, value: Any) -> str:
    scope = _scan(text, _skip(text, 0))
    found = {member.name: position for position, member in enumerate(scope.members)}
    if value is DELETE:
        if name not in found:
            raise CheckpointError(f"has no key {name!r} that could be removed", where=CONFIG)
        return _delete(text, scope, found[name])
    if name not in found:
        return _insert(text, scope, name, value)
    member = scope.members[found[name]]
    return text[: member.value] + _dump(text, scope, value) + text[member.end :]


def _delete(text: str, scope: _Object, position: int) -> str:
    members = scope.members
    if len(members) == 1:
        return text[: scope.begin + 1] + text[scope.end - 1 :]
    if position < len(members) - 1:
        return text[: members[position].begin] + text[members[position + 1].begin :]
    return text[: members[position - 1].end] + text[members[position].end :]


def _insert(text: str, scope: _Object, name: str, value: Any) -> str:
    dumped = _dump(text, scope, value)
    if not scope.members:
        return f"{text[: scope.begin + 1]}{json.dumps(name)}: {dumped}{text[scope.end - 1 :]}"
    last = scope.members[-1]
    colon = text[last.colon : last.value]
    member = f",{_gap(text, scope)}{json.dumps(name)}{colon}{dumped}"
    return text[: last.end] + member + text[last.end :]


def _gap(text: str, scope: _Object) -> str:
    """Return the white space between a comma and the last key (or the brace and the only key)."""
    begin = scope.members[-1].begin
    before = text[:begin]
    return before[len(before.rstrip(" \t\n\r")) :]


def _dump(text: str, scope: _Object, value: Any) -> str:
    """Return a value's text, spread over lines where the object around it is."""
    gap = _gap(text, scope) if scope.members else ""
    indent = gap.rpartition("\n")[2]
    try:
        if "\n" not in gap or not indent:
            return json.dumps(value, allow_nan=False)
        lines = json.dumps(value, allow_nan=False, indent=_unit(text, scope, indent))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot write {value!r}: {error}", where=CONFIG) from error
    end_of_line = "\r\n" if "\r\n" in gap else "\n"
    return lines.replace("\n", end_of_line + indent)


def _unit(text: str, scope: _Object, indent: str) -> str:
    """Return one step of indentation: what a member has and its closing brace lacks."""
    line = text[: scope.end - 1].rpartition("\n")[2]
    outer = line if line.strip(" \t") == "" else ""
    return indent[len(outer) :] if indent.startswith(outer) and indent != outer else indent
