"""A published verification beside one that was made here: the same rows, the same verdicts.

A verdict is a limit that holds or not, so it has to be the same everywhere. A number may differ by
the rounding of another processor; what the edit does (its effect) may not differ by more than that.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bake.artifact.verification import FORMAT, VERIFICATION, parse_report
from bake.artifact.verification import Report as Published
from bake.artifact.verification import Row as PublishedRow
from bake.errors import InputError
from bake.verify.markdown import table_lines
from bake.verify.report import Report
from bake.verify.rows import GROUPS, Row
from bake.verify.runtimes.registry import RUNTIMES


@dataclass(frozen=True, slots=True)
class Pair:
    """One comparison as it was published and as it was measured here; None where it was not."""

    name: str
    group: str
    published: Row | None
    here: Row | None
    problem: str | None = None
    """Why the two do not agree; None where they do, or where nothing is demanded."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a published verification was reproduced.

    Attributes:
        pairs: every row of either.
        problems: why it was not; none where it was.
        notes: what a reader of the numbers should know.
        same_prompts: whether both were run on the same tokens, so that numbers can be compared.
        published: versions that the published one was run with.
        here: those of this one.
    """

    pairs: tuple[Pair, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    same_prompts: bool
    published: Mapping[str, str]
    here: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "reproduced": not self.problems,
            "same_prompts": self.same_prompts,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "environment": {"published": dict(self.published), "here": dict(self.here)},
            "rows": [
                {
                    "name": pair.name,
                    "published": _plain(pair.published),
                    "here": _plain(pair.here),
                    "problem": pair.problem,
                }
                for pair in self.pairs
            ],
        }


def _plain(row: Row | None) -> dict[str, Any] | None:
    if row is None:
        return None
    value = row.value if math.isfinite(row.value) else None
    return {"value": value, "limit": row.limit, "passed": row.passed}


def agreement(content: Mapping[str, Any], report: Report) -> Agreement:
    """Return how a published verification and one that was made here agree.

    Args:
        content: the published ``verify.json``, parsed; nobody vouches for it.
        report: measured here, on the same artifact.

    Raises:
        InputError: the published one is malformed.
    """
    published = _published(content)
    there, prompts = {row.name: _row(row) for row in published.rows}, published.prompts
    same_prompts = prompts.digest == report.prompts.get("digest")
    # An earlier bake compared other things: which rows there are says nothing then.
    comparable = same_prompts and published.format == FORMAT
    pairs = tuple(
        _pair(there.get(name), row, comparable)
        for name, row in _both({row.name: row for row in report.rows}, there)
    )
    problems = [f"{pair.name}: {pair.problem}" for pair in pairs if pair.problem is not None]
    if published.plan_digest != report.plan_digest:
        problems.insert(0, f"the published {VERIFICATION} is of another plan")
    if not published.passed:
        problems.insert(0, "the published verification did not pass")
    notes = []
    if published.format < FORMAT:
        notes.append("published by an earlier bake, which compared other things")
    if not same_prompts:
        notes.append(
            f"published on other prompts ({prompts.source or 'not named'}, "
            f"{prompts.tokens or 'an unknown number of'} tokens): the numbers are of other "
            "tokens, name the same ones with --prompts or --tokens"
        )
    unasked = [p.name for p in pairs if p.published and not p.here and _elsewhere(p.published)]
    if unasked:
        notes.append(f"not measured here (--runtime): {', '.join(unasked[:4])}")
    found = {name: str(version) for name, version in published.environment.items()}
    return Agreement(pairs, tuple(problems), tuple(notes), same_prompts, found, report.environment)


def _both(here: Mapping[str, Row], there: Mapping[str, Row]) -> list[tuple[str, Row | None]]:
    """Return every name once, those that were measured here first, with what was measured."""
    return [*here.items(), *((name, None) for name in there if name not in here)]


def _pair(published: Row | None, here: Row | None, same_prompts: bool) -> Pair:
    known = here or published
    assert known is not None
    problem = None
    if published is not None and here is not None:
        problem = _difference(published, here, same_prompts)
    elif same_prompts and known.passed is not None and not _elsewhere(known):
        # Which controls there are, and which rows, follows from plan and prompts.
        problem = "published, and not measured here" if here is None else "not published"
    return Pair(known.name, known.group, published, here, problem)


def _elsewhere(row: Row) -> bool:
    """Whether a row is only there where somebody asked for it: of a runtime, or a side effect."""
    named = row.name.startswith(tuple(f"{name}: " for name in RUNTIMES))
    return named or row.group in ("runtime", "side", "gate")


def _difference(published: Row, here: Row, same_prompts: bool) -> str | None:
    if None not in (published.passed, here.passed) and published.passed != here.passed:
        return f"published as {_with_verdict(published)}, measured here as {_with_verdict(here)}"
    if here.group != "effect" or not same_prompts:
        return None
    # Both are the same difference of float64 runs: its rounding is what the limits are.
    allowed = (here.limit or 0.0) * 2
    if abs(published.value - here.value) <= allowed:
        return None
    return f"published as {published.value:.6g}, measured here as {here.value:.6g}"


def _with_verdict(row: Row) -> str:
    return f"{row.value:.3g} ({'passed' if row.passed else 'failed'})"


def _published(content: Mapping[str, Any]) -> Published:
    """Return a published verification, of which everything that is shown can be.

    Raises:
        InputError: it is malformed.
    """
    found = parse_report(content)
    if not found.rows:
        raise InputError("holds no rows", where=VERIFICATION)
    names = [row.name for row in found.rows]
    if len(set(names)) < len(names):
        raise InputError("names a row twice", where=VERIFICATION)
    versions = (f"{name}{version}" for name, version in found.environment.items())
    for text in (*names, *versions, found.prompts.source or ""):
        if not text.isprintable():
            raise InputError(f"{text!r:.80} cannot be shown", where=VERIFICATION)
    return found


def _row(row: PublishedRow) -> Row:
    value = math.nan if row.value is None else row.value
    group = row.group if row.group in GROUPS else "metric"
    return Row(row.name, value, row.limit, row.passed, group=group)


def markdown(found: Agreement, source: str) -> str:
    """Return the two side by side, for whoever reads the report.

    Args:
        found: how they agree.
        source: the artifact, with its commit.
    """
    lines = [f"# Verification of {source}, published and measured here", ""]
    if found.problems:
        lines += ["**Not reproduced:**", "", *(f"- {text}" for text in found.problems), ""]
    else:
        lines += [f"{outcome(found)}.", ""]
    rows = (
        (
            pair.name,
            shown(pair.published),
            shown(pair.here),
            "" if pair.here is None or pair.here.limit is None else f"{pair.here.limit:.2e}",
            pair.problem or "",
        )
        for pair in found.pairs
    )
    lines += table_lines(("comparison", "published", "measured here", "limit here", ""), rows)
    if found.notes:
        lines += ["", *(f"- {text}" for text in found.notes)]
    names = dict.fromkeys((*found.published, *found.here))
    versions = ((n, found.published.get(n, ""), found.here.get(n, "")) for n in names)
    lines += ["", *table_lines(("version", "published", "here"), versions)]
    return "\n".join(lines) + "\n"


def outcome(found: Agreement) -> str:
    """Return in a few words how far the two agree."""
    if found.problems:
        return "NOT reproduced"
    if found.same_prompts:
        return "Reproduced: the same rows with the same verdicts"
    return "The same verdicts, on other prompts"


def shown(row: Row | None) -> str:
    """Return a number with its verdict in a few characters."""
    if row is None:
        return "–"
    verdict = {True: " pass", False: " FAIL", None: ""}[row.passed]
    return f"{row.value:.4g}{verdict}"
