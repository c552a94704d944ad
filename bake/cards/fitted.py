"""The edits that an approximate plan's stand-ins stand in for."""

import re
from dataclasses import dataclass

from bake.artifact.record import RECORD
from bake.cards.edits import amounts
from bake.cards.facts import Facts
from bake.cards.methods import METHODS, Method
from bake.cards.text import Markdown
from bake.errors import InputError

_NAMED = re.compile(r"(\w+) '(.*)' at (.+)")


@dataclass(frozen=True, slots=True)
class Asked:
    """An edit that no fold reaches, as the recipe asks for it.

    Attributes:
        kind: a key of ``METHODS``.
        concept: the direction's name.
        places: the sites, as the calibration names them.
        amounts: as those of an ``EditRow``.
    """

    kind: str
    concept: str
    places: str
    amounts: tuple[Markdown, ...]

    @property
    def method(self) -> Method:
        """What the kind is."""
        return METHODS[self.kind]


def asked_edits(facts: Facts) -> tuple[Asked, ...]:
    """Return the edits that an approximate plan's stand-ins stand in for.

    Raises:
        InputError: the record names an edit that is none.
    """
    calibration = facts.record.calibration
    return () if calibration is None else tuple(_asked(facts, t) for t in calibration.stands_for)


def _asked(facts: Facts, text: str) -> Asked:
    match = _NAMED.fullmatch(text)
    if match is None or match[1] not in METHODS:
        what = f"stands_for names {text!r}, which is no edit"
        raise InputError(what, where=f"{RECORD}: calibration")
    return Asked(match[1], match[2], match[3], amounts(facts, match[1], match[2]))
