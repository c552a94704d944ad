"""``Hooks``: the edits of a recipe sorted by the place at which each of them fires."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bake.affine import AffineMap, chain
from bake.edits import Edit, WeightUpdate
from bake.errors import DirectionError, UsageError
from bake.families import Layout
from bake.sites import STREAM_KINDS, Site, SiteKind


@dataclass(frozen=True, slots=True, eq=False)
class Hook:
    """One edit at one of its sites."""

    edit: int
    """Index of the edit in the recipe."""
    site: Site
    map: AffineMap


class Hooks:
    """Every edit at every site, in the order in which hooks fire: by place, then as listed."""

    def __init__(self, edits: Sequence[Edit], layout: Layout) -> None:
        self._maps: defaultdict[Site, list[Hook]] = defaultdict(list)
        self._updates: defaultdict[Site, list[tuple[int, WeightUpdate]]] = defaultdict(list)
        self._layout = layout
        self.of_weights: frozenset[int] = frozenset()
        """The edits that do more than add a constant."""
        self.of_constants: frozenset[int] = frozenset()
        """The edits that add a constant."""
        self.closed: list[tuple[int, Site]] = []
        """Edits of the stream where no weights compute one, with their sites."""
        for index, edit in enumerate(edits):
            if not edit.sites:
                raise UsageError(f"the {edit.kind} edit {edit.concept!r} names no site")
            if not isinstance(edit.map, AffineMap) or not edit.map.is_translation():
                self.of_weights |= {index}
            if isinstance(edit.map, AffineMap) and not edit.map.is_linear():
                self.of_constants |= {index}
            for site in edit.sites:
                place = Site(site.kind, site.layer)
                if isinstance(edit.map, WeightUpdate):
                    _check_update(edit.map, site, layout)
                    self._updates[place].append((index, self._whole(edit.map, site)))
                else:
                    assert isinstance(edit.map, AffineMap), "conditional edits are refused before"
                    _check_width(edit, site, layout)
                    if layout.family.stream.closed and site.kind in STREAM_KINDS:
                        self.closed.append((index, site))
                        continue
                    self._maps[place].append(Hook(index, site, edit.map))

    def at(self, *sites: Site) -> list[Hook]:
        """Return the hooks at places that are reached one after another."""
        return [hook for site in sites for hook in self._maps.get(site, ())]

    def of(self, edits: frozenset[int]) -> list[Hook]:
        """Return every hook of some edits, by place."""
        return [hook for hooks in self._maps.values() for hook in hooks if hook.edit in edits]

    def map_at(self, site: Site) -> AffineMap:
        """Return the composed map at one place; per-head maps act on their slice."""
        width = self._layout.width(site)
        maps = [
            hook.map
            if hook.site.head is None
            else hook.map.scatter(self._channels(hook.site), width)
            for hook in self.at(site)
        ]
        return chain(maps, width)

    def edits_at(self, *sites: Site) -> frozenset[int]:
        """Return the indices of the edits that act at some places."""
        return frozenset(hook.edit for hook in self.at(*sites)) | {
            index for site in sites for index, _ in self._updates.get(site, ())
        }

    def updates_at(self, site: Site) -> tuple[WeightUpdate, ...]:
        """Return the weight updates that name a place."""
        return tuple(update for _, update in self._updates.get(site, ()))

    def _whole(self, update: WeightUpdate, site: Site) -> WeightUpdate:
        """Return an update of one head as one of all heads' weight."""
        if site.head is None:
            return update
        width = self._layout.width(Site(site.kind, site.layer))
        left = update.left.new_zeros(width, update.left.shape[1])
        channels = self._channels(site)
        return WeightUpdate(left.index_copy(0, channels, update.left), update.right)

    def _channels(self, site: Site) -> Tensor:
        """Return which channels of a site are those of its head."""
        assert site.head is not None
        size = self._layout.width(site)
        return torch.arange(size * site.head, size * (site.head + 1))


def _check_width(edit: Edit, site: Site, layout: Layout) -> None:
    assert isinstance(edit.map, AffineMap)
    width = layout.width(site)
    if edit.map.width != width:
        raise DirectionError(
            f"the direction {edit.concept!r} has width {edit.map.width}, but {site} has {width}",
            fix="fit it on this model, or name the site that it was fitted at",
        )


def _check_update(update: WeightUpdate, site: Site, layout: Layout) -> None:
    width, place = layout.width(site), Site(site.kind, site.layer)
    for branch in layout.branches:
        if site == branch.output_site:
            if branch.writer is None:
                count = sum(linear.experts or 1 for linear in branch.writes)
                raise UsageError(f"an update at {site} names no single weight: it has {count}")
            _check_shape(update, site, width, branch.writer.inputs)
            return
        for linear in branch.reads:
            if any(part.site == place for part in linear.parts):
                _check_shape(update, site, width, layout.hidden)
                return
    kinds = [SiteKind.ATTN_OUT, SiteKind.MLP_OUT, SiteKind.Q, SiteKind.K, SiteKind.V]
    raise UsageError(
        f"an update cannot stand at {site}",
        why="it changes a weight, and no weight writes this site alone"
        if site.kind in STREAM_KINDS
        else None,
        fix=f"name one of {', '.join([*kinds, SiteKind.MLP_GATE, SiteKind.MLP_UP])}",
    )


def _check_shape(update: WeightUpdate, site: Site, outer: int, inner: int) -> None:
    have = (update.left.shape[0], update.right.shape[1])
    if have != (outer, inner):
        raise DirectionError(
            f"the update at {site} is {list(have)}, but the weight is {[outer, inner]}",
            why="an update is [outputs, inputs] of the layer, whatever way it is stored",
        )
