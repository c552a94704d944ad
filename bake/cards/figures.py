"""The tables of a verification: each number is one of ``verify.json``, in four digits.

The lint makes the same tables again and compares them with those in the card, cell by cell.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bake.artifact.record import VERIFICATION
from bake.cards import stored
from bake.cards.facts import Facts
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


def conditions(facts: Facts) -> Table | None:
    """Return what was run on what, or None without a verification."""
    found = facts.verification
    if found is None:
        return None
    prompts = stored.mapping(found, "prompts", VERIFICATION)
    rows: list[tuple[str, Markdown]] = []
    for key, name in (("prompts", "prompts"), ("tokens", "tokens in all")):
        value = stored.whole(prompts, key, VERIFICATION)
        if value is not None:
            rows.append((name, number(value)))
    if source := stored.text(prompts, "source", VERIFICATION):
        rows.append(("source of the prompts", escape(source)))
    if digest := stored.text(prompts, "digest", VERIFICATION):
        rows.append(("digest of their token ids", code(digest)))
    if dtype := stored.text(found, "dtype", VERIFICATION):
        rows.append(("weights of the base are stored in", escape(DTYPES.get(dtype, dtype))))
    environment = stored.mapping(found, "environment", VERIFICATION)
    if environment:
        rows.append(("run with", versions(environment)))
    head = (Markdown("what was run"), Markdown(""))
    return Table(head, tuple((Markdown(name), value) for name, value in rows))


def versions(environment: Mapping[str, Any]) -> Markdown:
    """Return the versions of an environment in one line."""
    parts = [
        f"{escape(name)} {escape(value)}"
        for name, value in environment.items()
        if isinstance(value, str) and name != "system"
    ]
    return Markdown(", ".join(parts))


def distances(facts: Facts) -> Table | None:
    """Return baked against hooked beside the noise floor and the effect, or None."""
    found = facts.verification
    metrics = {} if found is None else stored.mapping(found, "metrics", VERIFICATION)
    if found is None or not metrics:
        return None
    own = DTYPES.get(stored.text(found, "dtype", VERIFICATION), "")
    names = [name for name in dict.fromkeys(("float64", own)) if name in metrics]
    columns = [stored.mapping(metrics, name, VERIFICATION) for name in (*names, "effect")]
    floor = stored.mapping(metrics, f"floor {own}", VERIFICATION)
    head = ["", *(f"baked − hooked, in {name}" for name in names), "hooked − base (the effect)"]
    rows = []
    for key, name in _METRICS:
        cells = [_cell(stored.number(column, key, VERIFICATION)) for column in columns]
        noise = _cell(stored.number(floor, key, VERIFICATION))
        if any(cell != NOT_MEASURED for cell in cells):
            rows.append((Markdown(name), noise, *cells))
    head.insert(1, f"noise floor: hooked in {own} − in float64" if own else "noise floor")
    return Table(tuple(Markdown(name) for name in head), tuple(rows))


def _cell(value: float | int | None) -> Markdown:
    return NOT_MEASURED if value is None else number(float(value))


def judged(facts: Facts) -> Table | None:
    """Return every row of the report that has a limit, controls included, or None."""
    found = facts.verification
    rows = [] if found is None else list(stored.objects(found, "rows", VERIFICATION))
    rows = [row for row in rows if stored.flag(row, "passed", VERIFICATION) is not None]
    if not rows:
        return None
    head = ("comparison", "measured", "limit", "verdict", "")
    return Table(tuple(map(Markdown, head)), tuple(_judged(row) for row in rows))


def _judged(row: Mapping[str, Any]) -> tuple[Markdown, ...]:
    limit = stored.number(row, "limit", VERIFICATION)
    return (
        escape(stored.text(row, "name", VERIFICATION)),
        _cell(stored.number(row, "value", VERIFICATION)),
        Markdown("") if limit is None else number(float(limit)),
        _VERDICTS[stored.flag(row, "passed", VERIFICATION)],
        escape(stored.text(row, "note", VERIFICATION)),
    )


def runtimes(facts: Facts) -> Table | None:
    """Return what each runtime gave that served the artifact, or None where none was asked."""
    found = facts.verification
    records = () if found is None else stored.objects(found, "runtimes", VERIFICATION)
    if not records:
        return None
    head = ("runtime", "version", "status", "largest difference of a log-probability, nats")
    more = ("limit", "texts that part", "asked for", "environment")
    return Table(tuple(map(Markdown, (*head, *more))), tuple(_runtime(r) for r in records))


def _runtime(record: Mapping[str, Any]) -> tuple[Markdown, ...]:
    name = stored.text(record, "runtime", VERIFICATION)
    numbers = stored.mapping(record, "numbers", VERIFICATION)
    largest = stored.number(numbers, f"{name}: max |Δlog p|, served − hooked", VERIFICATION)
    parted = stored.number(
        numbers, f"{name}: texts that part from the hooked model's", VERIFICATION
    )
    amounts = [
        f"{number(value)} {what}"
        for key, what in (
            ("prompts", "prompts"),
            ("tokens", "tokens"),
            ("greedy_tokens", "greedy tokens after each"),
        )
        if (value := stored.whole(record, key, VERIFICATION)) is not None
    ]
    return (
        escape(name),
        escape(stored.text(record, "version", VERIFICATION)),
        escape(stored.text(record, "status", VERIFICATION)),
        _cell(largest),
        _cell(stored.number(record, "limit", VERIFICATION)),
        _cell(parted),
        Markdown(", ".join(amounts)),
        versions(stored.mapping(record, "environment", VERIFICATION)),
    )


def behaviour(facts: Facts) -> Table | None:
    """Return perplexity and scores of base, hooked and baked model, or None."""
    found = facts.verification
    effects = {} if found is None else stored.mapping(found, "effects", VERIFICATION)
    if not effects:
        return None
    head = ("95 % confidence intervals in brackets", "base", "base with hooks", "baked")
    rows = []
    for name in effects:
        values = stored.mapping(effects, name, VERIFICATION)
        cells = (_interval(values, model) for model in ("base", "hooked", "baked"))
        rows.append((escape(name), *cells))
    return Table(tuple(map(Markdown, head)), tuple(rows))


def _interval(values: Mapping[str, Any], model: str) -> Markdown:
    found = stored.mapping(values, model, VERIFICATION)
    value, low, high = (stored.number(found, key, VERIFICATION) for key in ("value", "low", "high"))
    if value is None:
        return NOT_MEASURED
    text = str(number(float(value)))
    if low is not None and high is not None:
        text += f" ({number(float(low))} to {number(float(high))})"
    size = stored.whole(found, "count", VERIFICATION)
    return Markdown(text + ("" if size is None else f", n = {number(size)}"))


def all_tables(facts: Facts) -> tuple[Table, ...]:
    """Return every table of the verification that the card shows."""
    makers = (conditions, distances, judged, runtimes, behaviour)
    return tuple(table for make in makers if (table := make(facts)) is not None)


@dataclass(frozen=True, slots=True)
class Metric:
    """A number for the card's ``model-index``."""

    name: str
    type: str
    value: float


