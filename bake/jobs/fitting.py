"""Stand-ins for edits without an exact fold, as a recipe with ``[calibrate]`` asks for them."""

from typing import TYPE_CHECKING

from bake.errors import UsageError
from bake.progress import Bars

if TYPE_CHECKING:
    from bake.artifact.schema import CalibrationRecord
    from bake.jobs.model import Model
    from bake.plan import Plan
    from bake.recipe import CalibrateSpec, Recipe


def wanted(recipe: "Recipe", plan: "Plan") -> "CalibrateSpec | None":
    """Return how stand-ins are to be fitted, or None where nothing is to be.

    Raises:
        UsageError: the recipe allows an approximation and names no texts to make it from.
    """
    from bake.plan import Exactness

    if "approximate" not in recipe.export.allow or plan.exactness is not Exactness.IMPOSSIBLE:
        return None
    if recipe.calibrate is None:
        raise UsageError(
            "an approximation is allowed, and there are no texts to fit it on",
            where=str(recipe.path),
            fix="add [calibrate] with prompts = FILE, one text a line",
        )
    if recipe.verify.most_kl is None:
        raise UsageError(
            "an approximation is allowed, and nothing says how good it has to be",
            where=str(recipe.path),
            fix="add [verify] with most_kl, the share of the effect's KL that may be lost: 0.05",
        )
    return recipe.calibrate


def fitted(
    recipe: "Recipe", spec: "CalibrateSpec", model: "Model", plan: "Plan", bars: Bars
) -> "tuple[Plan, CalibrationRecord]":
    """Return a plan with stand-ins, and what the record keeps of how they were fitted.

    The whole model is loaded in float32, as a verification loads it, and run on the texts.

    Raises:
        InputError: the texts or the model cannot be read.
        UsageError, InexactPlan: nothing can be fitted.
    """
    import torch
    from msgspec import structs

    from bake.approximate import Settings, approximate
    from bake.artifact.schema import PromptsRecord
    from bake.verify.models import load
    from bake.verify.prompts import parse_prompts, read_lines
    from bake.verify.tokenizer import load_tokenizer

    checkpoint = model.complete()
    lines = read_lines(spec.path)
    prompts = parse_prompts(lines, spec.path, load_tokenizer(checkpoint.path), spec.tokens)
    live = load(checkpoint, torch.float32, family=model.family)
    settings = Settings(spec.rank, spec.corrections, spec.constant)
    with bars("fitting stand-ins", unit="writers") as move:
        planned, facts = approximate(
            plan,
            lambda edits: model.plan(edits, recipe.export),
            model=live.model,
            layout=model.layout,
            prompts=prompts.tokens,
            settings=settings,
            progress=move,
        )
    return planned, structs.replace(facts, prompts=PromptsRecord.of(prompts.to_json()))
