"""The recipe that a fit proposes."""

import json
from collections.abc import Sequence

from bake.edits import EditKind
from bake.fit.methods import Method
from bake.fit.sweep import Sweep, told

_NUMBERS = {
    EditKind.OFFSET: "coefficient = {gap:.6g}    # takes the reference's mean to the concept's; "
    "more is stronger, a minus removes",
    EditKind.AFFINE: "alpha = 0.0    # sets the component to the reference's mean; 1.0 to the "
    "concept's",
    EditKind.ERASE: "strength = 1.0    # the whole of it",
    EditKind.SCALE: "strength = 1.0    # from the reference to the concept; less is weaker",
}
_LADDER: tuple[tuple[str, ...], ...] = ((), ("recast",), ("relocate",), ("widen",))
"""What a recipe allows, the first with which a plan goes ahead: from nothing, over a model that is
declared as the Llama that it is, to what is almost exact."""
_ALLOWED = {
    "recast": "biases need it: the model is declared as the Llama that it is",
    "relocate": "what acts at one site is almost exact so; `widen` leaves nothing of it",
    "widen": "what finds no place in the weights gets new dimensions of the stream",
}


def allowances() -> tuple[tuple[str, ...], ...]:
    """Return what a recipe may allow, in the order in which it is tried."""
    return _LADDER


def recipe_text(
    concept: str,
    file: str,
    model: str,
    revision: str | None,
    *,
    method: Method,
    found: Sweep,
    allow: Sequence[str],
    every_site: bool,
) -> str:
    """Return a recipe that acts as the method means it, at the sites of the file.

    Args:
        concept: what was fitted, the name of the direction and in the title.
        file: of the directions, beside the recipe.
        model: a folder, or an id on the Hub.
        revision: the commit, on the Hub.
        method: how it was fitted.
        found: what came of it.
        allow: what the plan may do.
        every_site: whether the file holds all sites and not the best alone.
    """
    judged = f"AUROC {told(found.judged)} on {found.split.judge} held-out examples"
    acts = f"{len(found.fits)} sites" if every_site else str(found.best.site)
    lines = [
        f"# {method.title}; {judged} at {found.best.site}.",
        f"title = {_toml(f'{concept} at {acts}')}",
        "",
        "[base]",
        f"model = {_toml(model)}",
        *([f"revision = {_toml(revision)}"] if revision else []),
        "",
        f"[directions.{concept}]",
        f"file = {_toml(file)}",
        "",
        "[[edits]]",
        f'kind = "{method.kind}"',
        f'direction = "{concept}"',
        *([] if every_site else [f'at = "{found.best.site}"']),
        _NUMBERS[method.kind].format(gap=_coefficient(found, every_site=every_site)),
    ]
    if allow:
        words = ", ".join(f'"{word}"' for word in allow)
        lines += ["", "[export]", f"allow = [{words}]    # {_ALLOWED[allow[0]]}"]
    return "\n".join(lines) + "\n"


def _coefficient(found: Sweep, *, every_site: bool) -> float:
    """Return what a vector is multiplied with; at several sites they share it, so that it is 1."""
    return 1.0 if every_site else found.best.gap


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
