"""Rows of a report: each number beside the limit that it is judged by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bake.sites import Site
from bake.verify.evidence import Evidence, Measured
from bake.verify.fixed_point import distance
from bake.verify.greedy import agreement
from bake.verify.inputs import Inputs
from bake.verify.metrics import Compared, largest_difference, mean_kl
from bake.verify.report import Row, above, at_most, unjudged
from bake.verify.runs import dtype_name
from bake.verify.tolerance import FLOOR_FACTOR, logit_tolerance, stream_tolerance

WIDE = (torch.float64, torch.float32)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the rows of one verification are held to."""

    inputs: Inputs
    evidence: Evidence
    effect: float
    """max |Δlogit| of hooked against base, in float64."""

    @property
    def exactness(self) -> str:
        """What the plan says of the artifact."""
        return self.inputs.artifact.exactness

    @property
    def demanded(self) -> bool:
        """Whether the plan says that baked and hooked are one function."""
        return self.exactness == "exact"

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return what rounding alone may move a logit by.

        To the general bound comes what this model makes of rounding: a token whose stream has a
        small variance before a norm amplifies it. float32 shows how much, and the other dtypes
        round by another machine epsilon.
        """
        layout, scale = self.inputs.layout, float(self.evidence.exact.reference.logits.abs().max())
        bound = logit_tolerance(dtype, layers=layout.layers, hidden=layout.hidden, scale=scale)
        unit = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        return bound + FLOOR_FACTOR * unit * self.floor(torch.float32)

    def floor(self, dtype: torch.dtype) -> float:
        """Return how far the reference in one dtype lies from itself: in float64, and rebatched."""
        measured, exact = self.evidence.runs[dtype], self.evidence.exact
        error = largest_difference(measured.reference.logits, exact.reference.logits)
        return max(error, self.rebatched(measured))

    def rebatched(self, measured: Measured) -> float:
        """Return how far the reference lies from itself in other batches."""
        assert measured.rebatched is not None
        return largest_difference(measured.reference.logits, measured.rebatched.logits)

    @property
    def limit(self) -> float:
        """What the baked checkpoint may differ by in float64, given how it is stored."""
        storage = self.inputs.storage
        if storage in WIDE:
            return self.tolerance(storage)
        return FLOOR_FACTOR * self.floor(storage)


def limits_of(inputs: Inputs, evidence: Evidence) -> Limits:
    """Return what the rows of a verification are held to."""
    effect = largest_difference(evidence.exact.reference.logits, evidence.base.logits)
    return Limits(inputs, evidence, effect)


def effect_row(limits: Limits) -> Row:
    """The edit does something: equality proves nothing where nothing was changed."""
    return above("effect: hooked − base", limits.effect, limits.tolerance(torch.float64), "effect")


def files_row(changed: Sequence[str] | None) -> tuple[Row, ...]:
    """The files are those that the export wrote."""
    if changed is None:
        return ()
    note = f"changed: {', '.join(changed[:3])}" + (" …" if len(changed) > 3 else "")
    return (
        at_most("files as exported", float(len(changed)), 0.0, note if changed else "", "files"),
    )


def exact_rows(limits: Limits) -> tuple[Row, ...]:
    """Baked against hooked, in float64 and in every other dtype, with the floors beside them."""
    exact, limit = limits.evidence.exact, limits.limit
    error = largest_difference(exact.baked.logits, exact.reference.logits)
    share = f"{error / limits.effect:.1e} of the effect" if limits.effect else "no effect"
    demanded = limit if limits.demanded else None
    rows = [at_most("baked − hooked, evaluated in float64", error, demanded, share)]
    for dtype, measured in limits.evidence.runs.items():
        if dtype != torch.float64:
            rows += _dtype_rows(limits, dtype, measured, limit)
    return tuple(rows)


def _dtype_rows(limits: Limits, dtype: torch.dtype, measured: Measured, limit: float) -> list[Row]:
    name, floor, rebatched = dtype_name(dtype), limits.floor(dtype), limits.rebatched(measured)
    # Rounding of the stored weights costs the wide dtypes as much as it costs float64.
    allowed = FLOOR_FACTOR * floor + (limit if dtype in WIDE else 0.0)
    error = largest_difference(measured.baked.logits, limits.evidence.exact.reference.logits)
    narrow = dtype not in WIDE
    return [
        Row(
            f"noise floor: hooked in {name} − in float64",
            largest_difference(measured.reference.logits, limits.evidence.exact.reference.logits),
            0.0 if narrow else None,
            floor > 0 if narrow else None,
            "must be larger" if narrow else "",
            "floor",
        ),
        unjudged(f"noise floor: hooked in {name}, other batches", rebatched, group="floor"),
        at_most(
            f"baked in {name} − hooked in float64", error, allowed if limits.demanded else None
        ),
    ]


def fixed_point_row(limits: Limits) -> tuple[Row, ...]:
    """A nulling plan leaves nothing for its edits to do, evaluated in float64."""
    edits = limits.inputs.nulled
    if limits.exactness != "nulling" or not edits:
        return ()
    value, limit = _fixed_point(limits, limits.evidence.exact.baked.streams)
    return (at_most("max |h(x) − x| in the baked model", value, limit),)


def _fixed_point(limits: Limits, streams: Mapping[Site, Tensor]) -> tuple[float, float]:
    edits = limits.inputs.nulled
    _, scale = distance(edits, limits.evidence.exact.baked.streams)
    value, _ = distance(edits, streams)
    return value, stream_tolerance(
        limits.inputs.storage, layers=limits.inputs.layout.layers, scale=scale
    )


def divergence_row(limits: Limits, comparison: Compared, effect: Compared) -> tuple[Row, ...]:
    """KL over effect: what an approximate plan is judged by, where a number is asked for."""
    whole, most = effect.metrics.mean_kl, limits.inputs.most_kl
    share = comparison.metrics.mean_kl / whole if whole else float("inf")
    return (at_most("mean KL(hooked ‖ baked) / mean KL(hooked ‖ base)", share, most),)


def metric_rows(name: str, comparison: Compared) -> tuple[Row, ...]:
    """The numbers in the serving dtype that nothing is demanded of."""
    numbers = comparison.metrics
    return (
        unjudged("same most likely token", numbers.same_top, "share of tokens"),
        unjudged("mean KL(hooked ‖ baked)", numbers.mean_kl, "nats"),
        unjudged("95 % of KL(hooked ‖ baked)", numbers.p95_kl, "nats"),
        unjudged("largest KL(hooked ‖ baked)", numbers.max_kl, "nats"),
        unjudged(f"mean |Δlogit| in {name}", numbers.mean_dlogit),
        unjudged(f"99 % of |Δlogit| in {name}", numbers.p99_dlogit),
        unjudged(f"largest |Δlog p| in {name}", numbers.max_dlogprob, "nats"),
        unjudged(f"mean |Δlog p| in {name}", numbers.mean_dlogprob, "nats"),
        unjudged("least cosine of final hidden states", numbers.cosine),
    )


def greedy_rows(limits: Limits) -> tuple[Row, ...]:
    """How far the two models write the same text, freely running in the serving dtype."""
    texts = limits.evidence.texts
    if not texts:
        return ()
    same = agreement(texts["hooked"].tokens, texts["baked"].tokens)
    return (unjudged("same greedy tokens", same, "share of tokens before the texts part"),)


def leak_rows(leaks: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    """The writer that adds most along a direction that the edits read, in the baked model."""
    if not leaks:
        return ()
    worst = max(leaks, key=lambda leak: float(leak["varying"]))
    layer = "" if worst["layer"] is None else f" of layer {worst['layer']}"
    note = f"{worst['writer']}{layer}; at most {max(leak['before'] for leak in leaks):.3g} before"
    name = "largest leak of a writer, |rᵀ·write|"
    return (unjudged(name, worst["varying"], note),)


def control_rows(limits: Limits) -> tuple[Row, ...]:
    """Every broken bake misses the limit that the artifact is held to."""
    exactness = limits.exactness
    if exactness == "approximate":
        return _stand_in_rows(limits)
    rows = []
    nulling = exactness == "nulling"
    if limits.demanded:
        value = limits.effect
        rows.append(_control(limits, "control: nothing edited", value, limits.limit, alone=True))
    elif not nulling:
        return ()
    for control in limits.evidence.controls:
        if nulling and control.kind == "tied head":
            continue  # the head reads the stream and writes nothing to it
        value, limit = control.difference, limits.limit
        if nulling:
            value, limit = _fixed_point(limits, control.streams)
        rows.append(_control(limits, f"control: {control.kind}, {control.tensor}", value, limit))
    return tuple(rows)


def _stand_in_rows(limits: Limits) -> tuple[Row, ...]:
    """What is lost of the effect's KL without each of the stand-ins, and without all of them.

    The base model loses all of it. A stand-in that corrects a little may be missed by less than the
    recipe's number: that number cannot tell it then, which is said and held against nothing.
    """
    most = limits.inputs.most_kl
    whole = mean_kl(limits.evidence.exact.reference.logits, limits.evidence.base.logits)
    if not whole:
        return ()  # the effect's own row fails
    rows = [above("control: nothing edited, KL share", 1.0, most, "control")]
    for control in limits.evidence.controls:
        lost = control.kl / whole
        row = above(f"control: {control.kind}, {control.tensor}, KL share", lost, most, "control")
        if row.passed is False:
            row = replace(row, passed=None, note="below what the limit can tell")
        rows.append(row)
    return tuple(rows)


def _control(limits: Limits, name: str, value: float, limit: float, *, alone: bool = False) -> Row:
    """Return the row of a broken bake.

    In a narrow dtype one tensor among hundreds may move the logits by less than the rounding of all
    does. That is said, and held against nothing: only the bake without any edit has to fail there.
    """
    row = above(name, value, limit, "control")
    if not row.passed and limits.inputs.storage not in WIDE and not alone:
        return replace(row, passed=None, note="below what this dtype can tell")
    return row
