"""The base of a revert: where it is, and whether its layout is the recorded one."""

import os
from pathlib import Path

from bake.artifact.schema import Record
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.checkpoints.quantised.view import KEYS
from bake.errors import BakeError, InputError


def open_base(folder: Path, record: Record, named: str | None, revision: str | None) -> Checkpoint:
    """Open the base of an artifact: the one that is named, or the one that the record names.

    Args:
        folder: the artifact's, resolved.
        record: what it says of itself.
        named: a folder or a Hub id.
        revision: branch, tag or commit of what is named.

    Raises:
        InputError: it is not there, or it is another model than the recorded one.
        HubError: the Hub refuses or cannot be reached.
    """
    if named is not None:
        base = open_checkpoint(named, revision=revision)
    else:
        place: str | Path = record.base.address
        if record.base.path is not None:
            place = Path(os.path.normpath(folder / record.base.path))
        try:
            base = open_checkpoint(place)
        except BakeError as error:
            raise type(error)(
                f"the base that the record names is not at hand: {error.what}",
                where=error.where,
                why=error.why,
                fix="name it with --base MODEL",
            ) from error
    _check_recorded(record, base)
    return base


def _check_recorded(record: Record, base: Checkpoint) -> None:
    """Refuse a base whose config, index or headers are not those that the artifact was made of."""
    if any(base.config.get(key) is not None for key in KEYS):
        raise InputError(
            "an edit of a quantised base is not reverted",
            where=base.source,
            why="several tensors hold one weight, and a dequantised checkpoint has none of them",
            fix=f"take the base itself, {record.base.address}",
        )
    known = record.base.address
    if base.digest() != (record.base.digest or base.digest()):
        raise InputError(
            "this is not the base that the artifact was made of",
            where=base.source,
            why="its config.json, its index or the headers of its weights are others",
            fix=f"name the base that the record names: {known}",
        )
    missing = sorted(record.plan.edited - base.tensors.keys())
    surplus = sorted(record.plan.created & base.tensors.keys())
    if missing or surplus:
        what = f"has no {missing[0]}" if missing else f"has {surplus[0]}, which the edit created"
        raise InputError(
            f"this is not the base that the artifact was made of: it {what}",
            where=base.source,
            fix=f"name the base that the record names: {known}",
        )
