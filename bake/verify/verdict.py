"""Rows of a report: each number beside the limit that it is judged by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from bake.verify.broken import ControlRun
from bake.verify.evidence import Evidence
from bake.verify.fixed_point import distance
from bake.verify.greedy import agreement
from bake.verify.inputs import Inputs
from bake.verify.loss import Divergence, mean_of, rounding_divergence
from bake.verify.metrics import Compared, largest_difference
from bake.verify.rows import Row, above, at_most, unjudged
from bake.verify.stored.check import FilesChecked
from bake.verify.stored.deviation import DIRECTION, NOISE, Deviation
from bake.verify.tolerance import (
    FLOOR_FACTOR,
    LOSS_FACTOR,
    MOST_KL,
    RELOCATED_KL,
    SHARE,
    logit_tolerance,
    logprob_tolerance,
    stream_tolerance,
)


@dataclass(frozen=True, eq=False)
class Limits:
    """What the rows of one verification are held to."""

    inputs: Inputs
    evidence: Evidence

    @property
    def exactness(self) -> str:
        """What the plan says of the artifact."""
        return self.inputs.artifact.exactness

    @cached_property
    def scale(self) -> float:
        """The largest logit of the hooked model."""
        return float(self.evidence.hooked.logits.abs().max())

    @cached_property
    def effect(self) -> float:
        """max |Δlogit| of hooked against base, in float64."""
        return self.evidence.compared["base"].metrics.max_dlogit

    @cached_property
    def rounding(self) -> float:
        """What rounding in float64 alone may move a logit by.

        To the general bound comes what this model makes of rounding: a token whose stream has a
        small variance before a norm amplifies it. float32 shows how much, and float64 rounds by
        another machine epsilon.
        """
        evidence, shape, scale = self.evidence, self.inputs.shape, self.scale
        bound = logit_tolerance(
            torch.float64, layers=shape.layers, hidden=shape.hidden, scale=scale
        )
        unit = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        amplified = largest_difference(evidence.narrow.logits, evidence.hooked.logits)
        return bound + FLOOR_FACTOR * unit * amplified

    @property
    def plan(self) -> float:
        """What the planned model may differ by from the hooked one, in a logit."""
        return max(SHARE * self.effect, self.rounding)

    @property
    def relocated(self) -> float:
        """The share of the effect that a relocated plan may lose before anything is rounded."""
        most = self.inputs.most_kl
        return RELOCATED_KL if most is None else most

    @cached_property
    def arithmetic(self) -> float:
        """The KL that arithmetic in float32 may add, in nats."""
        shape, scale = self.inputs.shape, self.scale
        tolerance = logprob_tolerance(
            torch.float32, layers=shape.layers, hidden=shape.hidden, scale=scale
        )
        return rounding_divergence(tolerance)

    @cached_property
    def floor(self) -> Divergence:
        """What rounding of the same weights costs where nothing is edited; zero where none is."""
        draws = self.evidence.draws
        return mean_of(draws) if draws else Divergence(0.0, 0.0)

    def loss(self, effect: Divergence, *floors: float) -> float | None:
        """Return the share of the effect that storage and runtime may lose, or None.

        Args:
            effect: of the edit, over the tokens that are compared.
            floors: shares of it that are lost where nothing was edited.
        """
        most = self.inputs.most_kl
        if self.exactness == "nulling":
            return most  # another function than the hooked one, which is said, and no loss
        if self.exactness != "exact":
            return MOST_KL if most is None else most
        slack = self.arithmetic / effect.largest if effect.largest else math.inf
        if slack >= 1:
            return math.inf  # no edit is told from none here, which the control says
        return min(MOST_KL if most is None else most, LOSS_FACTOR * sum(floors) + slack)


def effect_row(limits: Limits) -> Row:
    """The edit does something: equality proves nothing where nothing was changed."""
    return above("effect: hooked − base", limits.effect, limits.rounding, "effect")


# --- is the plan right? ------------------------------------------------------------------------


def plan_rows(limits: Limits) -> tuple[Row, ...]:
    """The planned model, nothing of it rounded, against the hooks, and broken plans beside it."""
    evidence = limits.evidence
    if limits.exactness == "nulling":
        value, limit = _fixed_point(limits, evidence.planned.streams)
        rows = [at_most("plan: max |h(x) − x|, not rounded, in float64", value, limit, "", "plan")]
        broken = [(c, _fixed_point(limits, c.streams)[0]) for c in evidence.controls]
        # The head reads the stream and writes nothing to it.
        broken = [(c, value) for c, value in broken if c.kind != "tied head"]
    elif limits.exactness == "relocated":
        effect, lost = evidence.divergence("base"), evidence.divergence("planned")
        value, limit = lost.over(effect), limits.relocated
        rows = [at_most(RELOCATED, value, limit, _parts(lost, effect), "plan")]
        broken = [(c, c.share) for c in evidence.controls if c.share is not None]
    else:
        limit = limits.plan
        value = evidence.missed
        share = f"{value / limits.effect:.1e} of the effect" if limits.effect else "no effect"
        name = "plan: not rounded − hooked, in float64"
        rows = [at_most(name, value, limit, share, "plan")]
        broken = [(c, c.difference) for c in evidence.controls]
    differences = limits.inputs.planned.differences
    said = differences[0] if differences else ""
    rows.append(at_most("plan: differences from the record", len(differences), 0.0, said, "plan"))
    return (*rows, *(_plan_control(control, value, limit) for control, value in broken))


RELOCATED = "plan: KL(hooked ‖ not rounded) / KL(hooked ‖ base), in float64"
"""The row that says what a relocated plan loses of the edit before anything is rounded."""


def _plan_control(control: ControlRun, value: float, limit: float) -> Row:
    return above(f"control: plan, {control.kind}, {control.tensor}", value, limit, "plan control")


def _fixed_point(limits: Limits, streams: Mapping[Any, Any]) -> tuple[float, float]:
    edits = limits.inputs.nulled
    _, scale = distance(edits, limits.evidence.planned.streams)
    value, _ = distance(edits, streams)
    return value, stream_tolerance(torch.float64, layers=limits.inputs.shape.layers, scale=scale)


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
    for control, found in checked.controls:
        name = f"control: files, {control.kind}, {control.tensor}"
        rows.append(above(name, found.score, 1.0, "files control"))
    return tuple(rows)


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
    if evidence.stored is None:
        return ()
    effect, lost = evidence.divergence("base"), evidence.divergence("stored")
    floor = limits.floor.over(effect)
    limit = limits.loss(effect, floor)
    rows = [
        at_most(LOST, lost.over(effect), limit, _parts(lost, effect), "cost"),
        unjudged(FLOOR, floor, "rounding the same weights unedited", "floor"),
    ]
    if limit is not None:
        rows.append(above("control: nothing edited, share lost", 1.0, limit, "cost control"))
    return (*rows, *_stand_in_rows(limits))


LOST = "lost in storage: KL(hooked ‖ stored) / KL(hooked ‖ base)"
"""The row that says what the stored weights lose of the edit."""
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
