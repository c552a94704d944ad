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
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, LowRankMap, chain, identity, tolerance
from bake.families import Branch, Layout
from bake.plan.aside import Aside
from bake.plan.hooks import Hook, Hooks
from bake.plan.known import Known
from bake.plan.lowrank import thin_factors
from bake.plan.quotient import MOST, Computed, Gate, computing
from bake.plan.relocate import Carried, carried, null_rank, stretch
from bake.sites import Site, SiteKind

WIDEN = '; or allow = ["widen"], this edit but for what norms see of it (docs/relocation.md)'
RELOCATE = (
    '; or allow = ["relocate"{}], without new dimensions and with a few hundredths of it left '
    "(docs/relocation.md)"
)
MODULES = 'module outputs (at = ["attn_out.*", "mlp_out.*"])'
WITHOUT_CONSTANT = f"leave the constant out, and edit {MODULES}: another edit"
APPROXIMATE = '; or allow = ["approximate"], which is fitted and measured (docs/approximate.md)'
UNNOTICED = 2.0**-8
"""Of the largest constant, what the embedding sets a dimension to: its energy counts 2⁻¹⁶ of it."""
SETTLED = 1e-9
"""Of the constants before it, what a known value that is zero may be by rounding."""
SMALLEST = 2.0**-12
"""The least share of its size at which a component is carried: what reads it multiplies the
rounding of everything before by as much."""


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
    seen: AffineMap
    """What readers take for y: T z, without what an edit was to remove and left."""
    inverse: AffineMap
    """T⁻¹, with z = T⁻¹ y; it acts last on what is written."""
    edits: frozenset[int]
    """The edits that A and the constant come from, but for component hooks."""
    turned_by: frozenset[int]
    """The edits that T comes from, all of them at later points."""
    cleared_by: frozenset[int]
    """Edits at this point or before, of which readers leave out what was left, or which they
    apply."""
    aside: Aside
    """What a writer into the point that ends in a norm becomes."""
    aside_by: frozenset[int]
    """The edits that this comes from."""


@dataclass(frozen=True, slots=True)
class Relocation:
    """How an edit without an exact fold is to be relocated.

    Attributes:
        place: α where a part of the edit is left behind it.
        free: α where nothing is.
        fresh: unit vectors, [m, d], along which the stream is zero everywhere.
        least: ε, at which a writer keeps something beside what its norm is to see.
        constants: whether a constant that no bias takes is read from the embedding.
        gate: what gated layers compute edits with; None where they cannot.
        size: δ, what the embedding sets one more dimension to where gated layers read it.
    """

    place: float
    free: float
    fresh: Float[Tensor, "m d"] | None = None
    least: float = 1.0
    constants: bool = False
    gate: Gate | None = None
    size: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Relocated:
    """One hook that was relocated."""

    hook: Hook
    carried: Carried
    cleared: bool
    """Whether what it leaves is left out by all readers behind it."""
    fresh: int
    """How many fresh dimensions it takes."""


