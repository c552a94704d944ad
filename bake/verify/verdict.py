"""Rows of a report: each number beside the limit that it is judged by."""

from collections.abc import Mapping, Sequence
from typing import Any

from bake.verify.evidence import ControlRun, Evidence
from bake.verify.fixed_point import distance
from bake.verify.greedy import agreement
from bake.verify.limits import Limits
from bake.verify.loss import Divergence
from bake.verify.metrics import Compared
from bake.verify.rows import Row, above, at_most, unjudged
from bake.verify.stored.check import FilesChecked, SpoiledTensor
from bake.verify.stored.deviation import DIRECTION, NOISE, Deviation


def effect_row(limits: Limits) -> Row:
    """The edit does something: equality proves nothing where nothing was changed."""
    return above("effect: hooked − base", limits.effect, limits.rounding, "effect")


# --- is the plan right? ------------------------------------------------------------------------


def plan_rows(limits: Limits) -> tuple[Row, ...]:
    """The planned model, nothing of it rounded, against the hooks, and broken plans beside it."""
    differences = limits.inputs.planned.differences
    said = differences[0] if differences else ""
    return (
        _plan_row(limits),
        at_most("plan: differences from the record", len(differences), 0.0, said, "plan"),
        *map(_plan_control, limits.evidence.controls),
    )


def _plan_row(limits: Limits) -> Row:
    evidence = limits.evidence
    if limits.exactness == "nulling":
        value, _ = distance(limits.inputs.nulled, evidence.held)
        name = "plan: max |h(x) − x|, not rounded, in float64"
        return at_most(name, value, limits.fixed_point, "", "plan")
    if limits.exactness == "relocated":
        effect, lost = evidence.divergence("base"), evidence.divergence("planned")
        parts = _parts(lost, effect)
        return at_most(RELOCATED, lost.over(effect), limits.relocated, parts, "plan")
    value = evidence.missed
    share = f"{value / limits.effect:.1e} of the effect" if limits.effect else "no effect"
    return at_most("plan: not rounded − hooked, in float64", value, limits.plan, share, "plan")


RELOCATED = "plan: KL(hooked ‖ not rounded) / KL(hooked ‖ base), in float64"
"""The row that says what a relocated plan loses of the edit before anything is rounded."""


def _plan_control(control: ControlRun) -> Row:
    name = f"control: plan, {control.kind}, {control.tensor}"
    if control.faint:
        note = f"{FAINT}: the mistake moves the plan by {control.moved:.1e}"
        return unjudged(name, control.value, note, "plan control")
    return above(name, control.value, control.limit, "plan control")


FAINT = "none that was tried has to be told"
"""Of a kind of mistake: all are too small for the limit to say anything about them."""


# --- do the files hold it? ---------------------------------------------------------------------


def files_rows(checked: FilesChecked, changed: Sequence[str] | None) -> tuple[Row, ...]:
    """The files are those that the export wrote, and hold what the plan means, value by value."""
    rows = []
    if changed is not None:
        note = f"changed: {_first(changed)}" if changed else ""
        rows.append(at_most("files as exported", len(changed), 0.0, note, "files"))
    if not checked.deviations and not checked.strays:
        note = "what they should hold is not known: the base's GGUF is not at hand"
        return (*rows, unjudged("files: values compared", 0.0, note, "files"))
    outside = sum(one.outside for one in checked.deviations)
    wrong = [one.name for one in checked.deviations if one.outside]
    note = f"of {checked.values:,}" + (f"; {_first(wrong)}" if wrong else "")
    rows += [
        at_most("files: values off the plan", outside, 0.0, note, "files"),
        at_most(
            "files: tensors that were to stay, or to be there",
            len(checked.strays),
            0.0,
            _first(checked.strays),
            "files",
        ),
        _worst("files: rounding over that of nearest", checked, lambda one: one.noise, NOISE),
        _worst(
            "files: rounding along the edit over that of nearest",
            checked,
            lambda one: one.direction,
            DIRECTION,
        ),
    ]
    return (*rows, *map(_files_control, checked.controls))


