"""Fold the edits of the residual stream: what each write must become, and in which frame.

Write y for the hooked stream and z for the baked one. At point p the hooked stream is
y_p = h_p(y_{p−1} + w_p), with h_p(x) = A x + b and w_p the write between the points. The skip path
has no weights, so the baked stream is z_p = z_{p−1} + w'_p. Let the streams agree up to an isometry
that every norm passes through, y_p = T_p z_p. Then w'_p = T_pᵀ(A w_p + b) + (T_pᵀ A T_{p−1} − I) z,
and the last term must not depend on the token. There are two ways:

1. A − I acts only on functionals of y_{p−1} that are constant (``Known``), because a hook or a
   write before left them so. The constant goes into a bias. A translation is the case A = I.
2. A is orthogonal, and T_{p−1} = AᵀT_p: everything before p lives in a turned frame.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, LowRankMap, identity, tolerance
from bake.families import Branch, Layout
from bake.plan.hooks import Hook, Hooks
from bake.plan.known import Known
from bake.plan.lowrank import thin_factors
from bake.sites import Site, SiteKind


@dataclass(frozen=True, slots=True)
class Failure:
    """One edit that cannot be folded at one site, with the reason and the remedy."""

    edit: int
    site: Site
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """What becomes of the writes into one point, in the hooked stream's frame."""

    linear: AffineMap
    """A, which acts on every write into the point."""
    constant: Float[Tensor, " d"]
    """What must be added at this point once, component hooks' constants included."""
    frame: AffineMap
    """T, with y = T z; its transpose acts last on what is written."""
    edits: frozenset[int]
    """The edits that A and the constant come from, but for component hooks."""
    turned_by: frozenset[int]
    """The edits that T comes from, all of them at later points."""


@dataclass(slots=True)
class StreamFold:
    """The folded stream: one ``Fold`` a point, and what could not be folded."""

    folds: list[Fold] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    nulling: dict[int, AffineMap] = field(default_factory=dict)
    """For a point behind a post-norm, the projector that the write is to be cleared of."""
    nulled: set[int] = field(default_factory=set)
    """Edits that are nulled where they cannot be exact."""


@lru_cache(maxsize=64)
def _orthogonal(map_: AffineMap) -> bool:
    return map_.is_orthogonal()


def fold_stream(layout: Layout, hooks: Hooks, *, nulling: bool) -> StreamFold:
    """Return how every write changes so that the baked stream follows the hooked one."""
    result = StreamFold()
    known, scale = Known(None, None), 0.0
    steps: list[_Point] = []
    for point, sites in enumerate(layout.points):
        step = _Point(layout, hooks, point, known, result, scale)
        for hook in hooks.at(*sites):
            step.apply(hook)
        step.close(nulling=nulling)
        known, scale = step.known, step.scale
        steps.append(step)
    # T_last = I and T_{p−1} = Q_pᵀ T_p.
    frame: AffineMap = identity(layout.hidden)
    turned_by = frozenset[int]()
    for step in reversed(steps):
        edits = frozenset(hook.edit for hook in step.applied)
        result.folds.insert(0, Fold(step.linear, step.settled(), frame, edits, turned_by))
        frame = step.turn.transpose().after(frame)
        turned_by |= {hook.edit for hook in step.turning}
    return result