@dataclass(slots=True)
class StreamFold:
    """The folded stream: one ``Fold`` a point, and what could not be folded."""

    folds: list[Fold] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    nulling: dict[int, AffineMap] = field(default_factory=dict)
    """For a point behind a post-norm, the projector that the write is to be cleared of."""
    nulled: set[int] = field(default_factory=set)
    """Edits that are nulled where they cannot be exact."""
    relocated: list[Relocated] = field(default_factory=list)
    """Hooks that are relocated where they cannot be exact."""
    aside: list[Hook] = field(default_factory=list)
    """Hooks that readers behind them apply, since writers cannot."""
    constants: list["Constant"] = field(default_factory=list)
    """What is read from a dimension of the embedding."""
    computed: dict[int, Computed] = field(default_factory=dict)
    """What a gated layer adds to a point."""
    size: float = 0.0
    """What the embedding sets that dimension to, zero where nothing reads it."""
    least: float = 1.0
    """ε of the writers before norms."""
    taken: int = 0
    """How many fresh dimensions are in use."""

    def is_relocated(self) -> bool:
        """Whether the norms see another length than that of the hooked stream."""
        return bool(self.relocated or self.aside or self.constants or self.computed)

    @property
    def neurons(self) -> int:
        """How many neurons gated layers need besides their own."""
        return max((one.count for one in self.computed.values()), default=0)

    def relocated_edits(self) -> frozenset[int]:
        """Return the edits that make it so."""
        hooks = (*(one.hook for one in self.relocated), *self.aside)
        constants = (edits for one in self.constants for edits in one.edits)
        computed = (edits for one in self.computed.values() for edits in one.edits)
        return frozenset({*(hook.edit for hook in hooks), *constants, *computed})


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant that enters the stream at a point and is in no bias."""

    edits: frozenset[int]
    site: Site
    size: float
    """Its length."""


@lru_cache(maxsize=64)
def _orthogonal(map_: AffineMap) -> bool:
    return map_.is_orthogonal()


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
    found = _walked(layout, hooks, nulling, relocation, frozenset())
    # A norm's bias, too, passes what its readers leave out.
    closed = layout.final_norm.bias is not None
    if relocation is None or relocation.fresh is not None or closed or not found.cleared:
        return found.folded(frozenset())
    # What is left is left out by everybody, and the component need not be carried as small.
    cleared = frozenset(found.cleared)
    return _walked(layout, hooks, nulling, relocation, cleared).folded(cleared)


def most_fresh(layout: Layout, hooks: Hooks) -> int:
    """Return how many fresh dimensions edits of the stream take at most."""
    found = [hook for sites in layout.points for hook in hooks.at(*sites)]
    ranks = sum(thin_factors(hook.map)[0].shape[1] for hook in found)
    return 2 * ranks if any(branch.norm_out for branch in layout.branches) else ranks


def _walked(
    layout: Layout,
    hooks: Hooks,
    nulling: bool,
    relocation: Relocation | None,
    cleared: frozenset[int],
) -> "_Walk":
    walk = _Walk(layout, hooks, relocation, cleared)
    for point, sites in enumerate(layout.points):
        step = _Point(walk, point)
        for hook in hooks.at(*sites):
            step.apply(hook)
        step.close(nulling=nulling)
        walk.known, walk.scale = step.known, step.scale
        walk.moved, walk.moved_by = step.moved, step.moved_by
        walk.aside, walk.aside_by = step.aside, step.aside_by
        walk.steps.append(step)
    walk.look_back()
    return walk


@dataclass(slots=True, eq=False)
class _Turn:
    """One hook that turns the stream before it."""

    hook: Hook
    point: int
    forward: AffineMap
    back: AffineMap
    carried: Carried | None
    """None for an isometry, which leaves nothing and hides nothing from a norm."""
    number: int
    """Of the relocations."""
    fresh: int


class _Walk:
    """One pass over the points, and what it found."""

    def __init__(
        self,
        layout: Layout,
        hooks: Hooks,
        relocation: Relocation | None,
        small: frozenset[int],
    ) -> None:
        self.layout, self.hooks, self.relocation = layout, hooks, relocation
        self.small = small
        """Numbers of the relocations of which an earlier pass found that nothing is left."""
        self.result = StreamFold()
        self.known, self.scale = Known(None, None), 0.0
        self.steps: list[_Point] = []
        self.turns: list[_Turn] = []
        self.cleared: list[int] = []
        self.result.least = 1.0 if relocation is None else relocation.least
        self.unused = relocation.fresh if relocation and relocation.fresh is not None else None
        self.unit = self.take(1) if relocation is not None and relocation.constants else None
        """Along it the embedding is the same for every token."""
        self.moved = torch.zeros(layout.hidden, dtype=torch.float64)
        """The sum of all constants that are read from there, up to the walk's point."""
        self.moved_by = frozenset[int]()
        self.aside, self.aside_by = Aside.nothing(layout.hidden), frozenset[int]()

    def may_compute(self) -> bool:
        """Whether there are gated layers, and a dimension for what they read."""
        if self.relocation is None or self.relocation.gate is None:
            return False
        self.unit = self.take(1) if self.unit is None else self.unit
        return self.unit is not None

    def take(self, count: int) -> Tensor | None:
        """Return some fresh dimensions, or None where there are no such many left."""
        if self.unused is None or len(self.unused) < count:
            return None
        taken, self.unused = self.unused[:count], self.unused[count:]
        return taken

    def offers(self, hook: Hook, point: int) -> str:
        """Return what the plan would accept in place of a fold, if that were allowed."""
        ways = self._relocations(hook, point)
        if any(b.norm_out is None and b.writer is not None for b in self.layout.branches):
            ways += APPROXIMATE  # a stand-in needs a writer that takes an update
        return ways

    def _relocations(self, hook: Hook, point: int) -> str:
        """Return how the edit could be relocated; of a full map none asks."""
        if 4 * thin_factors(hook.map)[0].shape[1] > self.layout.hidden:
            return ""  # its eigenvalues take longer than the plan
        found = carried(hook.map, SMALLEST)
        if found is None or self.unused is not None:
            return ""
        widen = WIDEN if self.layout.family.widen is not None else ""
        # In place a constant needs a bias slot, which a recast may give.
        slot = hook.map.is_linear() or holder(self.layout, point) is not None
        passes = _obstacle(self.layout, point, found.forward) is None
        if self.relocation is not None or not passes or not (slot or self.layout.family.recasts):
            return widen
        return widen + RELOCATE.format("" if slot else ', "recast"')

    def relocate(self, hook: Hook, point: int) -> _Turn | None:
        """Return what stands for a hook on the skip path, or None where nothing may."""
        ways = self.relocation
        if ways is None:
            return None
        number = sum(turn.carried is not None for turn in self.turns)
        free = ways.fresh is not None or number in self.small
        scale = ways.free if free else ways.place
        fresh, rank = None, 0
        if ways.fresh is not None:
            rank = null_rank(hook.map, scale)
            fresh = self.take(rank)
            if fresh is None:
                return None
        found = carried(hook.map, scale, fresh)
        if found is None or _obstacle(self.layout, point, found.forward) is not None:
            return None
        return _Turn(hook, point, found.forward, found.back, found, number, rank)

    def ends_in_norms(self, point: int) -> bool:
        """Whether edits at a point are left to readers behind it, since writers end in norms."""
        if self.unused is None:
            return False
        return any(b.norm_out is not None for b in self.layout.branches if b.target <= point)

    def put_aside(self, hook: Hook, point: int, aside: Aside) -> Aside | None:
        """Return what becomes of the stream behind one more edit, or None for want of room."""
        lasting = point + 1 < len(self.layout.points) and not self._again(hook, point)
        place = self.take(thin_factors(hook.map)[0].shape[1] if lasting else 0)
        if place is None:
            return None
        found = aside.after(hook.map, place)
        spare = self.take(found.removes - len(found.spare))
        return None if spare is None else replace(found, spare=torch.cat([found.spare, spare]))

    def _again(self, hook: Hook, point: int) -> bool:
        """Whether the same projection acts at the next point, and nothing does in between."""
        here, there = (self.hooks.at(*self.layout.points[p]) for p in (point, point + 1))
        alone = here[-1] is hook and bool(there) and there[0].map is hook.map
        return alone and hook.map.is_idempotent()

    def look_back(self) -> None:
        """Note which relocations leave nothing that a reader behind them would see."""
        for turn in self.turns:
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
        turns = {turn.hook: turn for turn in self.turns}
        for step in reversed(self.steps):
            edits = frozenset(hook.edit for hook in step.applied)
            clearing = [t for t in self.turns if t.number in cleared and t.point <= step.point]
            apart = [t.hook.map.without_bias() for t in clearing]
            seen = chain([frame, *apart, step.aside.seen, self._constants(step)], layout.hidden)
            by = frozenset(turn.hook.edit for turn in clearing) | step.aside_by | step.moved_by
            constant = step.settled()
            if step.point == 0 and self.unit is not None:
                constant = constant + self._size() * self.unit[0]
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
        for turn in self.turns:
            if turn.carried is not None:
                done = turn.number in cleared
                self.result.relocated.append(Relocated(turn.hook, turn.carried, done, turn.fresh))
        if self.unused is not None and self.relocation is not None:
            assert self.relocation.fresh is not None
            self.result.taken = len(self.relocation.fresh) - len(self.unused)
        self.result.size = 0.0 if self.unit is None else self._size()
        made = {step.point: self._computed(step) for step in self.steps if step.computed_by}
        self.result.computed = {point: one for point, one in made.items() if one.count}
        self._check_stretch(inverse)
        return self.result

    def _size(self) -> float:
        """Return what the embedding sets one dimension to, where that is read."""
        assert self.relocation is not None
        largest = max(float(step.moved.norm()) for step in self.steps)
        if self.relocation.gate is not None:
            read = largest or any(step.computed_by for step in self.steps)
            return self.relocation.size if read else 0.0
        # A power of two, whose energy is 2⁻¹⁶ of that of the largest constant.
        return 2.0 ** round(math.log2(largest)) * UNNOTICED if largest else 0.0

    def _computed(self, step: "_Point") -> Computed:
        """Return what a gated layer adds to a point, in the frames before and behind it."""
        assert self.unit is not None and self.relocation is not None
        assert self.relocation.gate is not None
        before, behind = self.result.folds[step.point - 1], self.result.folds[step.point]
        one = self.unit[0] / self._size()
        left, right = step.beside.left, step.beside.right
        # What adds the constant as well: [L c] [R; 1], with as few columns as they span.
        whole = LowRankMap(
            torch.cat([left, step.added.unsqueeze(1)], dim=1),
            torch.cat([right, one.unsqueeze(0)]),
            torch.zeros_like(step.added),
        )
        left, right = _balanced(whole)
        return Computed(
            behind.inverse.linear(left.T).T,
            before.seen.adjoint(right),
            before.seen.adjoint(one),
            self.relocation.gate,
            step.computed_by,
        )

    def _constants(self, step: "_Point") -> AffineMap:
        """Return what adds the constants up to a point, read from the embedding."""
        if self.unit is None or not bool(step.moved.any()):
            return identity(self.layout.hidden)
        zeros = torch.zeros_like(step.moved)
        return LowRankMap(step.moved.unsqueeze(1) / self._size(), self.unit, zeros)

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


