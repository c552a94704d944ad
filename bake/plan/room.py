"""What edits without an exact fold may use of a model (dimensions, frames), and what they used."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bake.affine import AffineMap
from bake.families import Layout
from bake.plan.aside import Aside
from bake.plan.hooks import Hook, Hooks
from bake.plan.lowrank import thin_factors
from bake.plan.obstacles import holder, obstacle
from bake.plan.relocate import Carried, carried, null_rank
from bake.plan.stream_fold import Relocation
from bake.plan.wide_layout import may_widen

WIDEN = '; or allow = ["widen"], this edit but for what norms see of it (docs/relocation.md)'
RELOCATE = (
    '; or allow = ["relocate"{}], without new dimensions and with a few hundredths of it left '
    "(docs/relocation.md)"
)
APPROXIMATE = '; or allow = ["approximate"], which is fitted and measured (docs/approximate.md)'
SMALLEST = 2.0**-12
"""The least share of its size at which a component is carried: what reads it multiplies the
rounding of everything before by as much."""


@dataclass(slots=True, eq=False)
class Turn:
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


class Room:
    """What one walk along the stream may use, and has used."""

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
        self.turns: list[Turn] = []
        self.unused = relocation.fresh if relocation and relocation.fresh is not None else None
        self.unit = self.take(1) if relocation is not None and relocation.constants else None
        """Along it the embedding is the same for every token."""

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
        widen = WIDEN if may_widen(self.layout) else ""
        # In place a constant needs a bias slot, which a recast may give.
        slot = hook.map.is_linear() or holder(self.layout, point) is not None
        passes = obstacle(self.layout, point, found.forward) is None
        if self.relocation is not None or not passes or not (slot or self.layout.family.recasts):
            return widen
        return widen + RELOCATE.format("" if slot else ', "recast"')

    def relocate(self, hook: Hook, point: int) -> Turn | None:
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
        if found is None or obstacle(self.layout, point, found.forward) is not None:
            return None
        return Turn(hook, point, found.forward, found.back, found, number, rank)

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

    @property
    def taken(self) -> int:
        """How many fresh dimensions are in use."""
        if self.unused is None or self.relocation is None or self.relocation.fresh is None:
            return 0
        return len(self.relocation.fresh) - len(self.unused)
