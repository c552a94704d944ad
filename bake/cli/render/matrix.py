"""What every runtime makes of the carriers of a plan, as one table, with the reasons below it."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from bake.cli.render.pieces import indented, table, word

if TYPE_CHECKING:
    from bake.artifact.schema import RuntimeVerdict
    from bake.plan import Plan

Shown = tuple[str, "RuntimeVerdict"]
"""The word of a verdict, and the verdict."""

UNREAD = "–"
"""What stands for a runtime that the files of a carrier are not for."""

LOST = "cannot hold the edit: see Carriers"


def runtimes(planned: "Plan", carriers: Sequence[str]) -> list[RenderableType]:
    """Return the verdicts of every runtime on some carriers.

    One carrier leaves room for the reasons beside the verdicts. Of several, the reasons of what is
    not exact follow, those that are the same in one line. Why a carrier cannot hold the edit is
    said once, in the table of the carriers; --json has every reason.
    """
    from bake.plan.carriers import carrier_runtimes

    verdicts = {carrier: carrier_runtimes(planned, carrier) for carrier in carriers}
    lost = {carrier for carrier in carriers if obstacle(planned, carrier) is not None}
    shown = {carrier: [_shown(v) for v in row] for carrier, row in verdicts.items()}
    if len(carriers) == 1:
        return [_one(carriers[0], shown[carriers[0]], lost=bool(lost))]
    rows = table("runtime", "target", *carriers)
    for row in zip(*shown.values(), strict=True):
        rows.add_row(row[0][1].runtime, _wanted(row[0][1]), *(word(said) for said, _ in row))
    return [rows, indented(_reasons(shown, lost))]


def obstacle(planned: "Plan", carrier: str) -> str | None:
    """Return why a carrier cannot hold the edit, or None."""
    from bake.plan.carriers import carrier_findings
    from bake.plan.types import Exactness

    findings = carrier_findings(planned, carrier)
    hard = (f.reason for f in findings if f.exactness is Exactness.IMPOSSIBLE)
    return next(hard, None)


def _shown(verdict: "RuntimeVerdict") -> Shown:
    """Return the verdict with its word.

    That a runtime refuses files of a kind which it does not read is no news: a recipe that has such
    a runtime for its target, and nothing else for it, is an error before there is a plan.
    """
    foreign = verdict.status == "refused" and not verdict.reads
    return UNREAD if foreign else verdict.status, verdict


def carriers(planned: "Plan") -> Table:
    """Return which carriers hold the plan, and what the runtimes make of each."""
    from bake.artifact import CARRIERS
    from bake.plan.carriers import carrier_findings, carrier_runtimes
    from bake.plan.types import Exactness

    rows = table("carrier", "holds the edit", "runtimes, or why not")
    first: dict[str, str] = {}
    for carrier in CARRIERS:
        found = [finding.exactness for finding in carrier_findings(planned, carrier)]
        why = obstacle(planned, carrier)
        if why is None:
            why = summary([v for v in carrier_runtimes(planned, carrier) if v.reads])
        elif first.setdefault(why, carrier) != carrier:
            why = f"as {first[why]}"
        rows.add_row(carrier, word(str(max(found, key=list(Exactness).index))), why)
    return rows


def _one(carrier: str, verdicts: Sequence[Shown], *, lost: bool) -> Table:
    rows = table("runtime", "verdict", "target", "why")
    for said, verdict in verdicts:
        why = verdict.reason
        if said == UNREAD:
            why = f"reads other files: {why}"
        elif lost and verdict.reads:
            why = f"a {carrier} {LOST}"
        rows.add_row(verdict.runtime, word(said), _wanted(verdict), why)
    return rows


def _wanted(verdict: "RuntimeVerdict") -> str:
    return "yes" if verdict.wanted else "no"


def _reasons(verdicts: Mapping[str, Sequence[Shown]], lost: Collection[str]) -> list[str]:
    places: dict[tuple[str, str], dict[str, list[str]]] = {}
    for carrier, row in verdicts.items():
        for said, verdict in row:
            if said not in ("exact", UNREAD):
                reason = LOST if carrier in lost and verdict.reads else verdict.reason
                names = places.setdefault((said, reason), {})
                names.setdefault(carrier, []).append(verdict.runtime)
    lines = [
        "; ".join(f"{carrier} in {', '.join(found)}" for carrier, found in names.items())
        + f": {said}: {reason}"
        for (said, reason), names in places.items()
    ]
    if any(said == UNREAD for row in verdicts.values() for said, _ in row):
        lines.append(f"{UNREAD}: the runtime reads other files than these")
    return lines


def summary(verdicts: Sequence["RuntimeVerdict"]) -> str:
    """Return runtimes by verdict: ``exact: transformers, vllm; not tested: sglang``."""
    names: dict[str, list[str]] = {}
    for status in ("exact", "approximate", "not tested", "refused"):
        names[status] = [verdict.runtime for verdict in verdicts if verdict.status == status]
    return "; ".join(f"{status}: {', '.join(found)}" for status, found in names.items() if found)