class _Point:
    """The state of the walk at one point: y = s + A w + k, s the skip path, w the writes."""

    def __init__(self, walk: _Walk, point: int) -> None:
        layout, hooks = walk.layout, walk.hooks
        self.layout, self.hooks, self.point, self.known = layout, hooks, point, walk.known
        self.walk, self.result = walk, walk.result
        self.aside, self.before = walk.aside, walk.aside
        self.aside_by, self.before_by = walk.aside_by, walk.aside_by
        self.moved, self.moved_by = walk.moved, walk.moved_by
        self.writes = [branch for branch in layout.branches if branch.target == point]
        self.linear: AffineMap = identity(layout.hidden)
        self.constant = torch.zeros(layout.hidden, dtype=torch.float64)
        # subtle: what is known of the stream carries the rounding of every constant before it, so
        # zero is judged against the largest of them all, not of this point alone.
        self.scale = walk.scale
        self.applied: list[Hook] = []
        self.turning: list[Hook] = []
        self.carried: AffineMap = identity(layout.hidden)
        """What frames make of the skip path."""
        nothing = self.constant.new_zeros(layout.hidden, 0)
        self.beside = LowRankMap(nothing, nothing.T, torch.zeros_like(self.constant))
        """1 + L R, of which a gated layer adds L R of the stream before to what frames carry."""
        self.added = torch.zeros_like(self.constant)
        """The constant that it adds."""
        self.computed_by = frozenset[int]()
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
        fixed, forward = self.known.constant(right), hook.map.without_bias()
        if left.shape[1] and self.walk.ends_in_norms(self.point):
            self._put_aside(hook)
            return
        added = [hook.map.bias]
        if fixed is not None:
            added.append(left @ fixed)
        elif self._turns(hook):
            functionals = self.known.functionals
            assert functionals is not None
            self.known = self.known.turned(hook.map.linear(functionals))
            self._turn(_Turn(hook, self.point, forward, forward.transpose(), None, -1, 0))
        elif self._may_compute(hook):
            self.known = self.known.through(forward)
            self._compute(hook)
        elif (turn := self.walk.relocate(hook, self.point)) is not None:
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
        aside = self.walk.put_aside(hook, self.point, self.aside)
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
        return _orthogonal(hook.map) and _obstacle(self.layout, self.point, hook.map) is None

    def _may_compute(self, hook: Hook | None = None) -> bool:
        """Whether a gated layer can compute an edit of what the skip path carries here."""
        branch = computing(self.layout, self.point)
        if branch is None or branch.norm_in is None:
            return False
        rank = self.beside.left.shape[1]
        rank += 0 if hook is None else thin_factors(hook.map)[0].shape[1]
        thin = rank <= MOST and not self.hooks.edits_at(branch.norm_in.site)
        return thin and self.walk.may_compute()

    def _refuse(self, hook: Hook) -> None:
        reason, remedy = _refusal(self.layout, self.point, hook.map)
        remedy += self.walk.offers(hook, self.point)
        self.result.failures.append(Failure(hook.edit, hook.site, reason, remedy))

    def _turn(self, turn: _Turn) -> None:
        """Leave a hook to the frame before this point."""
        map_, beside = turn.hook.map.without_bias(), self.beside
        self.walk.turns.append(turn)
        self.turning.append(turn.hook)
        self.carried, self.moved = map_.after(self.carried), map_.linear(self.moved)
        self.beside = replace(beside, left=map_.linear(beside.left.T).T)

    def _compute(self, hook: Hook) -> None:
        """Leave a hook to a gated layer: L r of what the hooks before it make of the skip path."""
        (left, right), beside = thin_factors(hook.map), self.beside
        seen = self.carried.adjoint(right) + right @ beside.left @ beside.right
        whole = torch.cat([beside.left, left], dim=1), torch.cat([beside.right, seen])
        left, right = _balanced(replace(beside, left=whole[0], right=whole[1]))
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
        if self.point == 0 or self.walk.relocation is None or not bool(constant.any()):
            return
        sites = *self.layout.points[self.point], *(b.output_site for b in self.writes)
        edits = self.hooks.edits_at(*sites)
        edits = edits & self.hooks.of_constants or edits
        slotless = holder(self.layout, self.point) is None and self.walk.relocation.constants
        if self.computed_by or (slotless and self._may_compute()):
            self.added, self.computed_by = constant, self.computed_by | edits
            self.constant = torch.zeros_like(constant)
            return
        if not slotless or self.walk.unit is None:
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
            offers = self.walk.offers(hook, self.point)
            ways = [f"edit {MODULES}, which is exact"] * fold_at_modules(self.layout, hook.map)
            if projector:
                ways.append(
                    'allow = ["nulling"]: the direction leaves the stream, but every write is '
                    "rescaled"
                )
            remedy = (", or ".join(ways) or WITHOUT_CONSTANT) + offers
            self.result.failures.append(Failure(hook.edit, hook.site, reason, remedy))
        return nothing


