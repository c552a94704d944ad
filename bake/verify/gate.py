"""The gate: limits on what an edit costs elsewhere, each with the interval that decides it.

A limit is held where the whole 95 % interval lies within it: the unfavourable end decides. To pass
what the sample does not speak against would let the smallest sample pass everything, and a gate is
there to show that harm is small. So there are three outcomes: *held*, *missed* where the whole
interval lies beyond the limit, and *not shown* where it holds the limit, which a larger sample
settles. The gate is held where every limit is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bake.artifact.schema import Bounds
from bake.artifact.verification import HELD, MISSED, NOT_MEASURED, NOT_SHOWN
from bake.errors import VerificationFailed
from bake.verify.interval import Interval, difference, mean_or_share

Side = Literal["at most", "at least"]
FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One limit, and what was measured."""

    key: str
    """As ``Gate.keys`` of the record calls it."""
    name: str
    measured: Interval
    bound: float
    side: Side

    @property
    def verdict(self) -> str:
        """What comes of it."""
        low, high = self.measured.low, self.measured.high
        within, beyond = (high <= self.bound, low > self.bound)
        if self.side == "at least":
            within, beyond = (low >= self.bound, high < self.bound)
        return HELD if within else MISSED if beyond else NOT_SHOWN

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        content = asdict(self)
        return {**content.pop("measured"), **content, "verdict": self.verdict}


def bounded(
    key: str,
    name: str,
    bounds: Bounds,
    values: Mapping[str, Sequence[float]],
    *,
    unit: bool,
) -> list[Check]:
    """Return a check for every limit on one mean.

    Args:
        key: of the score or task.
        name: the same in words.
        bounds: its limits.
        values: of each text, by model: ``base`` and ``baked``.
        unit: whether no value lies outside of 0 and 1.
    """
    base, baked = values["base"], values["baked"]
    alone = mean_or_share(baked, unit=unit)
    measured: dict[str, tuple[str, Interval, Side]] = {
        "least": (f"{name}, baked", alone, "at least"),
        "most": (f"{name}, baked", alone, "at most"),
        "drop": (f"{name}, base − baked", difference(base, baked, unit=unit), "at most"),
        "rise": (f"{name}, baked − base", difference(baked, base, unit=unit), "at most"),
    }
    return [
        Check(f"{key} {bound}", words, interval, limit, side)
        for bound, limit in bounds.to_json().items()
        for words, interval, side in [measured[bound]]
    ]


def gate_json(checks: Sequence[Check]) -> dict[str, Any]:
    """Return what a report says of a gate that was measured."""
    held = all(check.verdict == HELD for check in checks)
    return {"verdict": HELD if held else FAILED, "checks": [check.to_json() for check in checks]}


def not_measured(reason: str) -> dict[str, Any]:
    """Return what a report says of a gate that was not measured."""
    return {"verdict": NOT_MEASURED, "reason": reason}


def gate_failure(gate: Mapping[str, Any], artifact: str) -> VerificationFailed | None:
    """Return what it means that a gate was measured and not held, or None."""
    if gate.get("verdict") != FAILED:
        return None
    failed = [check for check in gate["checks"] if check["verdict"] != HELD]
    worst = next((check for check in failed if check["verdict"] == MISSED), failed[0])
    missed = worst["verdict"] == MISSED
    return VerificationFailed(
        f"the gate is not held: {worst['name']}: {said(worst)}, {worst['verdict']}",
        where=artifact,
        why="the edit costs more elsewhere than its recipe allows"
        if missed
        else "the interval holds the limit, so that this sample cannot show that it is kept",
        fix="weaken the edit, or name fewer sites"
        if missed
        else "name a longer text or more prompts in the recipe, and export again",
    )


def said(check: Mapping[str, Any]) -> str:
    """Return what was measured beside its limit, in a few words."""
    return "{value:.4g} ({low:.4g} to {high:.4g}), {side} {bound:g}".format(**check)
