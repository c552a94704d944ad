"""Put a report together from the runs: rows, headline, texts, metrics, layers and leaks."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bake import __version__
from bake.verify import verdict
from bake.verify.adapter import as_merge, peft_version
from bake.verify.evidence import Evidence
from bake.verify.inputs import SAMPLES, Inputs
from bake.verify.limits import Limits
from bake.verify.models import LOADING
from bake.verify.report import Headline, Report, Sample
from bake.verify.rows import Row
from bake.verify.serving import Served
from bake.verify.stored.check import FilesChecked
from bake.verify.tokenizer import has_tokenizer, load_tokenizer


def report_of(
    limits: Limits, checked: FilesChecked, changed: Sequence[str] | None, served: Served
) -> Report:
    """Return the report of an artifact.

    Args:
        limits: with the runs that everything is held against.
        checked: what its files hold.
        changed: files that are not as they were exported; None where that is not known.
        served: what came of asking the runtimes.
    """
    inputs, evidence = limits.inputs, limits.evidence
    name, found = inputs.stored_name, evidence.compared
    compared = {"float64": found["planned"], "effect": found["base"]}
    shown, effect = found["planned"], found["base"]
    if "stored" in found:
        shown = compared[name] = found["stored"]
    elif served.compared and served.effect is not None:
        shown, effect = next(iter(served.compared.values())), served.effect
    leaking = tuple(map(asdict, evidence.leaks))
    rows = (
        verdict.effect_row(limits),
        *verdict.plan_rows(limits),
        *verdict.files_rows(checked, changed),
        *verdict.cost_rows(limits),
        *served.rows,
        *(verdict.metric_rows(name, found["stored"]) if "stored" in found else ()),
        *evidence.system,
        *verdict.greedy_rows(evidence),
        *verdict.leak_rows(leaking),
    )
    artifact, merged = inputs.artifact, inputs.artifact.merged
    metrics = {**compared, **served.compared}
    return Report(
        artifact=str(artifact.path),
        base=artifact.record.base.address,
        plan_digest=artifact.plan_digest,
        exactness=artifact.exactness,
        dtype=inputs.shape.dtype,
        rows=tuple(replace(row, name=as_merge(row.name)) if merged else row for row in rows),
        headline=_headline(limits, rows, served),
        environment=_environment(inputs),
        samples=_samples(inputs, evidence, served),
        prompts=_prompts(inputs, evidence),
        metrics={key: asdict(one.metrics) for key, one in metrics.items()},
        layers=_layers(inputs, evidence),
        leaks=leaking,
        kl=shown.kl,
        points=shown.points,
        kl_effect=effect.kl,
        points_effect=effect.points,
        runtimes=served.records,
        timing={"forward": evidence.seconds},
    )


def _headline(limits: Limits, rows: Sequence[Row], served: Served) -> Headline:
    """Return what is lost in the files, or in the first runtime where these are no checkpoint."""
    effect = limits.evidence.divergence("base")
    by_name = {row.name: row for row in rows}
    if verdict.LOST in by_name:
        lost, floor = by_name[verdict.LOST].value, by_name[verdict.FLOOR].value
        return Headline(effect.largest, lost, floor, limits.inputs.stored_name)
    for record in served.records:
        if "lost" in record:
            words = f"{limits.inputs.stored_name} in {record['runtime']}"
            return Headline(effect.largest, record["lost"], record["floor"], words)
    return Headline(effect.largest, None, None, limits.inputs.stored_name)


def _samples(inputs: Inputs, evidence: Evidence, served: Served) -> tuple[Sample, ...]:
    """Return a few prompts with the texts of base, hooked and baked model."""
    texts, prompts = evidence.texts, inputs.prompts.tokens[:SAMPLES]
    if not has_tokenizer(inputs.tokenizer) or not {"base", "hooked"} <= texts.keys():
        return ()
    tokenizer = load_tokenizer(inputs.tokenizer)
    baked = texts["baked"].tokens if "baked" in texts else served.texts

    def words(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    return tuple(
        Sample(
            words(prompt),
            words(texts["base"].tokens[i]),
            words(texts["hooked"].tokens[i][: inputs.generate]),
            words(baked[i]) if i < len(baked) else "",
        )
        for i, prompt in enumerate(prompts)
    )


def _prompts(inputs: Inputs, evidence: Evidence) -> dict[str, Any]:
    """Return what the models were run on."""
    answered = sum(map(len, evidence.transcript.answers))
    return {**inputs.prompts.to_json(), "answers": answered}


def _environment(inputs: Inputs) -> dict[str, str]:
    """Return the versions of what computed, and what it computed on."""
    import transformers

    return {
        "device": inputs.device,
        "attention": str(LOADING["attn_implementation"]),
        "bake": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"peft": peft_version()} if inputs.artifact.merged else {}),
    }


def _layers(inputs: Inputs, evidence: Evidence) -> Mapping[str, Any]:
    """Return how far each stream lies from that of the hooked model in float64, point by point."""
    if not evidence.sites:
        return {}
    named = {"base": "effect", "planned": "plan, not rounded"}
    named["stored"] = f"stored in {inputs.stored_name}"
    return {
        "sites": [str(site) for site in evidence.sites],
        **{named[name]: values for name, values in evidence.apart.items()},
    }
