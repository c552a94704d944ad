"""The metadata at the top of a card: YAML between two lines of three dashes."""

import re
from pathlib import Path
from typing import Any

from bake.artifact.names import CARD
from bake.checkpoints import strictjson
from bake.checkpoints.folder import regular_file
from bake.errors import InputError, first_line

_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
LIMIT = 1_000_000
"""Bytes of the longest card that is read."""


def read_card(folder: Path) -> str | None:
    """Return the text of the card, or None when there is none.

    Raises:
        InputError: it is too long or not UTF-8.
    """
    if not (folder / CARD).is_file():
        return None
    return strictjson.read_text(regular_file(folder.resolve(), CARD), LIMIT, where=CARD)


def card_metadata(text: str) -> dict[str, Any]:
    """Return the metadata of a card; empty where it has none.

    Raises:
        InputError: it is no YAML, or no mapping.
    """
    import yaml  # type: ignore[import-untyped] # no stubs among the requirements

    match = _BLOCK.match(text)
    if match is None:
        return {}
    try:
        found = yaml.safe_load(match[1])
    except (yaml.YAMLError, RecursionError) as error:
        said = f"has metadata that is no YAML: {first_line(error)}"
        raise InputError(said, where=CARD) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError("has metadata that is no mapping of names", where=CARD)
    return found


def body_of(text: str) -> str:
    """Return a card without its metadata."""
    return _BLOCK.sub("", text)


def first_line_of(text: str) -> str:
    """Return the first line of a card that its reader sees: below the metadata, not blank."""
    shown = _COMMENT.sub("", body_of(text))
    return next((line.strip() for line in shown.splitlines() if line.strip()), "")
