"""A plan: the model, what each edit comes to, what changes, and who can read the result."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bake.artifact.carrier import CARRIERS
from bake.cli.render import matrix
from bake.cli.render.models import head
from bake.cli.render.pieces import Fact, facts, listed, section, site_list, size, table, word
from bake.cli.render.tensors import NUMBER, Named, changed_tensors, merged, tensor_table
from bake.plan.carriers import OVER_HEAD, beside_head, carrier_runtimes
from bake.plan.types import Exactness

if TYPE_CHECKING:
    from bake.checkpoints import Checkpoint
    from bake.jobs.recorded import Replanned
    from bake.jobs.request import Request
    from bake.plan import Finding, Plan
    from bake.sites import Site


def brief(request: "Request") -> list[Fact]:
    """Return the plan of a request in a few facts: the verdict first, and what it means.

    What is not exact has its reason beside it, and every note is there: what an edit is not is
    never said to those alone who ask.
    """
    planned, checkpoint, chosen = request.plan, request.model.checkpoint, request.recipe.export.to
    changed = _counts(changed_tensors(planned, checkpoint))
    changed += [f"{change.key} in config.json" for change in planned.config]
    return [
        *_verdicts(planned),
        ("changes", f"{', '.join(changed) or 'no tensor'}, of {_place(checkpoint)}"),
        *_loads(planned, chosen),
        *(("note", note) for note in (*planned.notes, *_beside(planned, chosen))),
    ]


def _place(checkpoint: "Checkpoint") -> str:
    """Return where a model is, from here if it is below; without the way that a recipe takes."""
    if checkpoint.revision is not None:
        return checkpoint.source
    path, here = checkpoint.path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _verdicts(planned: "Plan") -> Iterator[Fact]:
    """Yield the edits by how exact they are, the worst first; with the reason where it is not."""
    order = list(Exactness)
    for exactness in sorted({f.exactness for f in planned.findings}, key=order.index, reverse=True):
        rows = [f for f in planned.findings if f.exactness is exactness]
        sites: dict[str, list[Site]] = {}
        for finding in rows:
            sites.setdefault(f"{finding.kind} {finding.concept}", []).extend(finding.sites)
        edits = "; ".join(
            f"{edit} at {site_list(at, planned.layout)}" for edit, at in sites.items()
        )
        reasons = merged([f.reason for f in rows[:1]]) if exactness is not Exactness.EXACT else None
        yield word(str(exactness)), edits + (f": {reasons}" if reasons else "")


def _loads(planned: "Plan", chosen: Sequence[str]) -> Iterator[Fact]:
    """Yield what the runtimes make of every carrier that is asked for; and the others there are."""
    for carrier in chosen:
        verdicts = [one for one in carrier_runtimes(planned, carrier) if one.reads]
        of = f" (as {carrier})" if len(chosen) > 1 else ""
        yield "loads in", matrix.summary(verdicts) + of
    others = (name for name in CARRIERS if name not in chosen)
    if able := [name for name in others if matrix.obstacle(planned, name) is None]:
        yield "or --to", ", ".join(able)


def _beside(planned: "Plan", carriers: Iterable[str]) -> list[str]:
    return [f"{name} goes {OVER_HEAD}" for name in carriers if beside_head(planned, name)]


def plan(request: "Request", *, verbose: bool) -> list[RenderableType]:
    """Return the plan of a request: model, findings, changes, runtimes, notes and digest.

    Args:
        request: the plan, where it comes from, and what it is to be written as.
        verbose: a row for every tensor.
    """
    planned, checkpoint, chosen = request.plan, request.model.checkpoint, request.recipe.export.to
    parts: list[RenderableType] = [facts(_header(request)), section("Findings", _findings(planned))]
    rows = changed_tensors(planned, checkpoint)
    if rows:
        parts.append(section(_changes_title(rows), tensor_table(rows, verbose=verbose)))
    if planned.config:
        parts.append(section("config.json", _config(planned)))
    verdicts = Group(*matrix.runtimes(planned, chosen))
    left_out = checkpoint.left_out if verbose else ()
    return [
        *parts,
        section(f"Runtimes: {', '.join(chosen)}", verdicts),
        section("Carriers", matrix.carriers(planned)),
        *listed("Notes", (*planned.notes, *_beside(planned, CARRIERS))),
        *listed("Files of the base that do not travel", left_out),
        Text(),
        facts([("plan", word(str(planned.exactness))), ("digest", planned.digest)]),
    ]


def again(result: "Replanned") -> list[RenderableType]:
    """Return whether the plan of an artifact is that of its record."""
    artifact = f"{result.source.name} ({result.artifact.kind})"
    return [
        facts([("artifact", artifact), ("this is", result.summary)]),
        *listed("Notes on the artifact", result.notes),
    ]


def _header(request: "Request") -> list[tuple[str, str | Text]]:
    # The base's own layout, where the plan's declares it as another family.
    recipe, checkpoint, layout = request.recipe, request.model.checkpoint, request.model.layout
    revision = "" if checkpoint.revision is None else f" @ {checkpoint.revision}"
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    return [
        ("recipe", f"{recipe.title} ({recipe.path})"),
        ("model", f"{checkpoint.source}{revision}"),
        ("family", f"{layout.family.name}: {layout.family.title}"),
        (
            "size",
            f"{layout.layers} blocks, width {layout.hidden}, {size(total)} in {layout.dtype}",
        ),
        ("head", head(layout)),
    ]


def _findings(planned: "Plan") -> Table:
    """Return the findings; those that differ only in their layers share a row."""
    rows = table("exactness", "edit, where, and why")
    groups: dict[tuple[str, str, str], list[tuple[Finding, str]]] = {}
    for finding in planned.findings:
        why = finding.reason + ("" if finding.remedy is None else f"\nfix: {finding.remedy}")
        edit, exactness = f"{finding.kind} {finding.concept}", str(finding.exactness)
        group = groups.setdefault((edit, exactness, NUMBER.sub("#", why)), [])
        group.append((finding, why))
    for (edit, exactness, _), group in groups.items():
        one = merged([why for _, why in group])
        for part in [group] if one is not None else [[pair] for pair in group]:
            sites = [site for finding, _ in part for site in finding.sites]
            title = f"{edit} at {site_list(sites, planned.layout)}"
            why = part[0][1] if one is None else one
            rows.add_row(word(exactness), Text(title, "bold").append(f"\n{why}", "not bold"))
    return rows


def _changes_title(rows: Sequence[Named]) -> str:
    return f"Changes: {', '.join(_counts(rows))}"


def _counts(rows: Sequence[Named]) -> list[str]:
    """Return how many tensors are edited and how many new, each in a few words."""
    counts = []
    for what, new in (("edited", False), ("new", True)):
        sizes = [row.nbytes for row in rows if row.new is new]
        if sizes:
            plural = "s" * (len(sizes) != 1)
            counts.append(f"{len(sizes)} tensor{plural} {what} ({size(sum(sizes))})")
    return counts


def _config(planned: "Plan") -> Table:
    rows = table("key", "old", "new")
    for change in planned.config:
        old = "(absent)" if change.old is None else json.dumps(change.old)
        rows.add_row(change.key, old, "(removed)" if change.new is None else json.dumps(change.new))
    return rows
