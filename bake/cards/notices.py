"""Which edits concern refusals or safety: those whose recipe says so, and those whose words do.

The list is closed and documented in ``docs/cards.md``. It errs to the side of a notice too many.
"""

import re
from collections.abc import Iterable

from bake.artifact.record import RECORD
from bake.cards import stored
from bake.cards.facts import Facts
from bake.errors import InputError

STEMS = (
    "abliterat",
    "alignment",
    "censor",
    "uncensor",
    "compli",
    "decepti",
    "guardrail",
    "hate",
    "illegal",
    "jailbr",
    "malicious",
    "misalign",
    "nsfw",
    "refus",
    "reject",
    "safe",
    "suicid",
    "toxic",
    "unsafe",
    "unaligned",
    "violen",
    "weapon",
)
"""Words that begin like this."""
WORDS = (
    "harm",
    "harms",
    "harmed",
    "harmful",
    "harmfulness",
    "harmless",
    "harmlessness",
    "unharmful",
)
"""Words that have to be whole: ``harmony`` is none of them."""


def safety_words(facts: Facts) -> tuple[str, ...]:
    """Return the words because of which an artifact carries the notice, in their own order."""
    found: dict[str, None] = {}
    for text in _texts(facts):
        # Words run together in names: refusal_dir, RefusalDirection, harmless2harmful.
        spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
        for word in re.findall(r"[a-z]+", spaced.casefold()):
            if word in WORDS or word.startswith(STEMS):
                found[word] = None
    return tuple(found)


def concerns_safety(facts: Facts) -> bool:
    """Tell whether an artifact carries the notice."""
    return facts.spec.notice == "safety" or bool(safety_words(facts))


def _texts(facts: Facts) -> Iterable[str]:
    """Yield every text of the record that says what the edit is about."""
    yield facts.title
    content = facts.content
    recipe = stored.mapping(content, "recipe", RECORD)
    yield stored.text(recipe, "file", RECORD)
    for name, found in stored.mapping(content, "directions", RECORD).items():
        yield name
        if not isinstance(found, dict):
            raise InputError(f"directions.{name} is no object", where=RECORD)
        yield stored.text(found, "concept", RECORD)
        yield stored.text(found, "file", RECORD).replace(".safetensors", "")
        notes = stored.mapping(found, "metadata", RECORD)
        yield from (value for value in notes.values() if isinstance(value, str))
    for finding in stored.objects(facts.plan, "findings", RECORD):
        yield stored.text(finding, "concept", RECORD)
    yield from (text for text in (facts.spec.summary, facts.spec.intended) if text)
    yield from facts.spec.datasets
