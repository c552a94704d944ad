"""Which edits concern refusals or safety: those whose recipe says so, and those whose words do.

The list is closed and documented in ``docs/cards.md``. It errs to the side of a notice too many.
"""

import re
from collections.abc import Iterable

from bake.cards.facts import Facts

STEMS = tuple(
    "abliterat alignment censor uncensor compli decepti guardrail hate illegal jailbr malicious "
    "misalign nsfw refus reject safe suicid toxic unsafe unaligned violen weapon".split()
)
"""Words that begin like this."""
WORDS = tuple("harm harms harmed harmful harmfulness harmless harmlessness unharmful".split())
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
    if facts.record.recipe is not None:
        yield facts.record.recipe.file
    for name, found in facts.record.directions.items():
        yield name
        yield found.concept
        yield found.file.replace(".safetensors", "")
        yield from found.metadata.values()
    yield from (finding.concept for finding in facts.record.plan.findings)
    yield from (text for text in (facts.spec.summary, facts.spec.intended) if text)
    yield from facts.spec.datasets
