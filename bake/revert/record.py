"""``Revertible``: an artifact with a record that says what of its base was changed."""

from dataclasses import dataclass
from pathlib import Path

from bake.artifact.carrier import KINDS
from bake.artifact.record import RECORD, read_record
from bake.artifact.schema import Record
from bake.errors import InputError, UsageError


@dataclass(frozen=True, slots=True)
class Revertible:
    """An artifact that there is something to revert in.

    Attributes:
        folder: the artifact's, resolved.
        record: what it says of itself.
    """

    folder: Path
    record: Record

    @property
    def base_path(self) -> Path | None:
        """Where a local base was, or None."""
        path = self.record.base.path
        return None if path is None else self.folder / path

    @property
    def created(self) -> frozenset[str]:
        """The tensors that the base does not have."""
        return self.record.plan.created

    @property
    def edited(self) -> frozenset[str]:
        """The tensors of the base that the plan changes."""
        return self.record.plan.changed - self.created


def read_revertible(folder: Path) -> Revertible:
    """Return an artifact that there is something to revert in.

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
    found = Revertible(folder.resolve(), record)
    before = record.base_tensors.keys()
    if before and before != found.edited:
        raise InputError(
            "the record is malformed: base_tensors and the plan disagree on "
            f"{min(before ^ found.edited)}",
            where=str(folder / RECORD),
            fix="download the artifact again",
        )
    return found