class _Point:
    """The state of the walk at one point: y = s + A w + k, s the skip path, w the writes."""

    def __init__(
        self,
        layout: Layout,
        hooks: Hooks,
        point: int,
        known: Known,
        result: StreamFold,
        scale: float,
    ) -> None:
        self.layout, self.hooks, self.point, self.known = layout, hooks, point, known
        self.result = result
        self.writes = [branch for branch in layout.branches if branch.target == point]
        self.linear: AffineMap = identity(layout.hidden)
        self.turn: AffineMap = identity(layout.hidden)
        self.constant = torch.zeros(layout.hidden, dtype=torch.float64)
        # subtle: what is known of the stream carries the rounding of every constant before it, so
        # zero is judged against the largest of them all, not of this point alone.
        self.scale = scale
        self.applied: list[Hook] = []
        self.turning: list[Hook] = []
        if point == 0:
            self._add(hooks.map_at(Site(SiteKind.EMBED)).bias)
        for branch in self.writes:
            if branch.norm_out is None:
                self._add(branch.gain * hooks.map_at(branch.output_site).bias)

    def _add(self, term: Tensor) -> None:
        self.constant = self.constant + term
        self.scale = max(self.scale, float(term.abs().max()))

    def apply(self, hook: Hook) -> None:
        """Pass one hook: the skip path by one of the two ways, the writes and constants through."""
        left, right = thin_factors(hook.map)
        fixed = self.known.constant(right)
        if fixed is not None:
            self.constant = hook.map.linear(self.constant)
            self._add(hook.map.bias)
            self._add(left @ fixed)
        elif _orthogonal(hook.map) and _obstacle(self.layout, self.point, hook.map) is None:
            functionals = self.known.functionals
            assert functionals is not None
            self.known = self.known.turned(hook.map.linear(functionals))
            self.turn = hook.map.without_bias().after(self.turn)
            self.turning.append(hook)
            self.constant = hook.map.linear(self.constant)
            self._add(hook.map.bias)
        else:
            reason, remedy = _refusal(self.layout, self.point, hook.map)
            self.result.failures.append(Failure(hook.edit, hook.site, reason, remedy))
            return
        self.linear = hook.map.without_bias().after(self.linear)
        self.applied.append(hook)

    def close(self, *, nulling: bool) -> None:
        """Settle the writes behind a post-norm, and note what is known after this point."""
        nulls: list[Tensor] = []
        if self.point == 0:
            nulls.append(self._null(hooks_map=self.hooks.map_at(Site(SiteKind.EMBED))))
            # Rows of the position tables are writes without a hook of their own.
            if self.layout.positions:
                nulls.append(self._null(hooks_map=identity(self.layout.hidden)))
        for branch in self.writes:
            if branch.norm_out is None:
                nulls.append(self._null(hooks_map=self.hooks.map_at(branch.output_site)))
            else:
                nulls.append(self._behind_norm(branch, nulling=nulling))
        for rows in nulls:
            self.known = self.known.meet(rows)
        self.known = self.known.shifted(self.settled())

    def settled(self) -> Tensor:
        """Return the constant of this point, zero where its terms cancel to rounding."""
        if float(self.constant.abs().max()) <= tolerance(self.layout.hidden) * self.scale:
            return torch.zeros_like(self.constant)
        return self.constant

    def _null(self, *, hooks_map: AffineMap) -> Tensor:
        return self.linear.after(hooks_map.without_bias()).left_null()

    def _behind_norm(self, branch: Branch, *, nulling: bool) -> Tensor:
        """Return what vanishes on a write that ends in a norm, where no linear map folds."""
        nothing = self.constant.new_zeros(0, self.layout.hidden)
        left, right = self.linear.delta_factors()
        if left.shape[1] == 0:
            return nothing
        projector = float((left + right.T).abs().max()) <= tolerance(self.layout.hidden)
        if nulling and projector:
            self.result.nulling[self.point] = self.linear
            self.result.nulled |= {hook.edit for hook in self.applied}
            return right
        norm = branch.norm_out
        assert norm is not None
        reason = (
            f"{branch.live} writes through {norm.live}, and a projection does not pass through a "
            "norm with a gain"
        )
        remedy = 'edit the modules\' outputs (at = ["attn_out.*", "mlp_out.*"]), which is exact'
        if projector:
            remedy += (
                ', or allow = ["nulling"]: the direction leaves the stream, but every write is '
                "rescaled"
            )
        for hook in self.applied:
            self.result.failures.append(Failure(hook.edit, hook.site, reason, remedy))
        return nothing


def _obstacle(layout: Layout, point: int, turn: AffineMap) -> str | None:
    """Return why the stream before a point cannot live in a turned frame, if so."""
    ones = torch.ones(layout.hidden, dtype=torch.float64)
    image = turn.linear(ones)
    centred = min(float((image - ones).abs().max()), float((image + ones).abs().max()))
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


def _refusal(layout: Layout, point: int, map_: AffineMap) -> tuple[str, str]:
    """Return reason and remedy for a hook that folds in neither way."""
    if _orthogonal(map_):
        reason = "an orthogonal map turns everything before it, but "
        reason += str(_obstacle(layout, point, map_))
        remedy = "edit module outputs (attn_out, mlp_out) or norm outputs (ln1_out, ln2_out)"
    elif map_.is_idempotent():
        before = layout.points[point - 1][0]
        reason = f"the skip path carries the edited component from {before} past this site, "
        reason += "and it has no weights"
        remedy = 'apply the edit at every stream site (at = "resid"), or at module outputs '
        remedy += '(at = ["attn_out.*", "mlp_out.*"]): both are exact, and both are other edits'
    else:
        reason = f"the map is not idempotent (A² − A = {map_.idempotence_error():.1e}): it changes "
        reason += "again what came through the skip path, which has no weights"
        remedy = "use strength 1 and an idempotent map at every stream site, or edit module "
        remedy += 'outputs (at = ["attn_out.*", "mlp_out.*"]), where any affine map is exact'
    return reason, remedy


def thin(map_: AffineMap) -> AffineMap:
    """Return the same map with the fewest factors: composed projections repeat theirs."""
    if isinstance(map_, LowRankMap):
        left, right = map_.delta_factors()
        return LowRankMap(left, right, map_.bias)
    return map_


def oblique(projector: AffineMap, gain: Float[Tensor, " d"]) -> LowRankMap:
    """Return D⁻¹ P D, D = diag(gain): what P does behind a norm, done before it up to a scale.

    Behind the norm D D⁻¹PD u = P D u: the direction of the write is that of the hooked one.
    """
    left, right = projector.delta_factors()
    return LowRankMap(left / gain.unsqueeze(1), right * gain, torch.zeros_like(gain))
