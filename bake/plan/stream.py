"""Fold the edits of the residual stream: what each write must become, and in which frame.

Write y for the hooked stream and z for the baked one. At point p the hooked stream is
y_p = h_p(y_{p−1} + w_p), with h_p(x) = A x + b and w_p the write between the points. The skip path
has no weights, so the baked stream is z_p = z_{p−1} + w'_p. Let the streams agree up to an isometry
that every norm passes through, y_p = T_p z_p. Then w'_p = T_pᵀ(A w_p + b) + (T_pᵀ A T_{p−1} − I) z,
and the last term must not depend on the token. There are two ways:

1. A − I acts only on functionals of y_{p−1} that are constant (``Known``), because a hook or a
   write before left them so. The constant goes into a bias. A translation is the case A = I.
2. A is orthogonal, and T_{p−1} = AᵀT_p: everything before p lives in a turned frame.

Where neither is there, and the recipe allows a wider model, a gated layer before p computes
(A − I) y_{p−1} (``bake.plan.quotient``). Of several hooks at p frames may carry C and such a layer
compute the rest, A − C. Without one, the stream before p lives in a frame that is
no isometry, T_{p−1} = Ã⁻¹T_p with an Ã that stands for A (``bake.plan.relocate``). Then the norms
before p see another length, and in place a part of the edit is left behind p, which readers that
find the edited component known to be zero leave out. Where norms stand behind the writers, the
stream after p is read in another frame instead (``bake.plan.aside``).

A constant that no bias takes is read from one more dimension, which the embedding sets: then
y_p = T_p z_p + C_p, with C_p the sum of such constants up to p.
"""

import math

import torch
from torch import Tensor

from bake.affine import AffineMap, LowRankMap, chain, identity
from bake.families import Layout
from bake.plan.hooks import Hooks
from bake.plan.lowrank import balanced, thin_factors
from bake.plan.quotient import Computed
from bake.plan.relocate import stretch
from bake.plan.room import SMALLEST, Room
from bake.plan.stream_fold import Failure, Fold, Relocated, Relocation, StreamFold
from bake.plan.stream_point import Point

UNNOTICED = 2.0**-8
"""Of the largest constant, what the embedding sets a dimension to: its energy counts 2⁻¹⁶ of it."""
SETTLED = 1e-9
"""Of the constants before it, what a known value that is zero may be by rounding."""


def fold_stream(
    layout: Layout, hooks: Hooks, *, nulling: bool, relocation: Relocation | None = None
) -> StreamFold:
    """Return how every write changes so that the baked stream follows the hooked one.

    Args:
        layout: the model.
        hooks: its edits.
        nulling: whether a projection behind a post-norm may be nulled.
        relocation: how an edit without an exact fold may be relocated; None refuses it.
    """
    found = _Walk(layout, hooks, nulling, relocation, frozenset())
    # A norm's bias, too, passes what its readers leave out.
    closed = layout.final_norm.bias is not None
    if relocation is None or relocation.fresh is not None or closed or not found.cleared:
        return found.folded(frozenset())
    # What is left is left out by everybody, and the component need not be carried as small.
    cleared = frozenset(found.cleared)
    return _Walk(layout, hooks, nulling, relocation, cleared).folded(cleared)


def most_fresh(layout: Layout, hooks: Hooks) -> int:
    """Return how many fresh dimensions edits of the stream take at most."""
    found = [hook for sites in layout.points for hook in hooks.at(*sites)]
    ranks = sum(thin_factors(hook.map)[0].shape[1] for hook in found)
    return 2 * ranks if any(branch.norm_out for branch in layout.branches) else ranks


