"""A plan as the part of a record that stands for it, in the form of one carrier."""

from math import prod

from bake.artifact.schema import (
    BiasChange,
    FindingRecord,
    KeyChange,
    PlanRecord,
    TensorChange,
)
from bake.plan.carriers import carrier_findings, carrier_runtimes
from bake.plan.compile import ITEM_BYTES
from bake.plan.types import BiasUpdate, Exactness, Finding, Plan, TensorUpdate


def plan_record(plan: Plan, carrier: str | None = None, *, codes: bool = False) -> PlanRecord:
    """Return everything of a plan but the values of its maps, which its digest stands for.

    Args:
        plan: the plan.
        carrier: what it is written as; findings and runtimes are those of a checkpoint when None.
        codes: whether it is a GGUF file whose edited weights are stored in a few bits each.
    """
    findings, exactness, runtimes = plan.findings, plan.exactness, plan.runtimes
    if carrier is not None:
        findings = carrier_findings(plan, carrier)
        exactness = max((f.exactness for f in findings), key=list(Exactness).index)
        runtimes = carrier_runtimes(plan, carrier, codes=codes)
    return PlanRecord(
        digest=plan.digest,
        exactness=exactness.value,
        family=plan.layout.family.name,
        loader=plan.layout.family.loader,
        findings=tuple(_finding(finding) for finding in findings),
        tensors=tuple(_tensor(update, plan.layout.dtype) for update in plan.tensors),
        biases=tuple(_bias(update) for update in plan.biases),
        config=tuple(KeyChange(key=c.key, old=c.old, new=c.new) for c in plan.config),
        runtimes=runtimes,
        notes=plan.notes,
        created_bytes=plan.created_bytes,
    )


def other_parts(recorded: PlanRecord, plan: Plan) -> tuple[str, ...]:
    """Return what a plan changes otherwise than a recorded one: its tensors, biases or config.

    The digests are no measure: the last bits of a decomposition differ between machines.
    """
    here = plan_record(plan)
    parts = ("tensors", "biases", "config")
    return tuple(part for part in parts if getattr(here, part) != getattr(recorded, part))


def _finding(finding: Finding) -> FindingRecord:
    # A record lists the edits in order, so it has no index of them.
    return FindingRecord(
        kind=str(finding.kind),
        concept=finding.concept,
        sites=tuple(map(str, finding.sites)),
        exactness=finding.exactness.value,
        reason=finding.reason,
        remedy=finding.remedy,
    )


def _tensor(update: TensorUpdate, dtype: str) -> TensorChange:
    sides = [
        *(["output"] if update.outputs else []),
        *(["input"] if update.input is not None else []),
        *(["update"] if update.updates or update.added is not None else []),
        *(["replaced"] if update.replacement is not None else []),
    ]
    return TensorChange(
        name=update.name,
        source=update.source,
        shape=tuple(update.shape),
        output_axis=update.output_axis,
        sides=tuple(sides) or ("copied",),
        bytes=prod(update.shape) * ITEM_BYTES[dtype],
    )


def _bias(update: BiasUpdate) -> BiasChange:
    return BiasChange(
        name=update.name,
        size=update.size,
        experts=update.experts,
        created=update.create,
        zero=update.is_zero(),
    )
