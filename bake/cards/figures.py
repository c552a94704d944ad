"""The tables of a verification: each number is one of ``verify.json``, in four digits.

The lint makes the same tables again and compares them with those in the card, cell by cell.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bake.cards.report import Interval, Report, Row, Served, finite
from bake.cards.text import Markdown, code, escape, number

NOT_MEASURED = Markdown("not measured")
_VERDICTS = {True: Markdown("pass"), False: Markdown("**FAIL**"), None: Markdown("")}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_METRICS = (
    ("max_dlogit", "largest difference of a logit"),
    ("mean_dlogit", "mean difference of a logit"),
    ("p99_dlogit", "99 % of the differences are below"),
    ("max_dlogprob", "largest difference of a log-probability, nats"),
    ("mean_dlogprob", "mean difference of a log-probability, nats"),
    ("mean_kl", "mean KL divergence, nats"),
    ("p95_kl", "95 % of the KL divergences are below, nats"),
    ("max_kl", "largest KL divergence, nats"),
    ("same_top", "share of tokens with the same most likely next one"),
    ("cosine", "least cosine of final hidden states"),
)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a card; every cell is Markdown, the first of a row is its name."""

    head: tuple[Markdown, ...]
    rows: tuple[tuple[Markdown, ...], ...]

    @property
    def markdown(self) -> Markdown:
        """The table as a card shows it."""
        rows = (self.head, (Markdown("---"),) * len(self.head), *self.rows)
        return Markdown("\n".join("| " + " | ".join(row) + " |" for row in rows))


def tables(report: Report | None) -> dict[str, Table | None]:
    """Return every table of a verification by its name in the templates, or None for what is not.

    Args:
        report: None without a verification.
    """
    makers = (conditions, distances, judged, runtimes, behaviour)
    return {make.__name__: None if report is None else make(report) for make in makers}


def _table(head: Iterable[str], rows: Iterable[tuple[Markdown, ...]]) -> Table | None:
    found = tuple(rows)
    return Table(tuple(map(Markdown, head)), found) if found else None


def conditions(report: Report) -> Table:
    """Return what was run on what."""
    prompts, dtype = report.prompts, report.dtype
    rows = [
        ("prompts", prompts.prompts is not None and number(prompts.prompts)),
        ("tokens in all", prompts.tokens is not None and number(prompts.tokens)),
        ("source of the prompts", prompts.source and escape(prompts.source)),
        ("digest of their token ids", prompts.digest and code(prompts.digest)),
        ("weights of the base are stored in", dtype and escape(DTYPES.get(dtype, dtype))),
        ("run with", report.environment and versions(report.environment)),
    ]
    shown = tuple((Markdown(name), Markdown(value)) for name, value in rows if value)
    return Table((Markdown("what was run"), Markdown("")), shown)


def versions(environment: Mapping[str, Any]) -> Markdown:
    """Return the versions of an environment in one line."""
    parts = [
        f"{escape(name)} {escape(value)}"
        for name, value in environment.items()
        if isinstance(value, str) and name != "system"
    ]
    return Markdown(", ".join(parts))


def distances(report: Report) -> Table | None:
    """Return baked against hooked beside the noise floor and the effect, or None."""
    metrics, own = report.metrics, DTYPES.get(report.dtype, "")
    if not metrics:
        return None
    names = [name for name in dict.fromkeys(("float64", own)) if name in metrics]
    columns = [metrics.get(name, {}) for name in (*names, "effect")]
    floor = metrics.get(f"floor {own}", {})
    rows = (
        (Markdown(name), _cell(floor.get(key)), *(_cell(column.get(key)) for column in columns))
        for key, name in _METRICS
        if any(finite(column.get(key)) is not None for column in columns)
    )
    noise = f"noise floor: hooked in {own} − in float64" if own else "noise floor"
    baked = (f"baked − hooked, in {name}" for name in names)
    return Table(
        tuple(map(Markdown, ("", noise, *baked, "hooked − base (the effect)"))), tuple(rows)
    )


def _cell(value: float | None) -> Markdown:
    found = finite(value)
    return NOT_MEASURED if found is None else number(float(found))


def judged(report: Report) -> Table | None:
    """Return every row of the report that has a limit, controls included, or None."""
    head = ("comparison", "measured", "limit", "verdict", "")
    return _table(head, (_judged(row) for row in report.rows if row.passed is not None))


def _judged(row: Row) -> tuple[Markdown, ...]:
    limit = finite(row.limit)
    return (
        escape(row.name),
        _cell(row.value),
        Markdown("") if limit is None else number(float(limit)),
        _VERDICTS[row.passed],
        escape(row.note),
    )


def runtimes(report: Report) -> Table | None:
    """Return what each runtime gave that served the artifact, or None where none was asked."""
    head = ("runtime", "version", "status", "largest difference of a log-probability, nats")
    more = ("limit", "texts that part", "asked for", "environment")
    return _table((*head, *more), map(_runtime, report.runtimes))


def _runtime(served: Served) -> tuple[Markdown, ...]:
    asked = (
        (served.prompts, "prompts"),
        (served.tokens, "tokens"),
        (served.greedy_tokens, "greedy tokens after each"),
    )
    amounts = [f"{number(value)} {what}" for value, what in asked if value is not None]
    return (
        escape(served.runtime),
        escape(served.version),
        escape(served.status),
        _cell(served.largest),
        _cell(served.limit),
        _cell(served.parted),
        Markdown(", ".join(amounts)),
        versions(served.environment),
    )


def behaviour(report: Report) -> Table | None:
    """Return perplexity and scores of base, hooked and baked model, or None."""
    head = ("95 % confidence intervals in brackets", "base", "base with hooks", "baked")
    models = ("base", "hooked", "baked")
    return _table(
        head,
        (
            (escape(name), *(_interval(values.get(model, Interval())) for model in models))
            for name, values in report.effects.items()
        ),
    )


def _interval(found: Interval) -> Markdown:
    value, low, high = finite(found.value), finite(found.low), finite(found.high)
    if value is None:
        return NOT_MEASURED
    text = str(number(float(value)))
    if low is not None and high is not None:
        text += f" ({number(float(low))} to {number(float(high))})"
    return Markdown(text + ("" if found.count is None else f", n = {number(found.count)}"))


@dataclass(frozen=True, slots=True)
class Metric:
    """A number for the card's ``model-index``."""

    name: str
    type: str
    value: float


def metrics(report: Report | None) -> tuple[Metric, ...]:
    """Return what of the verification the metadata states."""
    return () if report is None else tuple(_metrics(report))


def _metrics(report: Report) -> Iterable[Metric]:
    values = report.metrics.get(DTYPES.get(report.dtype, ""), {})
    for key, name in (
        ("mean_kl", "mean KL(hooked ‖ baked), nats"),
        ("max_dlogit", "largest logit difference, hooked against baked"),
        ("same_top", "share of tokens with the same most likely next one, hooked and baked"),
    ):
        if (value := finite(values.get(key))) is not None:
            yield Metric(name, key, float(value))
    for served in report.runtimes:
        if (value := served.largest) is not None:
            label = f"largest difference of a log-probability in {escape(served.runtime)}, nats"
            yield Metric(label, "max_dlogprob", float(value))
    for name, models in report.effects.items():
        if (value := finite(models.get("baked", Interval()).value)) is not None:
            kind = "perplexity" if name == "perplexity" else "score"
            yield Metric(f"{escape(name)}, baked", kind, float(value))
