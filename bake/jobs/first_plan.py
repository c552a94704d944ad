"""A recipe for a model and an artifact: every kind of edit is planned, and one chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.errors import BakeError, UsageError
from bake.jobs.fit_proposal import named_beside
from bake.jobs.model import Model
from bake.jobs.request import Request, plan_recipe
from bake.progress import Bars, no_bars

if TYPE_CHECKING:
    from bake.directions import Directions
    from bake.edits import EditKind
    from bake.plan import Plan


@dataclass(frozen=True, slots=True, eq=False)
class Tried:
    """One kind of edit, as far as a recipe of it got."""

    kind: "EditKind"
    text: str
    """Of the recipe, without what was found out about it."""
    request: Request | None
    """None where no plan could be made."""
    problem: BakeError | None
    """Why the plan does not go ahead."""

    @property
    def allowed(self) -> tuple[str, ...]:
        """What the plan had to be allowed."""
        return () if self.request is None else self.request.recipe.export.allow

    def told(self) -> str:
        """Return in one line what came of it: a comment of a recipe, and words of a stranger's."""
        if self.request is None or self.problem is not None:
            assert self.problem is not None
            return f"{self.kind}: {' '.join(self.problem.what.split())}"
        allow = f", with allow = [{', '.join(map(_quoted, self.allowed))}]" if self.allowed else ""
        return f"{self.kind}: {self.request.plan.exactness}{allow}"


@dataclass(frozen=True, slots=True, eq=False)
class FirstRecipe:
    """The recipe that was chosen, and what else there is."""

    chosen: Tried
    tried: tuple[Tried, ...]
    carriers: tuple[str, ...]
    """Which hold the chosen edit."""

    @property
    def request(self) -> Request:
        """The plan of the chosen recipe."""
        assert self.chosen.request is not None
        return self.chosen.request

    @property
    def text(self) -> str:
        """The recipe as it is to be written, with what was found out as comments."""
        lines = [self.chosen.text.rstrip(), "", "[export]"]
        to = self.request.recipe.export.to
        others = [carrier for carrier in self.carriers if carrier not in to]
        or_else = f"    # or {', '.join(others)}" if others else ""
        lines.append(f"to = [{', '.join(map(_quoted, to))}]{or_else}")
        if self.chosen.allowed:
            lines.append(f"allow = [{', '.join(map(_quoted, self.chosen.allowed))}]")
        head = [f"# {one.told()}" for one in self.tried]
        return "\n".join(["# What the plan says of every kind of edit:", *head, "", *lines, ""])

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "kind": str(self.chosen.kind),
            "exactness": str(self.request.plan.exactness),
            "carriers": list(self.carriers),
            "tried": [{"kind": str(one.kind), "told": one.told()} for one in self.tried],
            "recipe": self.text,
        }


def first_plan(
    model: Model,
    found: "Directions",
    file: str,
    out: Path,
    *,
    options: Mapping[str, object],
    bars: Bars = no_bars,
) -> FirstRecipe:
    """Return a recipe for an artifact whose plan goes ahead on a model.

    Kinds are tried in the order in which the artifact's system would have them, each with as little
    allowed as will do; the first that needs no allowance is chosen, or else the first that goes
    ahead. Nothing is written.

    Args:
        model: what is to be edited.
        found: what the artifact holds.
        file: as the user named it: a path from the working folder, or an address on the Hub.
        out: where the recipe is to go, from which its paths are told.
        options: what was said of the artifact that it could not say itself.
        bars: where progress is shown.

    Raises:
        UsageError: the artifact holds nothing that an edit is made of.
        BakeError: no kind of edit goes ahead: why the first does not.
    """
    from bake.recipe import possible_kinds

    kinds = possible_kinds(found)
    if not kinds:
        raise UsageError(
            f"{file} holds nothing that an edit is made of",
            fix="`bake directions` says what it holds",
        )
    tried: list[Tried] = []
    with bars("planning", unit="kinds") as move:
        for kind in kinds:
            tried.append(_try(model, found, file, out, kind, options))
            if move is not None:
                move(len(tried), len(kinds))
    able = [one for one in tried if one.problem is None]
    if not able:
        assert tried[0].problem is not None
        raise tried[0].problem
    chosen = min(able, key=lambda one: bool(one.allowed))
    assert chosen.request is not None
    return FirstRecipe(chosen, tuple(tried), _carriers(chosen.request.plan))


def _try(
    model: Model,
    found: "Directions",
    file: str,
    out: Path,
    kind: "EditKind",
    options: Mapping[str, object],
) -> Tried:
    """Return what a recipe of one kind comes to: as a checkpoint, or else as any carrier."""
    from bake.artifact import CARRIERS
    from bake.checkpoints.hub_names import HUB_PREFIX
    from bake.fit.proposal import allowances
    from bake.recipe import first_recipe, override, parse_recipe

    checkpoint = model.checkpoint
    base = (checkpoint.repo, checkpoint.revision)
    if checkpoint.revision is None:
        base = (named_beside(checkpoint.path.resolve(), out), None)
    place = file if file.startswith(HUB_PREFIX) else named_beside(Path(file).resolve(), out)
    text = first_recipe(found, place, options, kind=kind, model=base, layout=model.layout)
    problem: BakeError | None = None
    request: Request | None = None
    try:
        recipe = parse_recipe(text.encode(), out)
        ways = [*((CARRIERS[:1], allow) for allow in allowances())]
        ways += [((carrier,), ()) for carrier in CARRIERS[1:]]
        for to, allow in ways:
            asked = override(recipe, to=to, allow=allow)
            made = plan_recipe(asked, {"concept": found}, model)
            refusal = made.refusal()
            if refusal is None:
                return Tried(kind, text, made, None)
            problem = problem or refusal
            request = request or made
    except BakeError as error:
        problem = error
    return Tried(kind, text, request, problem)


def _carriers(plan: "Plan") -> tuple[str, ...]:
    """Return the carriers that hold a plan."""
    from bake.artifact import CARRIERS
    from bake.plan import Exactness
    from bake.plan.carriers import carrier_findings

    def holds(carrier: str) -> bool:
        found: Sequence[Any] = carrier_findings(plan, carrier)
        return all(finding.exactness is not Exactness.IMPOSSIBLE for finding in found)

    return tuple(filter(holds, CARRIERS))


def _quoted(word: str) -> str:
    return f'"{word}"'
