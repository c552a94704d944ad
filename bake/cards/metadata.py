"""The metadata of a card: what the Hub files a model under."""

from collections.abc import Mapping
from typing import Any

from bake.artifact.carrier import KINDS
from bake.artifact.record import RECORD, VERIFICATION
from bake.cards import stored
from bake.cards.edits import edit_rows
from bake.cards.facts import Facts
from bake.cards.figures import metrics
from bake.cards.fitted import fitted
from bake.cards.methods import METHODS
from bake.cards.notices import safety_words
from bake.cards.text import printable

PIPELINE = "text-generation"


def metadata(facts: Facts, repo: str | None) -> str:
    """Return the metadata as YAML, without the lines of dashes.

    Raises:
        InputError: the record is malformed.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=PIPELINE,
            task_name="Text Generation",
            dataset_type="bake-verification-prompts",
            dataset_name=dataset_name(facts),
            metric_type=metric.type,
            metric_name=metric.name,
            metric_value=metric.value,
        )
        for metric in metrics(facts)
    ]
    found = {**_base(facts), **_licence(facts), **_inherited(facts)}
    data = ModelCardData(
        library_name=KINDS[facts.record.kind].library,
        tags=list(tags(facts)),
        model_name=model_name(facts, repo) if results else None,
        eval_results=results or None,
        **found,
    )
    return str(data.to_yaml()).rstrip("\n")


def model_name(facts: Facts, repo: str | None) -> str:
    """Return what the model is called."""
    return printable(facts.title) if repo is None else repo.rpartition("/")[2]


def dataset_name(facts: Facts) -> str:
    """Return what the metrics were measured on, in words."""
    prompts = stored.mapping(facts.verification or {}, "prompts", VERIFICATION)
    digest = printable(stored.text(prompts, "digest", VERIFICATION))
    number = stored.whole(prompts, "prompts", VERIFICATION)
    return (
        f"{number} prompts, token ids {digest}" if number and digest else "prompts of bake verify"
    )


def tags(facts: Facts) -> tuple[str, ...]:
    """Return the tags, without repeats."""
    kinds = [row.kind for row in edit_rows(facts) if not row.stand_in]
    calibrated = fitted(facts)
    kinds += [] if calibrated is None else [edit.kind for edit in calibrated.asked]
    found = ["bake", *(["steering"] if kinds else []), *(METHODS[kind].tag for kind in kinds)]
    found += KINDS[facts.record.kind].tags
    if "ablate" in kinds and any(word.startswith("refus") for word in safety_words(facts)):
        found.append("abliterated")
    if facts.base_repo is not None and facts.record.base.pinned:
        found.append("reproducible")
    return tuple(dict.fromkeys(found))


def _base(facts: Facts) -> Mapping[str, Any]:
    """Return the base, by its id on the Hub; a folder has none, and no relation either."""
    if facts.base_repo is None:
        return {}
    return {
        "base_model": facts.base_repo,
        "base_model_relation": KINDS[facts.record.kind].relation,
    }


def _licence(facts: Facts) -> Mapping[str, Any]:
    found = facts.licence
    if found.id is None:
        return {}
    if found.id != "other":
        return {"license": found.id}
    link = "LICENSE" if "LICENSE" in facts.names else None
    if facts.spec.licence is None and link is None:
        stated = stored.text(facts.base_card, "license_link", RECORD)
        link = stated if stated.startswith("https://") and stated.isprintable() else None
    named = {"license_name": found.name} if found.name is not None else {}
    return {"license": "other", **named, **({"license_link": link} if link else {})}


def _inherited(facts: Facts) -> Mapping[str, Any]:
    """Return what comes from the base's card, where the recipe says nothing else."""
    language = list(facts.spec.language or stored.words(facts.base_card, "language", RECORD))
    pipeline = stored.text(facts.base_card, "pipeline_tag", RECORD) or PIPELINE
    found: dict[str, Any] = {"pipeline_tag": pipeline}
    if language:
        found["language"] = language
    if facts.spec.datasets:
        found["datasets"] = list(facts.spec.datasets)
    return found
