"""``Report``: what a verification measured, against which limits."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bake.artifact.verification import finite

SERVED_EFFECT = "effect: hooked − base, max |Δlog p|"
"""The row beside those of the runtimes: of the tokens that they are asked for."""
GROUPS = ("effect", "exact", "floor", "metric", "control", "files", "runtime", "side")


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number; ``passed`` is None where nothing is demanded of it."""

    name: str
    value: float
    limit: float | None
    passed: bool | None
    note: str = ""
    group: str = "exact"
    """What the number is about, one of ``GROUPS``."""


def at_most(
    name: str, value: float, limit: float | None, note: str = "", group: str = "exact"
) -> Row:
    """Return a number that may not exceed its limit; held against nothing where there is none."""
    return Row(name, value, limit, None if limit is None else value <= limit, note, group)


def above(name: str, value: float, limit: float | None, group: str) -> Row:
    """Return a number that has to exceed its limit; held against nothing where there is none."""
    if limit is None:
        return Row(name, value, None, None, "", group)
    return Row(name, value, limit, value > limit, "must be larger", group)


def unjudged(name: str, value: float, note: str = "", group: str = "metric") -> Row:
    """Return a number that nothing is demanded of."""
    return Row(name, value, None, None, note, group)


@dataclass(frozen=True, slots=True)
class Report:
    """A verification of one artifact."""

    artifact: str
    base: str
    plan_digest: str
    exactness: str
    dtype: str
    rows: tuple[Row, ...]
    environment: Mapping[str, str]
    prompts: Mapping[str, Any] = field(default_factory=dict)
    """Where the prompts came from, how many there are, and their digest."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """All numbers of each comparison: by dtype, and ``effect``."""
    layers: Mapping[str, Any] = field(default_factory=dict)
    """Relative difference of the residual stream at each point: error, effect, floor."""
    leaks: tuple[Mapping[str, Any], ...] = ()
    """|Rᵀ·write| per concept, writer and layer, before and after, and of that what is constant."""
    kl: tuple[float, ...] = ()
    """KL(hooked ‖ baked) after every token, in the serving dtype."""
    points: tuple[tuple[float, float], ...] = ()
    """A sample of logits, hooked and baked, in the serving dtype."""
    kl_effect: tuple[float, ...] = ()
    """KL(hooked ‖ base) after every token, in float64."""
    points_effect: tuple[tuple[float, float], ...] = ()
    """The same logits, hooked and base."""
    runtimes: tuple[Mapping[str, Any], ...] = ()
    """Each runtime that was asked for: ``passed``, ``failed`` or ``measured``."""
    effects: Mapping[str, Any] = field(default_factory=dict)
    """Side effects: perplexity and scores of base, hooked and baked."""
    text: Mapping[str, Any] = field(default_factory=dict)
    """What perplexity was measured on, or the reason why there is none."""
    gate: Mapping[str, Any] = field(default_factory=dict)
    """What came of the recipe's limits on side effects; empty where it has none."""
    timing: Mapping[str, float] = field(default_factory=dict)
    """Seconds in all, and of these in the models' forward passes."""

    @property
    def passed(self) -> bool:
        """Whether something was demanded, and every demand was met."""
        verdicts = [row.passed for row in self.rows if row.passed is not None]
        return bool(verdicts) and all(verdicts)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; a number that is not finite becomes null."""
        content: dict[str, Any] = finite({**asdict(self), "passed": self.passed})
        return content
