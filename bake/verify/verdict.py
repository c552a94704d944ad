"""Rows of a report: each number beside the limit that it is judged by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bake.sites import Site
from bake.verify.artifact import Baked
from bake.verify.evidence import Evidence, Measured
from bake.verify.fixed_point import distance, nulled
from bake.verify.greedy import agreement
from bake.verify.metrics import Compared, largest_difference, mean_kl
from bake.verify.report import Row
from bake.verify.tolerance import FLOOR_FACTOR, logit_tolerance, stream_tolerance

WIDE = (torch.float64, torch.float32)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all rows of one verification share."""

    artifact: Baked
    evidence: Evidence
    storage: torch.dtype
    layers: int
    hidden: int
    effect: float
    """max |Δlogit| of hooked against base, in float64."""

    @property
    def demanded(self) -> bool:
        """Whether the plan says that baked and hooked are one function."""
        return self.artifact.exactness == "exact"

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return what rounding alone may move a logit by.

        To the general bound comes what this model makes of rounding: a token whose stream has a
        small variance before a norm amplifies it. float32 shows how much, and the other dtypes
        round by another machine epsilon.
        """
        scale = float(self.evidence.exact.hooked.logits.abs().max())
        bound = logit_tolerance(dtype, layers=self.layers, hidden=self.hidden, scale=scale)
        unit = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        return bound + FLOOR_FACTOR * unit * self.floor(torch.float32)

    def floor(self, dtype: torch.dtype) -> float:
        """Return how far the reference in one dtype lies from itself: in float64, and rebatched."""
        measured, exact = self.evidence.runs[dtype], self.evidence.exact
        found = largest_difference(measured.hooked.logits, exact.hooked.logits)
        return max(found, self.rebatched(measured))

    def rebatched(self, measured: Measured) -> float:
        """Return how far the reference lies from itself in other batches."""
        assert measured.again is not None
        return largest_difference(measured.hooked.logits, measured.again.logits)

    @property
    def limit(self) -> float:
        """What the baked checkpoint may differ by in float64, given how it is stored."""
        if self.storage in WIDE:
            return self.tolerance(self.storage)
        return FLOOR_FACTOR * self.floor(self.storage)


def bench_of(
    artifact: Baked, evidence: Evidence, storage: torch.dtype, layers: int, hidden: int
) -> Bench:
    """Return what the rows share."""
    effect = largest_difference(evidence.exact.hooked.logits, evidence.base.logits)
    return Bench(artifact, evidence, storage, layers, hidden, effect)


def effect_row(bench: Bench) -> Row:
    """The edit does something: equality proves nothing where nothing was changed."""
    smallest = bench.tolerance(torch.float64)
    return Row(
        "effect: hooked − base",
        bench.effect,
        smallest,
        bench.effect > smallest,
        "must be larger",
        "effect",
    )


def files_row(changed: Sequence[str] | None) -> tuple[Row, ...]:
    """The files are those that the export wrote."""
    if changed is None:
        return ()
    note = f"changed: {', '.join(changed[:3])}" + (" …" if len(changed) > 3 else "")
    count = float(len(changed))
    return (Row("files as exported", count, 0.0, not changed, note if changed else "", "files"),)


def exact_rows(bench: Bench) -> tuple[Row, ...]:
    """Baked against hooked, in float64 and in every other dtype, with the floors beside them."""
    exact, limit = bench.evidence.exact, bench.limit
    error = largest_difference(exact.baked.logits, exact.hooked.logits)
    share = f"{error / bench.effect:.1e} of the effect" if bench.effect else "no effect"
    passed = error <= limit if bench.demanded else None
    shown = limit if bench.demanded else None
    rows = [Row("baked − hooked, evaluated in float64", error, shown, passed, share)]
    for dtype, measured in bench.evidence.runs.items():
        if dtype != torch.float64:
            rows += _dtype_rows(bench, dtype, measured, limit)
    return tuple(rows)


def _dtype_rows(bench: Bench, dtype: torch.dtype, measured: Measured, limit: float) -> list[Row]:
    name, floor = str(dtype).removeprefix("torch."), bench.floor(dtype)
    # Rounding of the stored weights costs the wide dtypes as much as it costs float64.
    allowed = FLOOR_FACTOR * floor + (limit if dtype in WIDE else 0.0)
    error = largest_difference(measured.baked.logits, bench.evidence.exact.hooked.logits)
    narrow = dtype not in WIDE
    return [
        Row(
            f"noise floor: hooked in {name} − in float64",
            largest_difference(measured.hooked.logits, bench.evidence.exact.hooked.logits),
            0.0 if narrow else None,
            floor > 0 if narrow else None,
            "must be larger" if narrow else "",
            "floor",
        ),
        Row(
            f"noise floor: hooked in {name}, other batches",
            bench.rebatched(measured),
            None,
            None,
            "",
            "floor",
        ),
        Row(
            f"baked in {name} − hooked in float64",
            error,
            allowed if bench.demanded else None,
            error <= allowed if bench.demanded else None,
        ),
    ]


def fixed_point_row(bench: Bench) -> tuple[Row, ...]:
    """A nulling plan leaves nothing for its edits to do, evaluated in float64."""
    edits = nulled(bench.artifact.edits, bench.artifact.record["plan"].get("findings", ()))
    if bench.artifact.exactness != "nulling" or not edits:
        return ()
    value, limit = _fixed_point(bench, bench.evidence.exact.baked.streams)
    return (Row("max |h(x) − x| in the baked model", value, limit, value <= limit),)


def _fixed_point(bench: Bench, streams: Mapping[Site, Tensor]) -> tuple[float, float]:
    edits = nulled(bench.artifact.edits, bench.artifact.record["plan"].get("findings", ()))
    _, scale = distance(edits, bench.evidence.exact.baked.streams)
    value, _ = distance(edits, streams)
    return value, stream_tolerance(bench.storage, layers=bench.layers, scale=scale)


def divergence_row(
    bench: Bench, comparison: Compared, effect: Compared, most: float | None
) -> tuple[Row, ...]:
    """KL over effect: what an approximate plan is judged by, where a number is asked for."""
    whole = effect.metrics.mean_kl
    share = comparison.metrics.mean_kl / whole if whole else float("inf")
    passed = None if most is None else share <= most
    return (Row("mean KL(hooked ‖ baked) / mean KL(hooked ‖ base)", share, most, passed),)


def metric_rows(name: str, comparison: Compared) -> tuple[Row, ...]:
    """The numbers in the serving dtype that nothing is demanded of."""
    found = comparison.metrics
    row = partial(Row, limit=None, passed=None, group="metric")
    return (
        row("same most likely token", found.same_top, note="share of tokens"),
        row("mean KL(hooked ‖ baked)", found.mean_kl, note="nats"),
        row("95 % of KL(hooked ‖ baked)", found.p95_kl, note="nats"),
        row("largest KL(hooked ‖ baked)", found.max_kl, note="nats"),
        row(f"mean |Δlogit| in {name}", found.mean_dlogit),
        row(f"99 % of |Δlogit| in {name}", found.p99_dlogit),
        row(f"largest |Δlog p| in {name}", found.max_dlogprob, note="nats"),
        row(f"mean |Δlog p| in {name}", found.mean_dlogprob, note="nats"),
        row("least cosine of final hidden states", found.cosine),
    )


def greedy_rows(bench: Bench) -> tuple[Row, ...]:
    """How far the two models write the same text, freely running in the serving dtype."""
    texts = bench.evidence.texts
    if not texts:
        return ()
    found = agreement(texts["hooked"].tokens, texts["baked"].tokens)
    note = "share of tokens before the texts part"
    return (Row("same greedy tokens", found, None, None, note, "metric"),)


def leak_rows(leaks: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    """The writer that adds most along a direction that the edits read, in the baked model."""
    if not leaks:
        return ()
    worst = max(leaks, key=lambda leak: float(leak["varying"]))
    layer = "" if worst["layer"] is None else f" of layer {worst['layer']}"
    note = f"{worst['writer']}{layer}; at most {max(leak['before'] for leak in leaks):.3g} before"
    name = "largest leak of a writer, |rᵀ·write|"
    return (Row(name, worst["varying"], None, None, note, "metric"),)


def control_rows(bench: Bench, most: float | None) -> tuple[Row, ...]:
    """Every broken bake misses the limit that the artifact is held to."""
    exactness = bench.artifact.exactness
    if exactness == "approximate":
        return _stand_in_rows(bench, most)
    rows = []
    nulling = exactness == "nulling"
    if bench.demanded:
        value = bench.effect
        rows.append(_control(bench, "control: nothing edited", value, bench.limit, alone=True))
    elif not nulling:
        return ()
    for control in bench.evidence.controls:
        if nulling and control.kind == "tied head":
            continue  # the head reads the stream and writes nothing to it
        value, limit = control.difference, bench.limit
        if nulling:
            value, limit = _fixed_point(bench, control.streams)
        rows.append(_control(bench, f"control: {control.kind}, {control.tensor}", value, limit))
    return tuple(rows)


def _stand_in_rows(bench: Bench, most: float | None) -> tuple[Row, ...]:
    """What is lost of the effect's KL without each of the stand-ins, and without all of them.

    The base model loses all of it. A stand-in that corrects a little may be missed by less than the
    recipe's number: that number cannot tell it then, which is said and held against nothing.
    """
    whole = mean_kl(bench.evidence.exact.hooked.logits, bench.evidence.base.logits)
    if not whole:
        return ()  # the effect's own row fails
    rows = [
        Row(
            "control: nothing edited, KL share",
            1.0,
            most,
            None if most is None else most < 1,
            "must be larger",
            "control",
        )
    ]
    for control in bench.evidence.controls:
        lost = control.kl / whole
        seen = most is not None and lost > most
        note = "must be larger" if seen else "" if most is None else "below what the limit can tell"
        name = f"control: {control.kind}, {control.tensor}, KL share"
        rows.append(Row(name, lost, most, True if seen else None, note, "control"))
    return tuple(rows)


def _control(bench: Bench, name: str, value: float, limit: float, *, alone: bool = False) -> Row:
    """Return the row of a broken bake.

    In a narrow dtype one tensor among hundreds may move the logits by less than the rounding of all
    does. That is said, and held against nothing: only the bake without any edit has to fail there.
    """
    seen = value > limit
    if not seen and bench.storage not in WIDE and not alone:
        return Row(name, value, limit, None, "below what this dtype can tell", "control")
    return Row(name, value, limit, seen, "must be larger", "control")
