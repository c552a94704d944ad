"""``[card]``: the words of whoever publishes, for the model card."""

import re

from bake.errors import UsageError
from bake.recipe.section import Section
from bake.recipe.spec import CardSpec
from bake.section import nearest

NOTICES = ("safety",)
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_DATASET = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def read_card(table: Section) -> CardSpec:
    """Return what ``[card]`` says.

    Raises:
        UsageError: an unknown key, or a word that the Hub would not take.
    """
    card = CardSpec(
        notice=table.optional("notice", str),
        summary=table.optional("summary", str),
        intended=table.optional("intended", str),
        side_effects=table.optional("side_effects", str),
        not_for=table.optional("not_for", str),
        licence=table.optional("licence", str),
        licence_name=table.optional("licence_name", str),
        language=table.words("language"),
        datasets=table.words("datasets"),
    )
    table.close()
    for key, values, pattern, meant in (
        ("licence", (card.licence or "other",), _LICENCE, "an id as the Hub spells it: apache-2.0"),
        ("language", card.language, _LANGUAGE, "an ISO 639 code: en"),
        ("datasets", card.datasets, _DATASET, "an id on the Hub: owner/name"),
    ):
        for value in values:
            if pattern.fullmatch(value) is None:
                raise UsageError(f"{key} holds {value!r}", where=table.where, fix=f"give {meant}")
    if card.notice is not None and card.notice not in NOTICES:
        raise UsageError(
            f"notice = {card.notice!r}", where=table.where, fix=nearest(card.notice, NOTICES)
        )
    if (card.licence == "other") != (card.licence_name is not None):
        raise UsageError(
            'licence_name goes with licence = "other", and licence = "other" with it',
            where=table.where,
            fix="name the licence, or leave both out to inherit the base's",
        )
    return card


def card_of(text: str, *, where: str) -> CardSpec:
    """Return the ``[card]`` of a recipe's text, as a record keeps it.

    Raises:
        UsageError: the text is no TOML, or its ``[card]`` holds an unknown key or value.
    """
    return read_card(Section.parse(text, "the recipe", where).table("card", optional=True))
