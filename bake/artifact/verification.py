"""``Report``: what is read of ``verify.json``, as frozen values, by its one reader.

Nobody vouches for it. Keys that nobody reads are not looked at. A number that is null or not finite
is one that nobody measured.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from bake.artifact.record import read_json
from bake.artifact.schema import Count, Record
from bake.errors import InputError

T = TypeVar("T")

VERIFICATION = "verify.json"
FORMAT = 2
"""Of ``verify.json``: since 2 it answers three questions."""

HELD, MISSED, NOT_SHOWN, NOT_MEASURED = "held", "missed", "not shown", "not measured"
"""What comes of a limit of the gate: a whole interval within it, a whole one beyond it, one that
holds it, or none."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Row(msgspec.Struct, frozen=True):
    """One line of the report."""

    name: str = ""
    value: float | None = None
    limit: float | None = None
    passed: bool | None = None
    """None for a number that nothing is demanded of."""
    note: str = ""
    group: str = "metric"


class Prompts(msgspec.Struct, frozen=True):
    """The texts that everything was measured on."""

    prompts: Count | None = None
    tokens: Count | None = None
    source: str | None = None
    form: str | None = None
    """What made tokens of the texts: the chat template, nothing but the tokenizer, or both."""
    digest: str | None = None


class Interval(msgspec.Struct, frozen=True):
    """A score with its 95 % confidence interval."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    count: Count | None = None


class Served(msgspec.Struct, frozen=True):
    """What one runtime gave that served the files."""

    runtime: str = ""
    version: str = ""
    status: str = ""
    numbers: dict[str, float | None] = {}
    limit: float | None = None
    prompts: Count | None = None
    tokens: Count | None = None
    greedy_tokens: Count | None = None
    environment: dict[str, Any] = {}

    lost: float | None = None
    """The share of the edit's KL that is lost when it serves."""
    floor: float | None = None
    """The share that storage and runtime lose where nothing is edited."""

    @property
    def parted(self) -> float | None:
        """How many texts part from the hooked model's."""
        return self.numbers.get(f"{self.runtime}: texts that part from the hooked model's")


class GateCheck(msgspec.Struct, frozen=True):
    """One limit of the gate, with what was measured."""

    key: str = ""
    name: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    count: Count | None = None
    bound: float | None = None
    side: str = ""
    """``at most`` or ``at least``."""
    verdict: str = ""


class MeasuredGate(msgspec.Struct, frozen=True):
    """What came of the recipe's limits on side effects."""

    verdict: str = ""
    reason: str = ""
    checks: tuple[GateCheck, ...] = ()


class Text(msgspec.Struct, frozen=True):
    """What perplexity was measured on, or why there is none."""

    source: str = ""
    language: str | None = None
    passages: Count | None = None
    tokens: Count | None = None
    reason: str = ""


class Answer(msgspec.Struct, frozen=True):
    """What is said to one of the questions."""

    key: str = ""
    text: str = ""
    verdict: str = ""
    reason: str = ""


class Headline(msgspec.Struct, frozen=True):
    """Effect, and the share of it that is lost to the storage type or in a runtime."""

    effect: float | None = None
    lost: float | None = None
    floor: float | None = None
    to: str = ""


class Sample(msgspec.Struct, frozen=True):
    """A prompt with what the models write after it."""

    prompt: str = ""
    base: str = ""
    hooked: str = ""
    baked: str = ""


class Report(msgspec.Struct, frozen=True):
    """A verification."""

    format: int = 1
    verdict: str = ""
    answers: tuple[Answer, ...] = ()
    headline: Headline = Headline()
    samples: tuple[Sample, ...] = ()
    passed: Any = None
    """True where nothing failed; whatever else a file may say there is no pass."""
    plan_digest: str | None = None
    dtype: str = ""
    """Of the base's weights, as safetensors spells it."""
    prompts: Prompts = Prompts()
    environment: dict[str, Any] = {}
    metrics: dict[str, dict[str, float | None]] = {}
    """By what was compared, then by the name of the distance."""
    rows: tuple[Row, ...] = ()
    runtimes: tuple[Served, ...] = ()
    effects: dict[str, dict[str, Interval]] = {}
    """By score, then by model: base, hooked and baked."""
    text: Text = Text()
    gate: MeasuredGate = MeasuredGate()

    @property
    def stored(self) -> str:
        """The type of the base's weights as PyTorch and ``metrics`` name it, or empty."""
        return _DTYPES.get(self.dtype, "")

    @property
    def compared(self) -> dict[str, dict[str, float | None]]:
        """The distances of baked from hooked by the type they ran in; those of the effect last."""
        names = [name for name in dict.fromkeys(("float64", self.stored)) if name in self.metrics]
        return {name: self.metrics.get(name, {}) for name in (*names, "effect")}

    def measured(self, distance: str) -> bool:
        """Tell whether a distance was measured between any two models."""
        return any(column.get(distance) is not None for column in self.compared.values())


def finite(value: Any) -> Any:
    """Return JSON values with None in place of every number that is not finite."""
    if isinstance(value, float):  # first, since nearly all are
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    return value


def typed(content: Mapping[str, Any], kind: type[T], where: str) -> T:
    """Return JSON values as what they are meant to be.

    Raises:
        InputError: they are something else.
    """
    try:
        return msgspec.convert(content, kind)
    except (msgspec.ValidationError, OverflowError) as error:
        raise InputError(f"is malformed: {error}", where=where) from error


def read_report(folder: Path, record: Record) -> Report | None:
    """Return the verification of an artifact; one of another plan says nothing of this artifact.

    Raises:
        InputError: it is there and malformed.
    """
    if not (folder / VERIFICATION).is_file():
        return None
    content = read_json(folder, VERIFICATION)
    if content.get("plan_digest") != record.plan.digest:
        return None
    return parse_report(content)


def parse_report(content: Mapping[str, Any]) -> Report:
    """Return the verification that JSON values describe.

    Raises:
        InputError: they are malformed.
    """
    return typed(finite(content), Report, VERIFICATION)


def ungated(folder: Path, record: Record) -> str | None:
    """Return why an artifact does not count as having held its recipe's gate; None when it does.

    One whose recipe has no gate has nothing to hold.

    Raises:
        InputError: ``verify.json`` is there and malformed.
    """
    gate = None if record.verify is None else record.verify.gate
    if gate is None:
        return None
    report = read_report(folder, record)
    if report is None:
        return f"there is no {VERIFICATION} of this plan"
    verdicts = {check.key: check.verdict for check in report.gate.checks}
    for key in gate.keys:
        if verdicts.get(key) != HELD:
            return f"the limit on {key} is {verdicts.get(key) or NOT_MEASURED}"
    return None


def unverified(folder: Path, record: Record) -> str | None:
    """Return why an artifact does not count as verified, or None when it does.

    Raises:
        InputError: ``verify.json`` is there and malformed.
    """
    if not (folder / VERIFICATION).is_file():
        return f"there is no {VERIFICATION}"
    report = read_report(folder, record)
    if report is None:
        return f"{VERIFICATION} is of another plan"
    failed = [row.name for row in report.rows if row.passed is False]
    if report.verdict == "inconclusive":
        return "the verification is inconclusive: nothing in it could have failed"
    if report.passed is not True or failed:
        return "the verification failed" + (f": {failed[0]}" if failed else "")
    if not any(row.passed for row in report.rows):
        return f"{VERIFICATION} holds no comparison that passed"
    return None
