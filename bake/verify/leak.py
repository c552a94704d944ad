"""How much every writer adds along the edited directions, before and after the bake.

For an edit x ↦ x + L(Rx) + b the rows of R are what it reads of an activation. A writer leaks when
its write still has a component there: |Rᵀ·write|, R made orthonormal, as the rms over all tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap
from bake.edits import Edit
from bake.families import Layout
from bake.verify.observe import Writer, writers_of


@dataclass(frozen=True, slots=True)
class Leak:
    """What one writer adds along the directions that one concept's edits read."""

    concept: str
    writer: str
    layer: int | None
    before: float
    """rms over tokens of |Rᵀ·write| in the base model."""
    after: float
    """The same in the baked model."""
    constant: float
    """The part of ``after`` that is the same for every token: what an affine edit sets, and no
    leak of what the model says."""
    varying: float
    """The rest of it: the rms of what differs from token to token."""


@dataclass(frozen=True, slots=True)
class Written:
    """What one writer of one model adds along the directions of one concept, as in ``Leak``."""

    concept: str
    writer: Writer
    rms: float
    constant: float
    varying: float


def written(layout: Layout, edits: Sequence[Edit], writes: Sequence[Tensor]) -> tuple[Written, ...]:
    """Return what every writer that an edit stands behind adds along its directions.

    Args:
        layout: of the base model; the writers of the baked one are the same.
        edits: those of the plan.
        writes: what each writer adds in one of the two models, [tokens, width].
    """
    found = []
    for writer, added in zip(writers_of(layout), writes, strict=True):
        for concept, basis in _bases(edits, writer, layout.hidden).items():
            mean = added.to(torch.float64).mean(0)
            rest = _along(basis, added.to(torch.float64) - mean)
            constant = float((basis @ mean).norm())
            found.append(Written(concept, writer, _along(basis, added), constant, rest))
    return tuple(found)


def leaks(before: Sequence[Written], after: Sequence[Written]) -> tuple[Leak, ...]:
    """Return the leak of every writer, from what it adds in the base and in the baked model."""
    return tuple(
        Leak(
            now.concept,
            now.writer.name,
            now.writer.layer,
            was.rms,
            now.rms,
            now.constant,
            now.varying,
        )
        for was, now in zip(before, after, strict=True)
    )


def _bases(edits: Sequence[Edit], writer: Writer, hidden: int) -> Mapping[str, Tensor]:
    """Return per concept an orthonormal basis, [k, hidden], of what edits read of this writer."""
    rows: dict[str, list[Tensor]] = {}
    for edit in edits:
        if not isinstance(edit.map, AffineMap) or edit.map.width != hidden:
            continue
        if not set(edit.sites) & set(writer.sites):
            continue
        right = edit.map.delta_factors()[1]
        if 0 < right.shape[0] < hidden:  # a map that reads every direction singles none out
            rows.setdefault(edit.concept, []).append(right)
    return {concept: _orthonormal(torch.cat(found)) for concept, found in rows.items()}


def _orthonormal(rows: Float[Tensor, "n d"]) -> Float[Tensor, "k d"]:
    _, singular, vh = torch.linalg.svd(rows, full_matrices=False)
    basis: Tensor = vh[singular > singular[0] * 1e-10]
    return basis


def _along(basis: Tensor, writes: Tensor) -> float:
    return float((writes.to(torch.float64) @ basis.T).square().sum(-1).mean().sqrt())
