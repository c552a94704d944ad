"""Licence and attribution: what the licence of the base has a card say."""

from bake.cards import licences
from bake.cards.facts import Facts
from bake.cards.licences import LICENCES
from bake.cards.text import linkable

_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")


def legal_files(facts: Facts) -> tuple[str, ...]:
    """Return the files of licences and notices that travel with the artifact."""
    found = (name for name in facts.names if "/" not in name and linkable(name))
    return tuple(name for name in found if name.upper().startswith(_LEGAL))


def shown_words(facts: Facts) -> str | None:
    """Return the words that the base's licence wants shown, or None."""
    found = _licence(facts)
    return None if found is None else found.shown


def attribution(facts: Facts) -> str | None:
    """Return the sentence that the base's licence wants in NOTICE, or None."""
    found = _licence(facts)
    return None if found is None else found.notice


def remark(facts: Facts) -> str | None:
    """Return what the licence says that cannot be checked, or None."""
    return licences.remark(_governing(facts))


def _licence(facts: Facts) -> licences.Licence | None:
    return LICENCES.get(_governing(facts).id or "")


def _governing(facts: Facts) -> licences.Stated:
    """Return the base's licence, or the artifact's own where the record names none of the base."""
    base = facts.base_licence
    return facts.licence if base.id is None else base
