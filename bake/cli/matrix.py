"""What every runtime makes of the carriers of a plan, as one table, with the reasons below it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from bake.cli.render import indented, table, word

if TYPE_CHECKING:
    from bake.plan import Plan, RuntimeVerdict

Verdicts = Mapping[str, Sequence["RuntimeVerdict"]]


def runtimes(made: "Plan", carriers: Sequence[str]) -> list[RenderableType]:
    """Return the verdicts of every runtime on some carriers.

    One carrier leaves room for the reasons beside the verdicts. Of several, the reasons of what is
    not exact follow, those that are the same in one line.
    """
    from bake.plan.carriers import carrier_runtimes

    verdicts = {carrier: carrier_runtimes(made, carrier) for carrier in carriers}
    if len(carriers) == 1:
        return [_one(verdicts[carriers[0]])]
    rows = table("runtime", "target", *carriers)
    for row in zip(*verdicts.values(), strict=True):
        rows.add_row(row[0].runtime, _wanted(row[0]), *(word(v.status) for v in row))
    return [rows, indented(_reasons(verdicts))]


def carriers(made: "Plan") -> Table:
    """Return which carriers hold the plan, and what the runtimes make of each."""
    from bake.families import CARRIERS
    from bake.plan.carriers import carrier_findings, carrier_runtimes
    from bake.plan.types import Exactness

    rows = table("carrier", "holds the edit", "runtimes, or why not")
    for carrier in CARRIERS:
        findings = carrier_findings(made, carrier)
        worst = max((f.exactness for f in findings), key=list(Exactness).index)
        if worst is Exactness.IMPOSSIBLE:
            why = next(f.reason for f in findings if f.exactness is worst)
        else:
            why = _summary([v for v in carrier_runtimes(made, carrier) if v.reads])
        rows.add_row(carrier, word(str(worst)), why)
    return rows


def _one(verdicts: Sequence["RuntimeVerdict"]) -> Table:
    rows = table("runtime", "verdict", "target", "why")
    for verdict in verdicts:
        rows.add_row(verdict.runtime, word(verdict.status), _wanted(verdict), verdict.reason)
    return rows


def _wanted(verdict: "RuntimeVerdict") -> str:
    return "yes" if verdict.wanted else "no"


def _reasons(verdicts: Verdicts) -> list[str]:
    places: dict[tuple[str, str], dict[str, list[str]]] = {}
    for carrier, row in verdicts.items():
        for verdict in row:
            if verdict.status != "exact":
                said = places.setdefault((verdict.status, verdict.reason), {})
                said.setdefault(carrier, []).append(verdict.runtime)
    return [
        "; ".join(f"{carrier} in {', '.join(names)}" for carrier, names in said.items())
        + f": {status}: {reason}"
        for (status, reason), said in places.items()
    ]


def _summary(verdicts: Sequence["RuntimeVerdict"]) -> str:
    """Return runtimes by verdict: ``exact: transformers, vllm; not tested: sglang``."""
    names: dict[str, list[str]] = {}
    for status in ("exact", "approximate", "not tested", "refused"):
        names[status] = [verdict.runtime for verdict in verdicts if verdict.status == status]
    return "; ".join(f"{status}: {', '.join(found)}" for status, found in names.items() if found)
