"""``Report``: what a verification measured, what that answers, and which models said what."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bake.artifact.verification import FORMAT, finite
from bake.verify.questions import Answer, Verdict, answers, verdict
from bake.verify.rows import Row


@dataclass(frozen=True, slots=True)
class Headline:
    """What a reader wants to know first.

    Attributes:
        effect: mean KL(hooked ‖ base) in nats, the larger one of prompts and answers; None where
            nothing was run.
        lost: the share of it that what is stored or served loses; None where nobody measured it.
        floor: the share that rounding and runtime lose where nothing is edited.
        to: what it is lost to: the storage type, or the runtime.
    """

    effect: float | None = None
    lost: float | None = None
    floor: float | None = None
    to: str = ""

    def line(self) -> str:
        """Return it in one line."""
        if self.effect is None:
            return "nothing was run"
        if self.lost is None:
            return f"effect {self.effect:.3g} nats a token"
        said = f"effect {self.effect:.3g} nats a token, lost {100 * self.lost:.2g} % to {self.to}"
        return said + ("" if self.floor is None else f" (floor {100 * self.floor:.2g} %)")


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with what the models write after it."""

    prompt: str
    base: str
    hooked: str
    baked: str
    """Empty where the artifact is no checkpoint and no runtime served it."""


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
    headline: Headline = Headline()
    samples: tuple[Sample, ...] = ()
    """A few prompts with the texts of the models."""
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
    def answers(self) -> tuple[Answer, ...]:
        """What is said to each question."""
        return answers(self.rows)

    @property
    def verdict(self) -> Verdict:
        """The worst answer: ``passed``, ``failed`` or ``inconclusive``."""
        return verdict(self.answers)

    @property
    def passed(self) -> bool:
        """Whether every question that was asked is answered, and well."""
        return self.verdict == "passed"

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; a number that is not finite becomes null."""
        first = {
            "format": FORMAT,
            "verdict": self.verdict,
            "passed": self.passed,
            "answers": [asdict(answer) for answer in self.answers],
        }
        content: dict[str, Any] = finite({**first, **asdict(self)})
        return content
