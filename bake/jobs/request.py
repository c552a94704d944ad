"""From a recipe and what overrides it to a plan: what ``plan`` and ``export`` share."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from bake.jobs.model import Model, open_model
from bake.progress import Bars, no_bars

if TYPE_CHECKING:
    from bake.artifact.schema import CalibrationRecord, FamilyRecord, Provenance
    from bake.directions import Directions
    from bake.edits import Edit
    from bake.errors import InexactPlan
    from bake.outputs.export import Export
    from bake.plan import Plan
    from bake.recipe import ExportTable, Recipe


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Request:
    """Edits of a model with the plan that they lead to, and the recipe that asks for them."""

    recipe: "Recipe"
    """Without a text where no file was read."""
    model: Model
    plan: "Plan"
    directions: "Mapping[str, Directions]" = field(default_factory=dict)
    calibration: "CalibrationRecord | None" = None
    """How stand-ins were fitted, where some were."""
    recorded: "Provenance | None" = None
    """What an artifact's record says of the request, where the plan was made anew from it."""

    def __repr__(self) -> str:
        return f"Request({self.model!r}, {self.plan!r})"

    def refusal(self, export: "Export | None" = None) -> "InexactPlan | None":
        """Return why the plan may not be executed, or None when it may.

        Args:
            export: with the options of the command line; None for a plan, which needs none.
        """
        from bake.errors import InexactPlan
        from bake.outputs.registry import refuse
        from bake.plan.carriers import refuse as refuse_plan

        try:
            self.refuse_unfit()
            for carrier in self.recipe.export.to:
                if export is None:
                    refuse_plan(self.plan, carrier, frozenset(self.recipe.export.allow))
                else:
                    refuse(export, carrier)
        except InexactPlan as error:
            return error
        return None

    def refuse_unfit(self) -> None:
        """Raise when the stand-ins lose more, on texts kept out of the fit, than the recipe allows.

        Raises:
            InexactPlan: with both shares.
        """
        from bake.errors import InexactPlan

        facts, most = self.calibration, self.recipe.verify.most_kl
        if facts is None or most is None or facts.share <= most:
            return
        raise InexactPlan(
            f"the fitted stand-ins lose {facts.share:.3g} of the effect's KL on held-out texts, "
            f"and [verify] most_kl allows {most:.3g}",
            where=str(self.recipe.path),
            why="no more of the effect can be kept with these settings",
            fix=f"allow more with most_kl = {_above(facts.share)}, or fit better: more prompts, a "
            "higher rank in [calibrate]",
        )

    def export(self, out: Path, **options: Any) -> "Export":
        """Return the export of the plan: what is written, and how.

        Args:
            out: the output, from which the path of a local base is told.
            options: fields of ``Export`` beside plan, base and record, instead of the recipe's.
        """
        from bake.outputs.export import MOST_KL, Export

        asked = self.recipe.export
        told = {
            "gguf_type": asked.gguf_type,
            "rounding": asked.rounding,
            "dequantize": asked.dequantize,
            "most_kl": self.recipe.verify.most_kl or MOST_KL,
            **options,
        }
        allow = frozenset(asked.allow)
        return Export(self.plan, self.model.checkpoint, self.provenance(out), allow, **told)

    def provenance(self, out: Path | None = None) -> "Provenance":
        """Return what a record keeps of the request: recipe, base, directions.

        Args:
            out: the output, from which the path of a local base is told.
        """
        if self.recorded is not None:
            return self.recorded
        from bake.artifact.base import base_ref
        from bake.artifact.schema import Provenance, RecipeRecord
        from bake.directions.describe import direction_record
        from bake.plan.sketch import sketch
        from bake.recipe import limits_beside

        recipe, family = self.recipe, self.model.family
        asked = RecipeRecord(
            title=recipe.title,
            file=recipe.path.name,
            digest=recipe.digest,
            text=recipe.text,
            settings=recipe.settings,
        )
        return Provenance(
            recipe=asked if recipe.text else None,
            base=base_ref(self.model.checkpoint, out=out, model=recipe.base.model),
            directions={
                name: direction_record(found, recipe.directions[name].file)
                for name, found in self.directions.items()
            },
            allow=recipe.export.allow,
            target=recipe.export.target,
            widen=recipe.export.widen,
            sketch={name: tuple(seen) for name, seen in sketch(self.plan).items()},
            family=None if family is None else table_of(family),
            assume_harmless=self.model.layout.assumed,
            verify=limits_beside(recipe.verify, recipe.path),
            calibration=self.calibration,
        )


def _above(share: float) -> str:
    """Return the next number of two digits above a share."""
    step = 10.0 ** (math.floor(math.log10(share)) - 1)
    return f"{(math.floor(share / step) + 1) * step:.2g}"


def table_of(path: Path) -> "FamilyRecord":
    """Return what the record keeps of the user's own table: all of it, to make the plan again."""
    from bake.artifact.schema import FamilyRecord

    data = path.read_bytes()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    return FamilyRecord(file=path.name, digest=digest, text=data.decode("utf-8"))


