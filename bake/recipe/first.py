"""A recipe to begin with, for an artifact: what it says itself, and what is left to choose."""

import json
from collections.abc import Mapping

from bake.directions import READERS, Directions, Role
from bake.edits import EditKind
from bake.families import Layout
from bake.recipe.edits import KINDS_OF_KEY
from bake.recipe.examples import example
from bake.recipe.maps import KINDS_OF_ROLE, left_out
from bake.recipe.own import said_of
from bake.sites import parse_site, summary

_NUMBERS = ("strength", "alpha", "coefficient", "keep", "degrees")


def possible_kinds(found: Directions) -> list[EditKind]:
    """Return the kinds of edit that an artifact holds the tensors of, its system's own first."""
    roles = dict.fromkeys(role for item in found.items for role in item.tensors)
    kinds = dict.fromkeys(kind for role in roles for kind in KINDS_OF_ROLE.get(role, ()))
    usual = READERS[found.format].kinds
    return sorted(kinds, key=lambda kind: kind not in usual)


def first_recipe(
    found: Directions,
    file: str,
    options: Mapping[str, object],
    *,
    kind: EditKind | None = None,
    model: tuple[str, str | None] | None = None,
    layout: Layout | None = None,
) -> str:
    """Return the text of a recipe that names an artifact, with its choices as comments.

    Args:
        found: what the artifact holds.
        file: as it was named.
        options: what was said of it that it could not say itself.
        kind: of the edit; its system's own, or the first that there is, when None.
        model: the folder or the id, and the commit on the Hub; left to be filled in when None.
        layout: of the model.
    """
    kinds = possible_kinds(found)
    roles = dict.fromkeys(role for item in found.items for role in item.tensors)
    if not kinds:
        return f"# it holds {', '.join(roles)}, of which alone there is no edit\n"
    kind = kind or kinds[0]
    whole = [one for one in kinds if not any(left_out(one, item.tensors) for item in found.items)]
    others = [str(one) for one in whole if one != kind]
    base = ['model = "owner/name"    # the model that it was fitted on']
    if model is not None:
        base = [f"{k} = {_toml(v)}" for k, v in zip(("model", "revision"), model, strict=True) if v]
    lines = [
        "[base]",
        *base,
        "",
        "[directions.concept]",
        f"file = {_toml(file)}",
        *(f"{key} = {_toml(value)}" for key, value in options.items()),
        "",
        "[[edits]]",
        f'kind = "{kind}"' + (f"    # or {', '.join(others)}" if others else ""),
        'direction = "concept"',
    ]
    sites = [parse_site(item.site) for item in found.items if item.site is not None]
    if len(sites) == len(found.items) and kind not in (EditKind.ABLATE, EditKind.AFFINE):
        lines.append(f"# at = the file's own sites: {summary(sites)}")
    else:
        lines.append("at = {}    # {}".format(*example(kind, found.items, layout)))
    if kind is EditKind.ROTATE and Role.SUBSPACE in roles:
        lines.append("angle = 180.0    # to which each token is turned; or by how much: degrees")
    if kind is EditKind.CLAMP:
        lines += ["low = 0.0", "high = 0.0    # the level that it is set to; one of them limits it"]
    for key in _NUMBERS:
        if kind in KINDS_OF_KEY[key]:
            lines.append(f"# {key} = 1.0")
    if said := said_of(None, found.metadata):
        lines.append(f"# {said}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    # TOML knows no surrogates, which json would write for what lies beyond the first 2¹⁶ letters.
    return json.dumps(value if isinstance(value, int | float) else str(value), ensure_ascii=False)
