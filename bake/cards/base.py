"""What an export records of its base for the card: its tensors, and what its own card states."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bake.cards.frontmatter import card_metadata, read_card
from bake.checkpoints import Checkpoint
from bake.directions import Directions
from bake.directions.describe import describe
from bake.errors import InputError

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What a card takes over from that of its base."""


def base_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return how many tensors a base has, in which dtypes, and what its card states."""
    dtypes = Counter(info.dtype for info in checkpoint.tensors.values())
    return {
        "tensors": len(checkpoint.tensors),
        "dtypes": dict(sorted(dtypes.items())),
        "card": base_card(checkpoint.path),
    }


def base_card(folder: Path) -> dict[str, Any] | None:
    """Return what the card in a folder states, or None where there is none.

    A card that cannot be read is no reason to refuse an export; the record says so.
    """
    try:
        text = read_card(folder)
        if text is None:
            return None
        stated = card_metadata(text)
    except InputError as error:
        return {"unreadable": error.what}
    return {key: stated[key] for key in INHERITED if _is_words(stated.get(key))}


def _is_words(value: object) -> bool:
    """Tell whether a value is a text or a list of texts, as all of these fields are."""
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def direction_facts(found: Directions) -> list[Mapping[str, Any]]:
    """Return the size, dtype and norm of every tensor of a fitted artifact."""
    return [
        {
            "layer": row.layer,
            "site": row.site,
            "role": str(row.role),
            "shape": list(row.shape),
            "dtype": row.dtype,
            "norm": row.norm,
        }
        for row in describe(found)
    ]
