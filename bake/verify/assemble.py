"""Put a report together from the runs: rows, metrics, layers and leaks."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bake import __version__
from bake.verify import verdict
from bake.verify.evidence import TORCH, Evidence, Subject
from bake.verify.leak import leaks
from bake.verify.metrics import Compared, compare_logits, stream_differences
from bake.verify.models import LOADING
from bake.verify.observe import block_sites
from bake.verify.prompts import PromptSet
from bake.verify.report import Report
from bake.verify.runs import Trace


def report_of(
    subject: Subject,
    evidence: Evidence,
    changed: Sequence[str] | None,
    prompts: PromptSet,
    most_kl: float | None,
) -> Report:
    """Return the report of a baked checkpoint.

    Args:
        subject: what was compared.
        evidence: its runs.
        changed: files that are not as they were exported; None where that is not known.
        prompts: what the models were run on.
        most_kl: what an approximate plan is held to.
    """
    layout, storage = subject.layout, TORCH[subject.layout.dtype]
    bench = verdict.bench_of(subject.artifact, evidence, storage, layout.layers, layout.hidden)
    compared = {
        _name(dtype): _compared(subject, runs.hooked, runs.baked)
        for dtype, runs in evidence.runs.items()
    }
    effect = _compared(subject, evidence.exact.hooked, evidence.base)
    name, shown = _name(storage), compared[_name(storage)]
    found = _leaks(subject, evidence)
    # The reference beside itself in float64: what the dtype alone costs, in every metric.
    floors = {
        f"floor {_name(dtype)}": _compared(subject, evidence.exact.hooked, runs.hooked)
        for dtype, runs in evidence.runs.items()
        if dtype != torch.float64
    }
    return Report(
        artifact=str(subject.artifact.path),
        base=subject.artifact.base_name,
        plan_digest=subject.artifact.plan_digest,
        exactness=subject.artifact.exactness,
        dtype=layout.dtype,
        rows=(
            verdict.effect_row(bench),
            *verdict.files_row(changed),
            *verdict.exact_rows(bench),
            *verdict.fixed_point_row(bench),
            *verdict.divergence_row(bench, shown, effect, most_kl),
            *verdict.control_rows(bench, most_kl),
            *verdict.metric_rows(name, shown),
            *verdict.greedy_rows(bench),
            *verdict.leak_rows(found),
        ),
        environment=environment(subject.device),
        prompts=prompts.to_json(),
        metrics={
            **{key: one.metrics.to_json() for key, one in (compared | floors).items()},
            "effect": effect.metrics.to_json(),
        },
        layers=_layers(subject, evidence, storage),
        leaks=found,
        kl=shown.kl,
        points=shown.points,
        kl_effect=effect.kl,
        points_effect=effect.points,
    )


def environment(device: str) -> dict[str, str]:
    """Return the versions of what computed, and what it computed on."""
    import transformers

    return {
        "device": device,
        "attention": str(LOADING["attn_implementation"]),
        "bake": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compared(subject: Subject, reference: Trace, other: Trace) -> Compared:
    last = block_sites(subject.layout)[-1]
    hidden = (reference.streams[last], other.streams[last])
    return compare_logits(reference.logits, other.logits, hidden=hidden)


def _layers(subject: Subject, evidence: Evidence, storage: torch.dtype) -> dict[str, Any]:
    """Return how far each stream lies from that of the hooked model in float64, point by point."""
    sites = block_sites(subject.layout)
    exact, serving, name = evidence.exact, evidence.runs[storage], _name(storage)
    others = {
        "effect": evidence.base,
        "float64": exact.baked,
        name: serving.baked,
        f"floor {name}": serving.hooked,
    }
    if storage == torch.float64:
        del others["floor float64"]  # the reference itself
    reference = exact.hooked.streams
    return {
        "sites": [str(site) for site in sites],
        **{key: stream_differences(reference, run.streams, sites) for key, run in others.items()},
    }


def _leaks(subject: Subject, evidence: Evidence) -> tuple[Mapping[str, Any], ...]:
    before, after = evidence.base.writes, evidence.exact.baked.writes
    return tuple(
        {
            "concept": leak.concept,
            "writer": leak.writer,
            "layer": leak.layer,
            "before": leak.before,
            "after": leak.after,
            "constant": leak.constant,
            "varying": leak.varying,
        }
        for leak in leaks(subject.layout, subject.artifact.edits, before, after)
    )
