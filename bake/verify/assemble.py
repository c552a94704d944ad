"""Put a report together from the runs: rows, metrics, layers and leaks."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bake import __version__
from bake.verify import verdict
from bake.verify.adapter import as_merge, peft_version
from bake.verify.evidence import Evidence
from bake.verify.inputs import Inputs
from bake.verify.leak import leaks
from bake.verify.metrics import Compared, compare_logits, stream_differences
from bake.verify.models import LOADING
from bake.verify.observe import block_sites
from bake.verify.report import Report, Row
from bake.verify.runs import Trace, dtype_name
from bake.verify.serving import Served


def report_of(inputs: Inputs, evidence: Evidence, changed: Sequence[str] | None) -> Report:
    """Return the report of a checkpoint.

    Args:
        inputs: what was compared.
        evidence: its runs.
        changed: files that are not as they were exported; None where that is not known.
    """
    exact = evidence.exact.reference
    compared = {
        dtype_name(dtype): _compared(inputs, runs.reference, runs.baked)
        for dtype, runs in evidence.runs.items()
    }
    # The reference beside itself in float64: what the dtype alone costs, in every metric.
    floors = {
        f"floor {dtype_name(dtype)}": _compared(inputs, exact, evidence.runs[dtype].reference)
        for dtype in inputs.dtypes
    }
    effect = _compared(inputs, exact, evidence.base)
    serving = compared[dtype_name(inputs.storage)]
    before, after = evidence.base.writes, evidence.exact.baked.writes
    leaking = tuple(map(asdict, leaks(inputs.layout, inputs.artifact.edits, before, after)))
    limits = verdict.limits_of(inputs, evidence)
    rows = (
        verdict.effect_row(limits),
        *verdict.files_row(changed),
        *verdict.exact_rows(limits),
        *verdict.fixed_point_row(limits),
        *verdict.divergence_row(limits, serving, effect),
        *verdict.control_rows(limits),
        *verdict.metric_rows(dtype_name(inputs.storage), serving),
        *verdict.greedy_rows(limits),
        *verdict.leak_rows(leaking),
    )
    return replace(
        _report(inputs, rows, {**compared, **floors}, serving, effect),
        layers=_layers(inputs, evidence),
        leaks=leaking,
    )


def served_report(inputs: Inputs, served: Served, changed: Sequence[str] | None) -> Report:
    """Return the report of what is no checkpoint: runtimes load it, and nothing else does.

    Args:
        inputs: what was compared.
        served: what came of asking the runtimes.
        changed: files that are not as they were exported; None where that is not known.
    """
    effect, *rows = served.rows
    first = next(iter(served.compared.values()), None)
    rows = [effect, *verdict.files_row(changed), *rows]
    return replace(
        _report(inputs, rows, served.compared, first, served.effect), runtimes=served.records
    )


def _report(
    inputs: Inputs,
    rows: Sequence[Row],
    compared: Mapping[str, Compared],
    shown: Compared | None,
    effect: Compared | None,
) -> Report:
    """Return what every report has; the plots show one comparison beside the effect."""
    artifact, merged = inputs.artifact, inputs.artifact.merged
    metrics = dict(compared) if effect is None else {**compared, "effect": effect}
    return Report(
        artifact=str(artifact.path),
        base=artifact.record.base.address,
        plan_digest=artifact.plan_digest,
        exactness=artifact.exactness,
        dtype=inputs.layout.dtype,
        rows=tuple(replace(row, name=as_merge(row.name)) if merged else row for row in rows),
        environment=_environment(inputs),
        prompts=inputs.prompts.to_json(),
        metrics={name: asdict(found.metrics) for name, found in metrics.items()},
        kl=() if shown is None else shown.kl,
        points=() if shown is None else shown.points,
        kl_effect=() if effect is None else effect.kl,
        points_effect=() if effect is None else effect.points,
    )


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


def _compared(inputs: Inputs, reference: Trace, other: Trace) -> Compared:
    last = block_sites(inputs.layout)[-1]
    hidden = (reference.streams[last], other.streams[last])
    return compare_logits(reference.logits, other.logits, hidden=hidden)


def _layers(inputs: Inputs, evidence: Evidence) -> dict[str, Any]:
    """Return how far each stream lies from that of the reference in float64, point by point."""
    sites, storage = block_sites(inputs.layout), inputs.storage
    exact, serving, name = evidence.exact, evidence.runs[storage], dtype_name(storage)
    others = {
        "effect": evidence.base,
        "float64": exact.baked,
        name: serving.baked,
        f"floor {name}": serving.reference,
    }
    if storage == torch.float64:
        del others["floor float64"]  # the reference itself
    reference = exact.reference.streams
    return {
        "sites": [str(site) for site in sites],
        **{key: stream_differences(reference, run.streams, sites) for key, run in others.items()},
    }