def _files_control(spoiled: SpoiledTensor) -> Row:
    control, score = spoiled.control, spoiled.deviation.score
    name = f"control: files, {control.kind}, {control.tensor}"
    if spoiled.faint:
        return unjudged(name, score, f"{FAINT}: rounding is as large", "files control")
    return above(name, score, 1.0, "files control")


def _worst(name: str, checked: FilesChecked, by: Any, limit: float) -> Row:
    worst: Deviation | None = checked.worst(by)
    if worst is None:
        return at_most(name, 0.0, limit, "", "files")
    return at_most(name, by(worst), limit, worst.name, "files")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


# --- what did it cost? -------------------------------------------------------------------------


def cost_rows(limits: Limits) -> tuple[Row, ...]:
    """What is lost of the edit in the stored weights, beside what rounding alone loses."""
    evidence = limits.evidence
    if evidence.storage is None:
        return ()
    effect, lost = evidence.storage
    floor = limits.floor.over(effect)
    limit = limits.loss(effect, floor)
    name = LOST if evidence.decoded is None else LOST_DECODED
    rows = [
        at_most(name, lost.over(effect), limit, _parts(lost, effect), "cost"),
        unjudged(FLOOR, floor, "rounding the same weights unedited", "floor"),
    ]
    if limit is not None:
        rows.append(above("control: nothing edited, share lost", 1.0, limit, "cost control"))
    return (*rows, *_stand_in_rows(limits))


LOST = "lost in storage: KL(hooked ‖ stored) / KL(hooked ‖ base)"
"""The row that says what the stored weights lose of the edit."""
LOST_DECODED = "lost in storage, on the file's own weights: KL(hooked ‖ stored) / KL(hooked ‖ base)"
"""The same of a GGUF that was made from one of the base: of the weights that both decode to."""
FLOOR = "floor: KL share of rounding alone"


def _parts(lost: Divergence, effect: Divergence) -> str:
    words = [f"prompts {lost.prompts / effect.prompts:.2e}"] if effect.prompts else []
    if lost.answers is not None and effect.answers:
        words.append(f"answers {lost.answers / effect.answers:.2e}")
    return ", ".join(words)


def _stand_in_rows(limits: Limits) -> tuple[Row, ...]:
    """What is lost of the effect's KL without each of the stand-ins: what each is worth."""
    evidence = limits.evidence
    if limits.exactness != "approximate":
        return ()
    whole = evidence.compared["base"].metrics.mean_kl
    return tuple(
        unjudged(f"without {c.tensor}: KL share lost", c.kl / whole, c.kind)
        for c in evidence.controls
        if whole and c.kl is not None and c.kind in ("forgotten tensor", "forgotten bias")
    )


def metric_rows(name: str, comparison: Compared) -> tuple[Row, ...]:
    """The numbers that nothing is demanded of."""
    numbers = comparison.metrics
    return (
        unjudged("same most likely token", numbers.same_top, "share of tokens"),
        unjudged(f"mean KL(hooked ‖ stored) of {name}", numbers.mean_kl, "nats"),
        unjudged("95 % of KL(hooked ‖ stored)", numbers.p95_kl, "nats"),
        unjudged("largest KL(hooked ‖ stored)", numbers.max_kl, "nats"),
        unjudged("largest |Δlog p|", numbers.max_dlogprob, "nats"),
        unjudged("mean |Δlog p|", numbers.mean_dlogprob, "nats"),
    )


def greedy_rows(evidence: Evidence) -> tuple[Row, ...]:
    """How far the two models write the same text, freely running in float32."""
    texts = evidence.texts
    if "baked" not in texts:
        return ()
    ours, theirs = texts["hooked"].tokens, texts["baked"].tokens
    same = agreement(ours, theirs)
    return (unjudged("same greedy tokens", same, "share of tokens before the texts part"),)


def leak_rows(leaks: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    """The writer that adds most along a direction that the edits read, in the planned model."""
    if not leaks:
        return ()
    worst = max(leaks, key=lambda leak: float(leak["varying"]))
    layer = "" if worst["layer"] is None else f" of layer {worst['layer']}"
    note = f"{worst['writer']}{layer}; at most {max(leak['before'] for leak in leaks):.3g} before"
    name = "largest leak of a writer, |rᵀ·write|"
    return (unjudged(name, worst["varying"], note),)