def metrics(facts: Facts) -> tuple[Metric, ...]:
    """Return what of the verification the metadata states."""
    return tuple(_metrics(facts))


def _metrics(facts: Facts) -> Iterable[Metric]:
    found = facts.verification
    if found is None:
        return
    own = DTYPES.get(stored.text(found, "dtype", VERIFICATION), "")
    measured = stored.mapping(found, "metrics", VERIFICATION)
    values = stored.mapping(measured, own, VERIFICATION)
    for key, name in (
        ("mean_kl", "mean KL(hooked ‖ baked), nats"),
        ("max_dlogit", "largest logit difference, hooked against baked"),
        ("same_top", "share of tokens with the same most likely next one, hooked and baked"),
    ):
        value = stored.number(values, key, VERIFICATION)
        if value is not None:
            yield Metric(name, key, float(value))
    for record in stored.objects(found, "runtimes", VERIFICATION):
        name = stored.text(record, "runtime", VERIFICATION)
        numbers = stored.mapping(record, "numbers", VERIFICATION)
        value = stored.number(numbers, f"{name}: max |Δlog p|, served − hooked", VERIFICATION)
        if value is not None:
            label = f"largest difference of a log-probability in {escape(name)}, nats"
            yield Metric(label, "max_dlogprob", float(value))
    for name, models in stored.mapping(found, "effects", VERIFICATION).items():
        if not isinstance(models, dict):
            continue
        value = stored.number(stored.mapping(models, "baked", VERIFICATION), "value", VERIFICATION)
        if value is not None:
            yield Metric(
                f"{escape(name)}, baked",
                "perplexity" if name == "perplexity" else "score",
                float(value),
            )
