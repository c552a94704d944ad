"""One point of the stream: its hooks, one after another, and what is known behind them."""

from dataclasses import replace

import torch
from torch import Tensor

from bake.affine import AffineMap, LowRankMap, identity, tolerance
from bake.families import Branch
from bake.plan.aside import Aside
from bake.plan.hooks import Hook
from bake.plan.known import Known
from bake.plan.lowrank import balanced, thin_factors
from bake.plan.obstacles import (
    MODULES,
    WITHOUT_CONSTANT,
    fold_at_modules,
    holder,
    obstacle,
    orthogonal,
    refusal,
)
from bake.plan.quotient import MOST, computing
from bake.plan.room import Room, Turn
from bake.plan.stream_fold import Constant, Failure, StreamFold
from bake.sites import Site, SiteKind


class Point:
    """The state of the walk at one point: y = s + A w + k, s the skip path, w the writes."""

    def __init__(self, room: Room, result: StreamFold, last: "Point | None") -> None:
        layout, hooks = room.layout, room.hooks
        self.layout, self.hooks, self.room, self.result = layout, hooks, room, result
        self.point: int = 0 if last is None else last.point + 1
        zeros = torch.zeros(layout.hidden, dtype=torch.float64)
        self.known: Known = Known(None, None) if last is None else last.known
        self.aside: Aside = Aside.nothing(layout.hidden) if last is None else last.aside
        self.aside_by: frozenset[int] = frozenset() if last is None else last.aside_by
        self.before, self.before_by = self.aside, self.aside_by
        self.moved: Tensor = zeros if last is None else last.moved
        """The sum of all constants up to here that are read from the embedding."""
        self.moved_by: frozenset[int] = frozenset() if last is None else last.moved_by
        self.writes = [branch for branch in layout.branches if branch.target == self.point]
        self.linear: AffineMap = identity(layout.hidden)
        self.constant = zeros
        # subtle: what is known of the stream carries the rounding of every constant before it, so
        # zero is judged against the largest of them all, not of this point alone.
        self.scale: float = 0.0 if last is None else last.scale
        self.applied: list[Hook] = []
        self.turning: list[Hook] = []
        self.carried: AffineMap = identity(layout.hidden)
        """What frames make of the skip path."""
        nothing = zeros.new_zeros(layout.hidden, 0)
        self.beside = LowRankMap(nothing, nothing.T, zeros)
        """1 + L R, of which a gated layer adds L R of the stream before to what frames carry."""
        self.added = zeros
        """The constant that it adds."""
        self.computed_by = frozenset[int]()
        if self.point == 0:
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
        fixed, forward = self.known.constant(right), hook.map.without_bias()
        if left.shape[1] and self.room.ends_in_norms(self.point):
            self._put_aside(hook)
            return
        added = [hook.map.bias]
        if fixed is not None:
            added.append(left @ fixed)
        elif self._turns(hook):
            functionals = self.known.functionals
            assert functionals is not None
            self.known = self.known.turned(hook.map.linear(functionals))
            self._turn(Turn(hook, self.point, forward, forward.transpose(), None, -1, 0))
        elif self._may_compute(hook):
            self.known = self.known.through(forward)
            self._compute(hook)
        elif (turn := self.room.relocate(hook, self.point)) is not None:
            assert turn.carried is not None
            self.known = self.known.through(forward)
            self._turn(turn)
            added = [turn.carried.constant]
        else:
            self._refuse(hook)
            return
        self.constant = hook.map.linear(self.constant)
        for term in added:
            self._add(term)
        self.linear = forward.after(self.linear)
        self.applied.append(hook)

    def _put_aside(self, hook: Hook) -> None:
        """Leave a hook to readers behind it, since writers end in norms."""
        aside = self.room.put_aside(hook, self.point, self.aside)
        if aside is None:
            self._refuse(hook)
            return
        self.aside, self.aside_by = aside, self.aside_by | {hook.edit}
        self.result.aside.append(hook)
        self.known = self.known.through(hook.map.without_bias())
        self.constant = hook.map.linear(self.constant)
        self._add(hook.map.bias)
        self.moved = hook.map.linear(self.moved)

    def _turns(self, hook: Hook) -> bool:
        """Whether the stream before may live in a turned frame that every norm passes."""
        return orthogonal(hook.map) and obstacle(self.layout, self.point, hook.map) is None

    def _may_compute(self, hook: Hook | None = None) -> bool:
        """Whether a gated layer can compute an edit of what the skip path carries here."""
        branch = computing(self.layout, self.point)
        if branch is None or branch.norm_in is None:
            return False
        rank = self.beside.left.shape[1]
        rank += 0 if hook is None else thin_factors(hook.map)[0].shape[1]
        thin = rank <= MOST and not self.hooks.edits_at(branch.norm_in.site)
        return thin and self.room.may_compute()

    def _refuse(self, hook: Hook) -> None:
        reason, remedy = refusal(self.layout, self.point, hook.map)
        remedy += self.room.offers(hook, self.point)
        self.result.failures.append(Failure(hook.edit, hook.site, reason, remedy))

    def _turn(self, turn: Turn) -> None:
        """Leave a hook to the frame before this point."""
        map_, beside = turn.hook.map.without_bias(), self.beside
        self.room.turns.append(turn)
        self.turning.append(turn.hook)
        self.carried, self.moved = map_.after(self.carried), map_.linear(self.moved)
        self.beside = replace(beside, left=map_.linear(beside.left.T).T)

    def _compute(self, hook: Hook) -> None:
        """Leave a hook to a gated layer: L r of what the hooks before it make of the skip path."""
        (left, right), beside = thin_factors(hook.map), self.beside
        seen = self.carried.adjoint(right) + right @ beside.left @ beside.right
        whole = torch.cat([beside.left, left], dim=1), torch.cat([beside.right, seen])
        left, right = balanced(replace(beside, left=whole[0], right=whole[1]))
        self.beside = replace(beside, left=left, right=right)
        self.computed_by |= {hook.edit}

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
        self._move_constant()

    def _move_constant(self) -> None:
        """Leave the constant of this point to its readers, where no bias takes it."""
        constant = self.settled()
        if self.point == 0 or self.room.relocation is None or not bool(constant.any()):
            return
        sites = *self.layout.points[self.point], *(b.output_site for b in self.writes)
        edits = self.hooks.edits_at(*sites)
        edits = edits & self.hooks.of_constants or edits
        slotless = holder(self.layout, self.point) is None and self.room.relocation.constants
        if self.computed_by or (slotless and self._may_compute()):
            self.added, self.computed_by = constant, self.computed_by | edits
            self.constant = torch.zeros_like(constant)
            return
        if not slotless or self.room.unit is None:
            return
        self.moved, self.moved_by = self.moved + constant, self.moved_by | edits
        self.result.constants.append(Constant(edits, sites[0], float(constant.norm())))
        self.constant = torch.zeros_like(constant)

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
        for hook in self.applied:
            offers = self.room.offers(hook, self.point)
            ways = [f"edit {MODULES}, which is exact"] * fold_at_modules(self.layout, hook.map)
            if projector:
                ways.append(
                    'allow = ["nulling"]: the direction leaves the stream, but every write is '
                    "rescaled"
                )
            remedy = (", or ".join(ways) or WITHOUT_CONSTANT) + offers
            self.result.failures.append(Failure(hook.edit, hook.site, reason, remedy))
        return nothing
