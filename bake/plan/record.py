"""A plan as JSON: what ``--json`` prints and ``bake.json`` keeps."""

from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from typing import Any

from bake.plan.compile import ITEM_BYTES
from bake.plan.types import BiasUpdate, Finding, Plan, RuntimeVerdict, TensorUpdate


def plan_record(plan: Plan) -> dict[str, Any]:
    """Return everything of a plan but the values of its maps, which its digest stands for."""
    return {
        "digest": plan.digest,
        "exactness": str(plan.exactness),
        "family": plan.layout.family.name,
        "findings": findings_record(plan.findings),
        "tensors": [_tensor(update, plan.layout.dtype) for update in plan.tensors],
        "biases": [_bias(update) for update in plan.biases],
        "config": [{"key": c.key, "old": c.old, "new": c.new} for c in plan.config],
        "runtimes": runtimes_record(plan.runtimes),
        "notes": list(plan.notes),
        "created_bytes": plan.created_bytes,
    }


def findings_record(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return what is said of every edit; a record lists the edits in order, so it has no index."""
    return [
        {
            "kind": finding.kind,
            "concept": finding.concept,
            "sites": [str(site) for site in finding.sites],
            "exactness": str(finding.exactness),
            "reason": finding.reason,
            "remedy": finding.remedy,
        }
        for finding in findings
    ]


def runtimes_record(verdicts: Sequence[RuntimeVerdict]) -> list[dict[str, Any]]:
    """Return verdicts on one carrier, a runtime each."""
    return [asdict(verdict) for verdict in verdicts]


def _tensor(update: TensorUpdate, dtype: str) -> dict[str, Any]:
    sides = [
        *(["output"] if update.outputs else []),
        *(["input"] if update.input is not None else []),
        *(["update"] if update.updates else []),
        *(["replaced"] if update.replacement is not None else []),
    ]
    return {
        "name": update.name,
        "source": update.source,
        "shape": list(update.shape),
        "output_axis": update.output_axis,
        "sides": sides or ["copied"],
        "bytes": prod(update.shape) * ITEM_BYTES[dtype],
    }


def _bias(update: BiasUpdate) -> dict[str, Any]:
    return {
        "name": update.name,
        "size": update.size,
        "created": update.create,
        "zero": update.is_zero(),
    }
