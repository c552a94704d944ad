"""The metadata of a card: what the Hub files a model under."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from bake.artifact.verification import Interval, Report
from bake.cards.edits import asked_edits, edit_rows
from bake.cards.facts import Facts
from bake.cards.methods import METHODS
from bake.cards.notices import safety_words
from bake.cards.text import escape, printable

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PIPELINE = "text-generation"


def metadata(facts: Facts, repo: str | None) -> str:
    """Return the metadata as YAML, without the lines of dashes.

    Raises:
        InputError: the record names a kind of edit or a site that is none.
    """
    from huggingface_hub import ModelCardData

    results = list(_results(facts, facts.report)) if facts.report is not None else []
    name = printable(facts.title) if repo is None else repo.rpartition("/")[2]
    data = ModelCardData(
        library_name=facts.carrier.library,
        tags=list(_tags(facts)),
        model_name=name if results else None,
        eval_results=results or None,
        base_model=facts.base_repo,  # a folder has no id, and no relation either
        base_model_relation=facts.carrier.relation if facts.base_repo else None,
        **_licence(facts),
        **_inherited(facts),
    )
    return str(data.to_yaml()).rstrip("\n")


def _results(facts: Facts, report: Report) -> Iterator["EvalResult"]:
    """Yield the numbers of the verification that the metadata states."""
    from huggingface_hub import EvalResult

    result = partial(
        EvalResult,
        task_type=PIPELINE,
        task_name="Text Generation",
        dataset_type="bake-verification-prompts",
        dataset_name=_dataset_name(report),
    )
    for kind, name, value in _metrics(report):
        if value is not None:
            yield result(metric_type=kind, metric_name=name, metric_value=value)


def _metrics(report: Report) -> Iterator[tuple[str, str, float | None]]:
    """Yield type, name and value of what was measured."""
    values = report.metrics.get(report.stored, {})
    for key, name in (
        ("mean_kl", "mean KL(hooked ‖ baked), nats"),
        ("max_dlogit", "largest logit difference, hooked against baked"),
        ("same_top", "share of tokens with the same most likely next one, hooked and baked"),
    ):
        yield key, name, values.get(key)
    for served in report.runtimes:
        label = f"share of the edit's KL that is lost in {escape(served.runtime)}"
        yield "kl_share", label, served.lost
    for name, models in report.effects.items():
        kind = "perplexity" if name == "perplexity" else "score"
        on = (
            f" on {escape(report.text.source)}"
            if kind == "perplexity" and report.text.source
            else ""
        )
        yield kind, f"{escape(name)}{on}, baked", models.get("baked", Interval()).value


def _dataset_name(report: Report) -> str:
    """Return what the metrics were measured on, in words."""
    prompts = report.prompts
    if not prompts.prompts or not prompts.digest:
        return "prompts of bake verify"
    return f"{prompts.prompts} prompts, token ids {printable(prompts.digest)}"


def _tags(facts: Facts) -> tuple[str, ...]:
    """Return the tags, without repeats."""
    kinds = [row.kind for row in edit_rows(facts) if not row.stand_in]
    kinds += [edit.kind for edit in asked_edits(facts)]
    found = ["bake", *(["steering"] if kinds else []), *(METHODS[kind].tag for kind in kinds)]
    found += facts.carrier.tags
    if "ablate" in kinds and any(word.startswith("refus") for word in safety_words(facts)):
        found.append("abliterated")
    if facts.commit is not None:
        found.append("reproducible")
    return tuple(dict.fromkeys(found))


def _licence(facts: Facts) -> Mapping[str, Any]:
    found, stated = facts.licence, facts.base_card.license_link
    if found.id is None:
        return {}
    if found.id != "other":
        return {"license": found.id}
    link = "LICENSE" if "LICENSE" in facts.names else None
    if facts.spec.licence is None and link is None and isinstance(stated, str):
        link = stated if stated.startswith("https://") and stated.isprintable() else None
    named = {"license_name": printable(found.name)} if found.name is not None else {}
    return {"license": "other", **named, **({"license_link": link} if link else {})}


def _inherited(facts: Facts) -> Mapping[str, Any]:
    """Return what comes from the base's card, where the recipe says nothing else."""
    stated, pipeline = facts.base_card.language, facts.base_card.pipeline_tag
    language = facts.spec.language or ((stated,) if isinstance(stated, str) else stated or ())
    return {
        "pipeline_tag": printable(pipeline) if isinstance(pipeline, str) and pipeline else PIPELINE,
        "language": [printable(each) for each in language] or None,
        "datasets": list(facts.spec.datasets) or None,
    }
