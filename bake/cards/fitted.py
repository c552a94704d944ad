"""What an approximate plan's stand-ins stand in for, and what of its effect they lose."""

import re
from dataclasses import dataclass

from bake.artifact.record import RECORD
from bake.artifact.schema import CalibrationRecord
from bake.cards.facts import Facts
from bake.cards.methods import METHODS, Method
from bake.cards.text import Markdown, code, escape
from bake.errors import InputError

_NAMED = re.compile(r"(\w+) '(.*)' at (.+)")


@dataclass(frozen=True, slots=True)
class Asked:
    """An edit that no fold reaches, as the recipe asks for it.

    Attributes:
        kind: a key of ``METHODS``.
        concept: the direction's name.
        places: the sites, as the calibration names them.
    """

    kind: str
    concept: str
    places: str

    @property
    def method(self) -> Method:
        """What the kind is."""
        return METHODS[self.kind]

    @property
    def words(self) -> Markdown:
        """The edit in a few words: *mood* set to a constant at ``resid_post.2``."""
        return Markdown(f"*{escape(self.concept)}* {self.method.did} at {code(self.places)}")


@dataclass(frozen=True, slots=True)
class Fitted:
    """The calibration of an approximate plan, and the edits that it stands in for."""

    record: CalibrationRecord
    asked: tuple[Asked, ...]

    @property
    def lost(self) -> Markdown:
        """The share of the edit's own effect that is lost on held-out texts."""
        return Markdown(f"{100 * self.record.share:.2g} %")

    @property
    def words(self) -> Markdown:
        """What is stood in for, in a few words."""
        return Markdown("; ".join(edit.words for edit in self.asked))


def fitted(facts: Facts) -> Fitted | None:
    """Return what the record says of the stand-ins, or None for a plan without any.

    Raises:
        InputError: it names an edit that is none.
    """
    found = facts.record.calibration
    return None if found is None else Fitted(found, tuple(map(_asked, found.stands_for)))


def _asked(text: str) -> Asked:
    match = _NAMED.fullmatch(text)
    if match is None or match[1] not in METHODS:
        what = f"stands_for names {text!r}, which is no edit"
        raise InputError(what, where=f"{RECORD}: calibration")
    return Asked(match[1], match[2], match[3])