class _Walk:
    """One pass over the points, and what it found."""

    def __init__(
        self,
        layout: Layout,
        hooks: Hooks,
        nulling: bool,
        relocation: Relocation | None,
        small: frozenset[int],
    ) -> None:
        self.layout = layout
        self.room = Room(layout, hooks, relocation, small)
        self.result = StreamFold(least=1.0 if relocation is None else relocation.least)
        self.steps: list[Point] = []
        self.cleared: list[int] = []
        for sites in layout.points:
            step = Point(self.room, self.result, self.steps[-1] if self.steps else None)
            for hook in hooks.at(*sites):
                step.apply(hook)
            step.close(nulling=nulling)
            self.steps.append(step)
        self._look_back()

    def _look_back(self) -> None:
        """Note which relocations leave nothing that a reader behind them would see."""
        for turn in self.room.turns:
            if turn.carried is None:
                continue
            _, rows = thin_factors(turn.hook.map)
            behind = self.steps[turn.point :]
            if all(_is_zero(step.known.constant(rows), step.scale) for step in behind):
                self.cleared.append(turn.number)

    def folded(self, cleared: frozenset[int]) -> StreamFold:
        """Return what becomes of every point: T_last = 1, and T_{p−1} = Ã_p⁻¹ T_p."""
        layout = self.layout
        frame: AffineMap = identity(layout.hidden)
        inverse: AffineMap = identity(layout.hidden)
        turned_by = frozenset[int]()
        turns = {turn.hook: turn for turn in self.room.turns}
        for step in reversed(self.steps):
            edits = frozenset(hook.edit for hook in step.applied)
            clearing = [t for t in self.room.turns if t.number in cleared and t.point <= step.point]
            apart = [t.hook.map.without_bias() for t in clearing]
            seen = chain([frame, *apart, step.aside.seen, self._constants(step)], layout.hidden)
            by = frozenset(turn.hook.edit for turn in clearing) | step.aside_by | step.moved_by
            constant = step.settled()
            if step.point == 0 and self.room.unit is not None:
                constant = constant + self._size() * self.room.unit[0]
                edits |= self.steps[-1].moved_by.union(*(s.computed_by for s in self.steps))
            fold = Fold(
                step.linear,
                constant,
                seen,
                inverse,
                edits,
                turned_by,
                by,
                step.before,
                step.before_by,
            )
            self.result.folds.insert(0, fold)
            for hook in reversed(step.turning):
                frame = turns[hook].back.after(frame)
                inverse = inverse.after(turns[hook].forward)
            turned_by |= {hook.edit for hook in step.turning}
        for turn in self.room.turns:
            if turn.carried is not None:
                done = turn.number in cleared
                self.result.relocated.append(Relocated(turn.hook, turn.carried, done, turn.fresh))
        self.result.taken = self.room.taken
        self.result.size = 0.0 if self.room.unit is None else self._size()
        made = {step.point: self._computed(step) for step in self.steps if step.computed_by}
        self.result.computed = {point: one for point, one in made.items() if one.count}
        self._check_stretch(inverse)
        return self.result

    def _size(self) -> float:
        """Return what the embedding sets one dimension to, where that is read."""
        assert self.room.relocation is not None
        largest = max(float(step.moved.norm()) for step in self.steps)
        if self.room.relocation.gate is not None:
            read = largest or any(step.computed_by for step in self.steps)
            return self.room.relocation.size if read else 0.0
        # A power of two, whose energy is 2⁻¹⁶ of that of the largest constant.
        return 2.0 ** round(math.log2(largest)) * UNNOTICED if largest else 0.0

    def _computed(self, step: Point) -> Computed:
        """Return what a gated layer adds to a point, in the frames before and behind it."""
        assert self.room.unit is not None and self.room.relocation is not None
        assert self.room.relocation.gate is not None
        before, behind = self.result.folds[step.point - 1], self.result.folds[step.point]
        one = self.room.unit[0] / self._size()
        left, right = step.beside.left, step.beside.right
        # What adds the constant as well: [L c] [R; 1], with as few columns as they span.
        whole = LowRankMap(
            torch.cat([left, step.added.unsqueeze(1)], dim=1),
            torch.cat([right, one.unsqueeze(0)]),
            torch.zeros_like(step.added),
        )
        left, right = balanced(whole)
        return Computed(
            behind.inverse.linear(left.T).T,
            before.seen.adjoint(right),
            before.seen.adjoint(one),
            self.room.relocation.gate,
            step.computed_by,
        )

    def _constants(self, step: Point) -> AffineMap:
        """Return what adds the constants up to a point, read from the embedding."""
        if self.room.unit is None or not bool(step.moved.any()):
            return identity(self.layout.hidden)
        zeros = torch.zeros_like(step.moved)
        return LowRankMap(step.moved.unsqueeze(1) / self._size(), self.room.unit, zeros)

    def _check_stretch(self, inverse: AffineMap) -> None:
        """Refuse what would have to be carried so small that no storage type holds it."""
        if not self.result.relocated:
            return
        least, _ = stretch(inverse)
        if least >= SMALLEST:
            return
        reason = f"the edits together shrink a component of the stream to {least:.0e} of its size"
        remedy = 'allow = ["widen"], or edit module outputs, where any affine map is exact'
        for one in self.result.relocated:
            self.result.failures.append(Failure(one.hook.edit, one.hook.site, reason, remedy))


def _is_zero(values: Tensor | None, scale: float) -> bool:
    if values is None:
        return False
    return not values.numel() or float(values.abs().max()) <= SETTLED * max(1.0, scale)
