"""Spoiled references: what a runtime serves has to miss them, or it could not be told from them.

An adapter and a GGUF cannot be spoiled tensor by tensor as a checkpoint is, so it is the hooks that
are: one site is forgotten, or one edit has the wrong sign.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from bake.affine import AffineMap, LowRankMap
from bake.edits import Edit, WeightUpdate

MISTAKES = ("forgotten site", "flipped sign")


def spoiled(
    edits: Sequence[Edit], digest: str, kind: str
) -> Iterator[tuple[str, tuple[Edit, ...]]]:
    """Yield what was spoiled and the spoiled edits, in an order that the plan's digest decides.

    Args:
        edits: those of the plan.
        digest: of the plan.
        kind: one of ``MISTAKES``.
    """
    chance = random.Random(digest)
    if kind == "flipped sign":
        for index in chance.sample(range(len(edits)), len(edits)):
            found = edits[index]
            yield _named(found), _changed(edits, index, replace(found, map=_negative(found.map)))
        return
    places = [(i, site) for i, edit in enumerate(edits) for site in edit.sites]
    for index, site in chance.sample(places, len(places)):
        found = edits[index]
        rest = tuple(other for other in found.sites if other != site)
        # An edit at one site is forgotten with it.
        yield (
            f"{_named(found)} at {site}",
            _changed(edits, index, replace(found, sites=rest) if rest else None),
        )


def _changed(edits: Sequence[Edit], index: int, other: Edit | None) -> tuple[Edit, ...]:
    return (*edits[:index], *(() if other is None else (other,)), *edits[index + 1 :])


def _negative(map_: AffineMap | WeightUpdate) -> AffineMap | WeightUpdate:
    """Return x ↦ x − (h(x) − x): the change subtracted instead of added."""
    if isinstance(map_, WeightUpdate):
        return WeightUpdate(-map_.left, map_.right)
    left, right = map_.delta_factors()
    return LowRankMap(-left, right, -map_.bias)


def _named(edit: Edit) -> str:
    return f"{edit.kind} {edit.concept!r}"
