"""What an edit's own system does otherwise than weights, which act always and at every token."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from bake.affine import AffineMap
from bake.directions import POSITIONS, SAYS, Direction
from bake.edits import Own, WeightUpdate
from bake.errors import UsageError
from bake.nonlinear import Masked, Nonlinear, NormPreserving
from bake.positions import Positions, Word
from bake.recipe.maps import Named, gated, masked
from bake.recipe.spec import ConditionTable, DirectionSpec


def condition_words(gate: ConditionTable) -> str:
    """Return a condition in a few words."""
    side = f"above {gate.above:g}" if gate.above is not None else f"below {gate.below:g}"
    return f"only where a token's {gate.measure} on {gate.direction} is {side}"


def said_of(spec: DirectionSpec | None, metadata: Mapping[str, str]) -> str | None:
    """Return in one sentence what a direction's system does and weights do not, or None.

    Args:
        spec: what the recipe says of the direction; None where no recipe is at hand.
        metadata: the artifact's.
    """
    acts, does = [], []
    positions = _positions(spec, metadata)
    if positions is not None and positions.text != Word.ALL:
        acts.append(positions.words)
    if spec is not None and spec.gate is not None:
        acts.append(condition_words(spec.gate))
    if acts:
        does.append(f"acts {', '.join(acts)}")
    if spec is not None and spec.normalize:
        does.append("scales the result back to its norm before")
    if not does:
        return metadata.get(SAYS)
    kept = ", and leave the norm as it becomes" if spec is not None and spec.normalize else ""
    said = f"its system {' and '.join(does)}; the weights act at every token, always{kept}"
    return f"{said}; {metadata[SAYS]}" if SAYS in metadata else said


def own_of(
    specs: Sequence[DirectionSpec],
    found: Sequence[Mapping[str, str]],
    items: Sequence[Named],
    map_: AffineMap | WeightUpdate | Nonlinear,
    vector_of: Callable[[ConditionTable], Tensor],
) -> Own | None:
    """Return how the system of an edit's directions applies it; None for always and everywhere.

    Args:
        specs: what the recipe says of the directions.
        found: the metadata of their artifacts.
        items: what acts together at the edit's sites.
        map_: the edit's own.
        vector_of: reads the vector of a condition.

    Raises:
        UsageError: directions that act together are of systems that act otherwise than each other,
            or what they say is of a map that is none of activations.
    """
    alike = {
        (spec.normalize, spec.gate, None if at is None else at.text)
        for spec, metadata in zip(specs, found, strict=True)
        for at in [_positions(spec, metadata)]
    }
    if len(alike) > 1:
        raise UsageError(
            f"the directions {' and '.join(spec.name for spec in specs)} act together, and their "
            "systems do not act alike",
            fix="say the same positions, normalize and gate of both",
        )
    first = specs[0]
    positions = _positions(first, found[0]) or Positions(Word.ALL)
    if isinstance(map_, WeightUpdate):
        if positions.text != Word.ALL or first.normalize or first.gate is not None:
            raise UsageError(
                f"direction {first.name!r} is a ready update of a weight, which acts always",
                fix="leave positions, normalize and gate out",
            )
        return None
    if isinstance(map_, AffineMap):
        own = _around(first, items[0].item, map_, vector_of)
    elif first.normalize or first.gate is not None:
        raise UsageError(
            f"direction {first.name!r} says normalize or gate, and the edit is no affine map",
            why="they say what a system does and weights do not; such an edit is the system's map",
            fix=f"leave both out of [directions.{first.name}]; an edit says its own with kind, map "
            "and gate",
        )
    else:
        own = None
    if own is None and positions.text == Word.ALL:
        return None
    return Own(positions, own)


def _around(
    spec: DirectionSpec,
    item: Direction,
    map_: AffineMap,
    vector_of: Callable[[ConditionTable], Tensor],
) -> Nonlinear | None:
    """Return what a system makes of an affine map: between limits, with its norm, on a condition.

    Raises:
        UsageError: it has limits and keeps the norm, of which there is no map.
    """
    own: Masked | NormPreserving | None = masked(item, map_)
    if spec.normalize and own is not None:
        raise UsageError(
            f"direction {spec.name!r} acts between limits, and says normalize",
            why="bake has no map that does both",
            fix="leave normalize out",
        )
    if spec.normalize:
        own = NormPreserving(map_)
    if spec.gate is not None:
        return gated(map_ if own is None else own, spec.gate, vector_of(spec.gate))
    return own


def _positions(spec: DirectionSpec | None, metadata: Mapping[str, str]) -> Positions | None:
    """Return where a direction's system acts: as the recipe says it, or its artifact."""
    said = None if spec is None else spec.positions
    text = metadata.get(POSITIONS) if said is None else said
    return None if text is None else Positions(text)
