"""``[[edits]]``: what is done with the directions, and where."""

from collections.abc import Collection, Mapping
from pathlib import Path

from bake.edits import EditKind
from bake.errors import UsageError
from bake.recipe.amounts import amount_of
from bake.recipe.artifacts import located
from bake.recipe.spec import ConditionTable, EditTable
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
        EditKind.MASKED_SCALE,
    ),
    "alpha": (EditKind.AFFINE,),
    "mean": (EditKind.AFFINE, EditKind.ERASE, EditKind.CLAMP),
    "coefficient": (EditKind.OFFSET,),
    "keep": (EditKind.OFFSET,),
    "repeat": (EditKind.OFFSET,),
    "degrees": (EditKind.ROTATE,),
    "reflect": (EditKind.ROTATE,),
    "angle": (EditKind.ROTATE,),
    "low": (EditKind.CLAMP,),
    "high": (EditKind.CLAMP,),
    "rectified": (EditKind.CLAMP,),
    "map": (EditKind.NORM_PRESERVING, EditKind.GATE),
    "gate": (EditKind.GATE,),
}
# What may stand inside kinds that keep the norm or ask a condition.
_AFFINE = (
    EditKind.ABLATE,
    EditKind.AFFINE,
    EditKind.ERASE,
    EditKind.OFFSET,
    EditKind.SCALE,
    EditKind.ROTATE,
    EditKind.LINEAR,
)
INNER: Mapping[EditKind, tuple[EditKind, ...]] = {
    EditKind.NORM_PRESERVING: _AFFINE,
    EditKind.GATE: (*_AFFINE, EditKind.MASKED_SCALE),
}
# The keys whose values may differ from site to site.
AMOUNTS = ("strength", "coefficient")
# The kinds that take several directions at once: as the span of all of them, or as a plane.
JOINT_KINDS = (EditKind.ABLATE, EditKind.AFFINE, EditKind.ROTATE)


def read_edits(rows: list[Toml], path: Path, directions: Collection[str]) -> tuple[EditTable, ...]:
    """Return the edits of a recipe, in its order.

    Args:
        rows: the tables ``[[edits]]``.
        path: the recipe's.
        directions: the names that the edits may use.

    Raises:
        UsageError: there are none; a missing, unknown or contradictory key; an unknown name.
    """
    if not rows:
        raise UsageError(
            "the recipe has no edits", where=str(path), fix="add a table [[edits]] with a kind"
        )
    return tuple(
        _edit(row, f"{path} [[edits]] {number}", directions)
        for number, row in enumerate(rows, start=1)
    )


def _edit(row: Toml, where: str, directions: Collection[str]) -> EditTable:
    EditTable.keys(row, where)
    word = row["kind"]
    if word not in tuple(EditKind):
        fix = nearest(str(word), EditKind)
        raise UsageError(f"unknown kind {word!r}", where=where, fix=fix)
    with located(where):
        edit = EditTable.read(row, where)
        _check_keys(row, edit)
        _check_conditional(edit, directions)
        _check_names(edit, directions)
        _check_directions(edit)
        for key in AMOUNTS:
            amount_of(getattr(edit, key), key)
    return edit


def _check_keys(row: Mapping[str, Toml], edit: EditTable) -> None:
    """Refuse a key that other kinds take."""
    own_kinds, kind = {edit.kind, edit.inner}, edit.kind
    for key, kinds in KINDS_OF_KEY.items():
        if key in row and not own_kinds & {*kinds}:
            own = [known for known, takers in KINDS_OF_KEY.items() if own_kinds & {*takers}]
            raise UsageError(
                f"{key!r} is no key of kind = {str(kind)!r}",
                why=f"it belongs to {', '.join(kinds)}",
                fix=f"{kind} takes {', '.join(own)}" if own else f"{kind} takes none of its own",
            )


def _check_conditional(edit: EditTable, directions: Collection[str]) -> None:
    """Refuse an edit without what its condition is made of."""
    kind = edit.kind
    if kind in INNER and edit.map not in INNER[kind]:
        raise UsageError(
            f"map = {None if edit.map is None else str(edit.map)!r} is none that kind = "
            f"{str(kind)!r} has inside",
            fix=f"write one of {', '.join(INNER[kind])}",
        )
    if kind is EditKind.GATE and edit.gate is None:
        raise UsageError(
            "a gate has no condition",
            fix='add gate = { direction = "NAME", above = 0.5 }, the direction a vector',
        )
    if edit.gate is not None:
        check_condition(edit.gate, directions)
    if kind is EditKind.CLAMP and edit.low is None and edit.high is None:
        raise UsageError("a clamp has no limit", fix="give low, high or both")


def check_condition(condition: ConditionTable, directions: Collection[str]) -> None:
    """Refuse a condition on no known direction, or of no one side.

    Raises:
        UsageError: saying which.
    """
    if condition.direction not in directions:
        fix = nearest(condition.direction, directions)
        raise UsageError(f"gate: there is no direction {condition.direction!r}", fix=fix)
    if (condition.above is None) == (condition.below is None):
        raise UsageError("a gate has one side", fix="give above or below, and not both")


def _check_names(edit: EditTable, directions: Collection[str]) -> None:
    for name in (*edit.directions, *([edit.mean] if isinstance(edit.mean, str) else [])):
        if name not in directions:
            raise UsageError(
                f"there is no direction {name!r}",
                fix=nearest(name, directions)
                if directions
                else f"add a table [directions.{name}] with a file",
            )
    if len(set(edit.directions)) < len(edit.directions):
        raise UsageError(f"direction = {list(edit.directions)} repeats a name")


def _check_directions(edit: EditTable) -> None:
    if len(edit.directions) > 1 and edit.inner not in JOINT_KINDS:
        raise UsageError(
            f"kind = {str(edit.kind)!r} takes one direction, not {len(edit.directions)}",
            why=f"a list is one joint subspace, for {', '.join(JOINT_KINDS)}",
            fix="write one [[edits]] for each direction",
        )
    if len(edit.directions) > 1 and not edit.at:
        raise UsageError(
            "the key 'at' is missing",
            why="several directions have no site of their own in common",
            fix='name the sites, for example at = "resid"',
        )
    if edit.reflect + (edit.degrees is not None) + (edit.angle is not None) > 1:
        raise UsageError(
            "degrees and reflect exclude each other"
            if edit.angle is None
            else "angle excludes degrees and reflect",
            fix="degrees turns by an angle in the plane of two vectors, angle turns to one, and "
            "reflect mirrors along one",
        )
