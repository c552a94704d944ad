"""``base_ref``: what a record says of its base, for whoever has the base's checkpoint."""

import os
from collections import Counter
from pathlib import Path

from bake.artifact.frontmatter import card_metadata, read_card
from bake.artifact.schema import BaseCard, BaseRef
from bake.checkpoints import Checkpoint
from bake.errors import InputError

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What a card takes over from that of its base."""


def base_ref(
    checkpoint: Checkpoint, *, out: Path | None = None, model: str | None = None
) -> BaseRef:
    """Return what a record says of a base: name, digest, tensors, and what its card states.

    Args:
        checkpoint: the base.
        out: the artifact's folder, from which the place of a local base is told.
        model: what the recipe calls the base; its own name when None.
    """
    path = None
    if checkpoint.revision is None and out is not None:
        # Resolved, as the system walks "..": from behind a link it does not lead back.
        path = os.path.relpath(checkpoint.path.resolve(), out.resolve())
    stored = checkpoint.as_stored.tensors
    dtypes = Counter(info.dtype for info in stored.values())
    return BaseRef(
        model=model or base_name(checkpoint),
        revision=checkpoint.revision,
        digest=checkpoint.digest(),
        path=path,
        tensors=len(stored),
        dtypes=dict(sorted(dtypes.items())),
        card=base_card(checkpoint.path),
    )


def base_name(checkpoint: Checkpoint) -> str:
    """Return a base's own name: no place on this machine, which others read."""
    if checkpoint.revision is not None:
        return checkpoint.repo  # the commit is recorded beside it
    is_place = Path(checkpoint.source).is_absolute()
    return checkpoint.path.name if is_place else checkpoint.source


def base_card(folder: Path) -> BaseCard | None:
    """Return what the card in a folder states, or None where there is none.

    A card that cannot be read is no reason to refuse an export; the record says so.
    """
    try:
        text = read_card(folder)
        if text is None:
            return None
        stated = card_metadata(text)
    except InputError as error:
        return BaseCard(unreadable=error.what)
    return BaseCard.of({key: stated[key] for key in INHERITED if _is_words(stated.get(key))})


def _is_words(value: object) -> bool:
    """Tell whether a value is a text or a list of texts, as all of these fields are."""
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
