"""What is wrong with a card's metadata: base, licence, tags, and the numbers of its model-index."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from bake.artifact.frontmatter import card_metadata
from bake.artifact.names import CARD, Problem
from bake.cards import licences, metadata
from bake.cards.facts import Facts
from bake.cards.text import printable
from bake.checkpoints.hub_names import is_repository

AGAIN = "run `bake card` again"
_MANY = 1000  # metrics: more than any card has, and few enough to look at


def lint_metadata(text: str, facts: Facts) -> Iterator[Problem]:
    """Yield what is wrong with the metadata at the top of a card.

    Raises:
        InputError: it is no YAML, or no mapping.
    """
    found = card_metadata(text)
    if not found:
        yield Problem(CARD, "has no metadata", AGAIN)
        return
    wanted = card_metadata(f"---\n{metadata.metadata(facts, None)}\n---\n")
    for key in ("library_name", "pipeline_tag", "base_model", "base_model_relation"):
        if key in wanted and found.get(key) != wanted[key]:
            what = f"has {key} {short(found.get(key))} where the record gives {short(wanted[key])}"
            yield Problem(CARD, what, AGAIN)
    base = found.get("base_model")
    for name in base if isinstance(base, list) else [base]:
        if name is not None and not (isinstance(name, str) and is_repository(name)):
            yield Problem(CARD, f"names the base_model {short(name)}, which is no id on the Hub")
    tags = found.get("tags")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        yield Problem(CARD, "has tags that are no list of texts", AGAIN)
    elif "bake" not in tags:
        yield Problem(CARD, "lacks the tag bake", AGAIN)
    yield from _licence(found, text, facts)
    yield from _model_index(found, wanted)


def _licence(found: Mapping[str, Any], text: str, facts: Facts) -> Iterator[Problem]:
    """Check what the card itself has to say; files and names are the push's to check."""
    ours = licences.stated(found)
    if ours.id == "other" and ours.name is None:
        yield Problem(CARD, "states the licence other without license_name", "name it")
    base = facts.base_licence
    if base.id is None:
        return  # nothing to compare with: the push asks the Hub, and refuses what nobody licensed
    checked = licences.check_licence(
        base=base, ours=ours, repo="", names=list(facts.names), notice="", card=text
    )
    yield from (problem for problem in checked if problem.where == CARD)


def _model_index(found: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[Problem]:
    """Compare the metrics of a model-index, where there is one, with those it should have."""
    if found.get("model-index") is None:
        return
    metrics = _metrics(found)
    if not metrics:
        yield Problem(CARD, "has a model-index without metrics", AGAIN)
        return
    wanted = {metric["name"]: metric["value"] for metric in _metrics(right)}
    for metric in metrics:
        name, value = metric.get("name"), metric.get("value")
        if not isinstance(name, str) or name not in wanted:
            yield Problem(CARD, f"has a metric {short(name)} that verify.json does not have", AGAIN)
        elif value != wanted[name]:
            what = f"says {short(value)} of {name}, where verify.json has {wanted[name]!r}"
            yield Problem(CARD, what, AGAIN)


def _metrics(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the metrics of the results of the model-index: the objects in lists within lists."""
    objects: list[Mapping[str, Any]] = [found]
    for key in ("model-index", "results", "metrics"):
        lists = [part for item in objects if isinstance(part := item.get(key), list)]
        # A list may be named again and again in YAML, within itself: no more than is looked at.
        objects = list(islice((o for part in lists for o in part if isinstance(o, dict)), _MANY))
    return objects


def short(value: object) -> str:
    """Return a value of the metadata; one that has parts may be endless, and is only named."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    return repr(printable(str(value), 80))