def holder(layout: Layout, point: int) -> Branch | None:
    """Return the branch whose writer's bias takes the constant of a stream point."""
    # The last writer before the site comes first: an MLP's bias rather than an attention's.
    for branch in reversed(layout.branches):
        if branch.target == point and branch.norm_out is None and branch.has_slot:
            return branch
    return None


def _obstacle(layout: Layout, point: int, turn: AffineMap) -> str | None:
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


def _refusal(layout: Layout, point: int, map_: AffineMap) -> tuple[str, str]:
    """Return reason and remedy for a hook that folds in neither way."""
    if _orthogonal(map_):
        reason = "an orthogonal map turns everything before it, but "
        reason += str(_obstacle(layout, point, map_))
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


def fold_at_modules(layout: Layout, map_: AffineMap) -> bool:
    """Return whether a map folds at the outputs of all modules: a constant needs bias slots."""
    return map_.is_linear() or all(branch.has_slot for branch in layout.branches)


def _balanced(map_: LowRankMap) -> tuple[Tensor, Tensor]:
    """Return the thin factors of a map that holds rows of different sizes, the left orthonormal."""
    basis, sizes, _ = torch.linalg.svd(map_.left, full_matrices=False)
    basis = basis[:, sizes > tolerance(map_.width) * float(sizes.max())]
    return basis, basis.T @ map_.left @ map_.right


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
