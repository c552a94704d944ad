"""Which writers can take a fitted update, and where its effect is seen."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from bake.affine import AffineMap
from bake.edits import Edit
from bake.families import Branch, Layout, Linear
from bake.sites import Site


@dataclass(frozen=True, slots=True)
class Place:
    """One writer of the stream, and the point behind it."""

    branch: Branch
    writer: Linear
    point: int
    """Index of the stream point that it writes to."""
    watch: str
    """Path of the module whose input is the stream at that point, edits included."""

    @property
    def site(self) -> Site:
        """The output of the writer, where an update of it stands."""
        return self.branch.output_site


def places_for(layout: Layout, hard: Sequence[Edit], kept: Sequence[Edit]) -> tuple[Place, ...]:
    """Return the writers at which the effect of edits can be made up for, in forward order.

    The first is the last writer at or before the first site that the edits touch; all later ones
    follow. Left out are experts (they are no single module), writers before a post-norm, and those
    whose output another edit maps, since what is fitted would be mapped as well.

    Args:
        layout: the model.
        hard: the edits without an exact fold.
        kept: the others.
    """
    first = min(_point(layout, site) for edit in hard for site in edit.sites)
    mapped = {
        Site(site.kind, site.layer)
        for edit in kept
        if isinstance(edit.map, AffineMap)
        for site in edit.sites
    }
    found = [
        place for branch in layout.branches if (place := _place(layout, branch, mapped)) is not None
    ]
    before = [place.point for place in found if place.point <= first]
    start = max(before, default=first)
    # Of two writers to one point (a parallel block) the last one stands for both.
    last = {place.point: place for place in found if place.point >= start}
    return tuple(last[point] for point in sorted(last))


def _point(layout: Layout, site: Site) -> int:
    """Return the stream point at or behind a site: the first that an edit there can change."""
    place = Site(site.kind, site.layer)
    for index, names in enumerate(layout.points):
        if place in names:
            return index
    return next(
        (branch.target for branch in layout.branches if branch.output_site.order >= place.order),
        len(layout.points) - 1,
    )


def _place(layout: Layout, branch: Branch, mapped: Set[Site]) -> Place | None:
    writer = branch.writer
    if branch.norm_out is not None or writer is None or writer.live is None:
        return None
    if mapped & {branch.output_site, *layout.points[branch.target]}:
        return None
    watch = _watch(layout, branch.target)
    return None if watch is None else Place(branch, writer, branch.target, watch)


def _watch(layout: Layout, point: int) -> str | None:
    if point == len(layout.points) - 1:
        return layout.final_norm.live
    readers = [b.norm_in for b in layout.branches if b.source == point]
    return readers[0].live if readers and readers[0] is not None else None
