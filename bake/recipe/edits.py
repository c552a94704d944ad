"""``[[edits]]``: what is done with the directions, and where."""

from collections.abc import Mapping
from pathlib import Path

from bake.edits import EditKind
from bake.errors import UsageError
from bake.recipe.section import Section
from bake.recipe.spec import DirectionSpec, EditSpec
from bake.section import Toml, nearest

# The keys of [[edits]] that belong to some kinds only; an offset's strength is its coefficient, a
# rotation's its angle.
KINDS_OF_KEY: Mapping[str, tuple[EditKind, ...]] = {
    "strength": (
        EditKind.ABLATE,
        EditKind.AFFINE,
        EditKind.ERASE,
        EditKind.SCALE,
        EditKind.LINEAR,
        EditKind.UPDATE,
    ),
    "alpha": (EditKind.AFFINE,),
    "mean": (EditKind.AFFINE, EditKind.ERASE),
    "coefficient": (EditKind.OFFSET,),
    "degrees": (EditKind.ROTATE,),
    "reflect": (EditKind.ROTATE,),
}
# The kinds that take several directions at once: as the span of all of them, or as a plane.
JOINT_KINDS = (EditKind.ABLATE, EditKind.AFFINE, EditKind.ROTATE)


def read_edits(
    rows: list[Toml], path: Path, directions: Mapping[str, DirectionSpec]
) -> tuple[EditSpec, ...]:
    """Return the edits of a recipe, in its order.

    Args:
        rows: the tables ``[[edits]]``.
        path: the recipe's.
        directions: what the edits may name.

    Raises:
        UsageError: there are none; a missing, unknown or contradictory key; an unknown name.
    """
    if not rows:
        raise UsageError(
            "the recipe has no edits", where=str(path), fix="add a table [[edits]] with a kind"
        )
    return tuple(
        _edit(Section(row, f"{path} [[edits]] {number}"), directions)
        for number, row in enumerate(rows, start=1)
    )


def _edit(table: Section, directions: Mapping[str, DirectionSpec]) -> EditSpec:
    word = table.take("kind", str)
    if word not in tuple(EditKind):
        raise UsageError(f"unknown kind {word!r}", where=table.where, fix=nearest(word, EditKind))
    kind = EditKind(word)
    _check_keys(table, kind)
    names = table.words("direction")
    mean = table.raw("mean")
    if mean is not None and not isinstance(mean, bool | str):
        raise UsageError(
            f"mean = {mean!r} is neither true, false nor the name of a direction",
            where=table.where,
        )
    _check_names(table, names, mean if isinstance(mean, str) else None, directions)
    spec = EditSpec(
        place=table.where,
        kind=kind,
        directions=names,
        at=table.words("at"),
        strength=table.take("strength", float, 1.0),
        alpha=table.take("alpha", float, 0.0),
        mean=mean,
        coefficient=table.take("coefficient", float, 1.0),
        degrees=table.optional("degrees", float),
        reflect=table.take("reflect", bool, False),
    )
    table.close()
    _check_directions(spec)
    return spec


def _check_keys(table: Section, kind: EditKind) -> None:
    """Refuse a key that other kinds take."""
    for key, kinds in KINDS_OF_KEY.items():
        if key in table and kind not in kinds:
            own = [known for known, takers in KINDS_OF_KEY.items() if kind in takers]
            raise UsageError(
                f"{key!r} is no key of kind = {str(kind)!r}",
                where=table.where,
                why=f"it belongs to {', '.join(kinds)}",
                fix=f"{kind} takes {', '.join(own)}" if own else f"{kind} takes none of its own",
            )


def _check_names(
    table: Section,
    names: tuple[str, ...],
    mean: str | None,
    directions: Mapping[str, DirectionSpec],
) -> None:
    if not names:
        raise table.missing("direction")
    for name in (*names, *(() if mean is None else (mean,))):
        if name not in directions:
            raise UsageError(
                f"there is no direction {name!r}",
                where=table.where,
                fix=nearest(name, directions)
                if directions
                else f"add a table [directions.{name}] with a file",
            )
    if len(set(names)) < len(names):
        raise UsageError(f"direction = {list(names)} repeats a name", where=table.where)


def _check_directions(spec: EditSpec) -> None:
    if len(spec.directions) > 1 and spec.kind not in JOINT_KINDS:
        raise UsageError(
            f"kind = {str(spec.kind)!r} takes one direction, not {len(spec.directions)}",
            where=spec.place,
            why=f"a list is one joint subspace, for {', '.join(JOINT_KINDS)}",
            fix="write one [[edits]] for each direction",
        )
    if len(spec.directions) > 1 and not spec.at:
        raise UsageError(
            "the key 'at' is missing",
            where=spec.place,
            why="several directions have no site of their own in common",
            fix='name the sites, for example at = "resid"',
        )
    if spec.reflect and spec.degrees is not None:
        raise UsageError(
            "degrees and reflect exclude each other",
            where=spec.place,
            fix="degrees turns in the plane of two vectors, reflect mirrors along one",
        )