def plan_edits(
    model: Model,
    edits: "Sequence[Edit]",
    *,
    to: Sequence[str] = ("checkpoint",),
    allow: Sequence[str] = (),
    target: Sequence[str] = ("transformers",),
    widen: int | None = None,
) -> Request:
    """Return the plan of edits that were made in Python, which no recipe asks for.

    Args:
        model: what is edited.
        edits: in the order in which they apply.
        to: the carriers to write.
        allow: what a recipe may allow as well: recast, relocate, widen, nulling.
        target: the runtimes that must load the result.
        widen: how many dimensions a model that is widened gets; None for as few as runtimes take.

    Raises:
        BakeError: an edit does not fit the model.
    """
    from bake.recipe import Base, ExportTable, Recipe

    found = model.checkpoint
    # Of a folder the name alone: a record and a card travel, and the way to it is beside it.
    base = Base(found.path.name, None, found.path)
    if found.revision is not None:
        base = Base(found.source.partition("@")[0], found.revision, None)
    asked = ExportTable(to=tuple(to), allow=tuple(allow), target=tuple(target), widen=widen)
    plan, export = _planned(model, edits, asked)
    return Request(Recipe("", Path(), base, export), model, plan)


def _planned(
    model: Model, edits: "Sequence[Edit]", export: "ExportTable"
) -> "tuple[Plan, ExportTable]":
    """Return the plan for the carriers that are asked for, and what of the request it is made with.

    What is allowed is not made use of where a carrier could not hold it and can do without.
    """
    from msgspec import structs

    from bake.artifact.carrier import Part, carrier_of
    from bake.recipe import REDECLARING

    plan, lesser = model.plan(edits, export), tuple(w for w in export.allow if w not in REDECLARING)
    short = [name for name in export.to if Part.CONFIG not in carrier_of(name).holds]
    if not short or lesser == export.allow or _fits(plan, export):
        return plan, export
    less = structs.replace(export, allow=lesser, widen=None)
    other = model.plan(edits, less)
    if not _fits(other, less):
        return plan, export
    left = ", ".join(word for word in export.allow if word not in lesser)
    note = f"planned without {left}, which {' and '.join(short)} could not hold"
    return replace(other, notes=(note, *other.notes)), less


def _fits(plan: "Plan", export: "ExportTable") -> bool:
    """Whether all carriers that are asked for hold a plan, of what the request allows."""
    from bake.errors import InexactPlan
    from bake.plan import Exactness
    from bake.plan.carriers import refuse

    if "approximate" in export.allow and plan.exactness is Exactness.IMPOSSIBLE:
        return True  # stand-ins are low-rank changes of weights
    try:
        for carrier in export.to:
            refuse(plan, carrier, frozenset(export.allow))
    except InexactPlan:
        return False
    return True


class Overrides(TypedDict, total=False):
    """What is said beside a recipe, instead of what it says."""

    model: str | None
    """Another model: a folder or a Hub id."""
    to: Sequence[str]
    """Other carriers."""
    allow: Sequence[str]
    """What is allowed as well."""
    target: Sequence[str]
    """Other runtimes."""
    settings: Sequence[str]
    """``KEY=VALUE``: any value of the recipe, as ``edits.0.strength=0.8``."""


def compile_request(
    recipe: Path,
    *,
    family: Path | None = None,
    assume_harmless: Sequence[str] = (),
    bars: Bars = no_bars,
    **overrides: Unpack[Overrides],
) -> Request:
    """Return the plan of a recipe. Of the model only headers, config and norms are read.

    Where the recipe allows an approximation and an edit needs one, the model is loaded and run.

    Raises:
        BakeError: whatever is wrong with the recipe, the model, the directions or their fit.
    """
    opened = open_recipe(recipe, family=family, assume_harmless=assume_harmless, **overrides)
    return plan_recipe(*opened, bars)


def open_recipe(
    recipe: Path,
    *,
    family: Path | None = None,
    assume_harmless: Sequence[str] = (),
    **overrides: Unpack[Overrides],
) -> "tuple[Recipe, Mapping[str, Directions], Model]":
    """Return a recipe with the directions and the model that it names. Nothing is planned.

    Raises:
        BakeError: whatever is wrong with the recipe, the model or the directions.
    """
    from bake.recipe import load_recipe, override, read_artifacts

    loaded = override(
        load_recipe(recipe, overrides.get("settings", ())),
        model=overrides.get("model"),
        to=overrides.get("to", ()),
        allow=overrides.get("allow", ()),
        target=overrides.get("target", ()),
    )
    directions = read_artifacts(loaded)
    opened = open_model(
        loaded.base.source,
        revision=loaded.base.revision,
        family=family,
        assume_harmless=assume_harmless,
    )
    return loaded, directions, opened


def plan_recipe(
    recipe: "Recipe",
    directions: "Mapping[str, Directions]",
    model: Model,
    bars: Bars = no_bars,
) -> Request:
    """Return the plan of a recipe on a model that is open.

    Args:
        recipe: with whatever overrides it.
        directions: those that it names, by name.
        model: the one that it names.
        bars: where progress is shown, should stand-ins be fitted.

    Raises:
        BakeError: an edit does not fit the model, or no stand-in can be fitted.
    """
    from bake.jobs.fitting import fitted, wanted
    from bake.recipe import build_edits, remarks

    plan, export = _planned(model, build_edits(recipe, model.layout, directions), recipe.export)
    recipe, facts = replace(recipe, export=export), None  # as it was made use of
    if (spec := wanted(recipe, plan)) is not None:
        plan, facts = fitted(recipe, spec, model, plan, bars)
    plan = replace(plan, notes=(*remarks(recipe, directions), *plan.notes))
    return Request(recipe, model, plan, directions, facts)
