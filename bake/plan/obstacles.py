"""Why an edit of the stream does not fold at a site, and what folds in its place."""

from functools import lru_cache

import torch

from bake.affine import AffineMap, tolerance
from bake.families import Branch, Layout

MODULES = 'module outputs (at = ["attn_out.*", "mlp_out.*"])'
WITHOUT_CONSTANT = f"leave the constant out, and edit {MODULES}: another edit"


@lru_cache(maxsize=64)
def orthogonal(map_: AffineMap) -> bool:
    """Whether every norm passes a map; the plan asks again and again of the same."""
    return map_.is_orthogonal()


def holder(layout: Layout, point: int) -> Branch | None:
    """Return the branch whose writer's bias takes the constant of a stream point."""
    # The last writer before the site comes first: an MLP's bias rather than an attention's.
    for branch in reversed(layout.branches):
        if branch.target == point and branch.norm_out is None and branch.has_slot:
            return branch
    return None


def fold_at_modules(layout: Layout, map_: AffineMap) -> bool:
    """Return whether a map folds at the outputs of all modules: a constant needs bias slots."""
    return map_.is_linear() or all(branch.has_slot for branch in layout.branches)


def obstacle(layout: Layout, point: int, turn: AffineMap) -> str | None:
    """Return why the stream before a point cannot live in a turned frame, if so."""
    ones = torch.ones(layout.hidden, dtype=torch.float64)
    images = turn.linear(ones), turn.adjoint(ones)
    centred = max(
        min(float((image - ones).abs().max()), float((image + ones).abs().max()))
        for image in images
    )
    for branch in layout.branches:
        if branch.target <= point and branch.norm_out is not None:
            return f"{branch.live} writes through {branch.norm_out.live}, which does not turn"
        norm = branch.norm_in
        if branch.source < point and norm is not None and norm.kind == "layer":
            if centred > tolerance(layout.hidden):
                return (
                    f"{norm.live} is a LayerNorm: it subtracts the mean, which only a map that "
                    "keeps the all-ones direction passes through"
                )
    return None


def refusal(layout: Layout, point: int, map_: AffineMap) -> tuple[str, str]:
    """Return reason and remedy for a hook that folds in neither way."""
    if orthogonal(map_):
        reason = "an orthogonal map turns everything before it, but "
        reason += str(obstacle(layout, point, map_))
        remedy = WITHOUT_CONSTANT
        if fold_at_modules(layout, map_):
            remedy = f"edit {MODULES}, where any affine map is exact: another edit"
    elif map_.is_idempotent():
        before = layout.points[point - 1][0]
        reason = f"the skip path carries the edited component from {before} past this site, "
        reason += "and it has no weights"
        # Behind a post-norm no projection of the stream folds, at whichever sites.
        plain = all(branch.norm_out is None for branch in layout.branches)
        ways = ['every stream site (at = "resid")'] * plain
        ways += [MODULES] * fold_at_modules(layout, map_)
        remedy = f"apply the edit at {' or at '.join(ways)}: exact, and another edit"
        if not ways:
            remedy = WITHOUT_CONSTANT
    else:
        reason = f"the map is not idempotent (A² − A = {map_.idempotence_error():.1e}): it changes "
        reason += "again what came through the skip path, which has no weights"
        remedy = WITHOUT_CONSTANT
        if fold_at_modules(layout, map_):
            remedy = f"edit {MODULES}, where any affine map is exact: another edit"
    return reason, remedy
