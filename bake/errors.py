"""The exception tree. Each class carries the exit code that the command line returns for it.

BakeError
├── VerificationFailed  1  a comparison missed its tolerance
├── UsageError          2  the request itself is wrong: a recipe, a site, an option
├── InexactPlan         3  a finding is not exact and the recipe does not allow it
├── InputError          4  a file is missing, malformed or hostile
│   ├── CheckpointError
│   ├── DirectionError
│   └── FamilyError
├── HubError            5  the network or the Hub
├── ExactnessBug        6  a plan said EXACT and the measurement disagrees: a defect of bake
└── Inconclusive        7  nothing that was measured could have failed: no evidence either way
"""

from typing import ClassVar


class BakeError(Exception):
    """Base of every error that bake raises on purpose.

    Args:
        what: the fact, in one clause, with the offending values.
        where: the file, recipe key or tensor that it was found in.
        why: the reason, when the fact does not carry it.
        fix: what the reader can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        if self.why is not None:
            text += f"\n  why: {self.why}"
        if self.fix is not None:
            text += f"\n  fix: {self.fix}"
        return text


class VerificationFailed(BakeError):
    """A comparison missed its tolerance."""

    exit_code = 1


class UsageError(BakeError):
    """The request itself is wrong: an unknown key, site, layer or option."""

    exit_code = 2


class InexactPlan(BakeError):
    """The plan has a finding that is not exact and that the recipe does not allow."""

    exit_code = 3


class InputError(BakeError):
    """An input is missing, malformed or hostile."""

    exit_code = 4


class CheckpointError(InputError):
    """A checkpoint cannot be read as it stands: a header, an index, a shard or a config."""


class DirectionError(InputError):
    """A fitted direction cannot be used: its format, width, values or properties."""


class FamilyError(InputError):
    """No family table fits the model, or the table and the model disagree."""


class HubError(BakeError):
    """The network or the Hub refused or failed."""

    exit_code = 5
    unreachable = False
    """Whether nobody answered, so that what is in the cache has to do."""


class ExactnessBug(BakeError):
    """A plan said EXACT and the measurement disagrees: a defect of bake, never a warning."""

    exit_code = 6


class Inconclusive(BakeError):
    """No comparison that could have failed answers a question: no evidence either way."""

    exit_code = 7


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
