"""The record of an artifact that there is something to revert in."""

from pathlib import Path

from bake.artifact.carrier import KINDS
from bake.artifact.record import RECORD, read_record
from bake.artifact.schema import Record
from bake.errors import InputError, UsageError


def read_revertible(folder: Path) -> Record:
    """Return the record of an artifact that there is something to revert in.

    Raises:
        UsageError: the artifact leaves its base as it is.
        InputError: the folder is no artifact of bake, or its record is malformed.
    """
    record = read_record(folder)
    carrier = KINDS[record.kind]
    if not carrier.whole:
        raise UsageError(
            f"there is nothing to revert: a {record.kind} leaves its base as it is",
            fix=carrier.without,
        )
    before, edited = record.base_tensors.keys(), record.plan.edited
    if before and before != edited:
        raise InputError(
            "the record is malformed: base_tensors and the plan disagree on "
            f"{min(before ^ edited)}",
            where=str(folder / RECORD),
            fix="download the artifact again",
        )
    return record
