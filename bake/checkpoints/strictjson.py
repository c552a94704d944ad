"""JSON from files that nobody vouches for: bounded, UTF-8, an object, and no key twice.

Python's own parser lets the last of two equal keys win and others let the first; a file that two
programs read differently is refused here.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from bake.errors import CheckpointError


def decode(raw: bytes, *, where: str) -> str:
    """Return the text of UTF-8 bytes, newlines untouched.

    Raises:
        CheckpointError: the bytes are not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"is not UTF-8 text: {error.reason}", where=where) from error


def read_text(path: Path, limit: int, *, where: str) -> str:
    """Return the text of a file, with every byte of it.

    Raises:
        CheckpointError: it is longer than ``limit`` bytes, or not UTF-8.
    """
    size = path.stat().st_size
    if size > limit:
        raise CheckpointError(f"is {size} bytes long; the limit is {limit}", where=where)
    return decode(path.read_bytes(), where=where)


def parse_object(text: str, *, where: str, constants: bool = False) -> dict[str, Any]:
    """Return the JSON object that ``text`` is.

    Args:
        text: the whole document.
        where: the file's name, for messages.
        constants: accept ``NaN`` and ``Infinity``, which JSON does not know but which
            ``config.json`` of some state-space models holds (``time_step_limit``).

    Raises:
        CheckpointError: the text is not JSON, not an object, repeats a key or nests too deeply.
    """

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(
                    f"names the key {key!r} twice",
                    where=where,
                    why="readers disagree about which of the two counts",
                )
            found[key] = value
        return found

    def refuse(constant: str) -> NoReturn:
        raise CheckpointError(f"holds {constant}, which is not JSON", where=where)

    try:
        found = json.loads(
            text, object_pairs_hook=unique, parse_constant=None if constants else refuse
        )
    except RecursionError as error:
        raise CheckpointError("nests too deeply to be parsed", where=where) from error
    except ValueError as error:  # a JSONDecodeError, or an integer of thousands of digits
        raise CheckpointError(f"is not valid JSON: {error}", where=where) from error
    if not isinstance(found, dict):
        raise CheckpointError("is not a JSON object", where=where)
    return found
