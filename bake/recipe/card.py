"""``[card]``: the words of whoever publishes, for the model card."""

import re

from bake.errors import UsageError
from bake.recipe.spec import CardTable
from bake.section import Toml

_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_DATASET = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def read_card(values: Toml, where: str) -> CardTable:
    """Return what ``[card]`` says.

    Raises:
        UsageError: an unknown key, or a word that the Hub would not take.
    """
    card = CardTable.read(values, where)
    for key, words, pattern, meant in (
        ("licence", (card.licence or "other",), _LICENCE, "an id as the Hub spells it: apache-2.0"),
        ("language", card.language, _LANGUAGE, "an ISO 639 code: en"),
        ("datasets", card.datasets, _DATASET, "an id on the Hub: owner/name"),
    ):
        for word in words:
            if pattern.fullmatch(word) is None:
                raise UsageError(f"{key} holds {word!r}", where=where, fix=f"give {meant}")
    if (card.licence == "other") != (card.licence_name is not None):
        raise UsageError(
            'licence_name goes with licence = "other", and licence = "other" with it',
            where=where,
            fix="name the licence, or leave both out to inherit the base's",
        )
    return card
