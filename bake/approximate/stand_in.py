"""From a plan that cannot be exact to one that is as near as fitted stand-ins bring it.

What is fitted are edits like any others, so that the plan folds them as it folds everything. Its
findings then say what they stand for, and what of the effect is lost.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from msgspec import structs

from bake.approximate.fit import Calibration, Settings, calibrate
from bake.artifact.schema import CalibrationRecord, FitRecord
from bake.edits import Edit
from bake.errors import InexactPlan, InputError
from bake.families import Layout
from bake.plan import Exactness, Plan
from bake.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Compile = Callable[[Sequence[Edit]], Plan]


def hard_edits(plan: Plan, compile_: Compile) -> tuple[tuple[Edit, ...], tuple[Edit, ...]]:
    """Return the edits of a plan without an exact fold, and those that have one without them."""
    kept, found = list(range(len(plan.edits))), plan
    while found.exactness is Exactness.IMPOSSIBLE:
        impossible = {f.edit for f in found.findings if f.exactness is Exactness.IMPOSSIBLE}
        kept = [index for place, index in enumerate(kept) if place not in impossible]
        # What was exact beside the others need not be so without them.
        found = compile_([plan.edits[index] for index in kept])
    hard = (edit for index, edit in enumerate(plan.edits) if index not in kept)
    return tuple(hard), tuple(plan.edits[index] for index in kept)


def approximate(
    plan: Plan,
    compile_: Compile,
    *,
    model: "PreTrainedModel",
    layout: Layout,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    progress: Progress | None = None,
) -> tuple[Plan, CalibrationRecord]:
    """Return a plan with stand-ins for the edits that have no exact fold, and what was measured.

    Args:
        plan: what the edits lead to without stand-ins.
        compile_: makes a plan of edits.
        model: the base, loaded.
        layout: its layout, before any recast.
        prompts: token ids of the calibration texts.
        settings: ranks and corrections.
        progress: called with the writers that are done, and how many there are.

    Raises:
        InputError, UsageError: nothing can be fitted.
        InexactPlan: the stand-ins cannot be folded either.
    """
    hard, kept = hard_edits(plan, compile_)
    for tried in dict.fromkeys((settings, replace(settings, constant=False))):
        found = calibrate(
            model,
            layout,
            asked=plan.edits,
            kept=kept,
            prompts=prompts,
            settings=tried,
            progress=progress,
        )
        folded = compile_((*kept, *found.edits))
        if folded.exactness is not Exactness.IMPOSSIBLE:
            facts = _facts(found, hard, kept, tried)
            return labelled(folded, plan.edits, facts), facts
        # A bias that the architecture has and a target has not: the weights have to do alone.
    blame = next(f for f in folded.findings if f.exactness is Exactness.IMPOSSIBLE)
    raise InexactPlan(
        "the fitted stand-ins cannot be folded either", why=blame.reason, fix=blame.remedy
    )


def labelled(plan: Plan, asked: Sequence[Edit], facts: CalibrationRecord) -> Plan:
    """Return a plan of kept edits and stand-ins that says so in its findings.

    Args:
        plan: of the kept edits, then the stand-ins, all of which it folds.
        asked: what the stand-ins and the kept edits are for.
        facts: as ``approximate`` returned them, or a record kept them.

    Raises:
        InputError: the facts are of another plan.
    """
    reason, kept = _reason(facts), facts.kept
    if plan.exactness is Exactness.IMPOSSIBLE or kept >= len(plan.edits):
        raise InputError("what is recorded of the calibration is of another plan")
    findings = tuple(
        finding
        if finding.edit < kept
        else replace(finding, exactness=Exactness.APPROXIMATE, reason=reason)
        for finding in plan.findings
    )
    runtimes = tuple(
        structs.replace(verdict, status="approximate", reason=reason)
        if verdict.status == "exact"
        else verdict
        for verdict in plan.runtimes
    )
    return replace(plan, findings=findings, runtimes=runtimes, asked=tuple(asked))


def _facts(
    found: Calibration, hard: Sequence[Edit], kept: Sequence[Edit], settings: Settings
) -> CalibrationRecord:
    return CalibrationRecord(
        stands_for=tuple(_named(edit) for edit in hard),
        kept=len(kept),
        tokens=found.tokens,
        held_out_tokens=found.held_out,
        effect_kl=found.effect,
        kl=found.kl,
        share=found.share,
        constant=settings.constant,
        fits=tuple(FitRecord(**{**asdict(fit), "site": str(fit.site)}) for fit in found.fits),
    )


def _named(edit: Edit) -> str:
    shown = ", ".join(str(site) for site in edit.sites[:3])
    more = f" and {len(edit.sites) - 3} more" if len(edit.sites) > 3 else ""
    return f"{edit.kind} {edit.concept!r} at {shown}{more}"


def _reason(facts: CalibrationRecord) -> str:
    return (
        f"stands in for {'; '.join(facts.stands_for)}: fitted by least squares on "
        f"{facts.tokens:,} tokens; on {facts.held_out_tokens:,} others KL(hooked ‖ baked) is "
        f"{100 * facts.share:.2g} % of KL(hooked ‖ base)"
    )
