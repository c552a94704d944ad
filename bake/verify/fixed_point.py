"""Whether an edit has nothing left to do in the baked model: h(x) = x where the hooks would act.

A plan that is nulling takes a direction out of the stream without computing the hooked function.
What it promises is that the baked model's activations are fixed points of the edit.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bake.affine import AffineMap
from bake.artifact.schema import FindingRecord
from bake.edits import Edit
from bake.sites import STREAM_KINDS, Site


def nulled(edits: Sequence[Edit], findings: Sequence[FindingRecord]) -> tuple[Edit, ...]:
    """Return the edits that the record says are nulling."""
    concepts = {
        (finding.kind, finding.concept) for finding in findings if finding.exactness == "nulling"
    }
    return tuple(edit for edit in edits if (str(edit.kind), edit.concept) in concepts)


def stream_sites(edits: Sequence[Edit]) -> tuple[Site, ...]:
    """Return the stream sites at which the edits stand, without repeats."""
    sites = (site for edit in edits for site in edit.sites if site.kind in STREAM_KINDS)
    return tuple(dict.fromkeys(sites))


def distance(edits: Sequence[Edit], streams: Mapping[Site, Tensor]) -> tuple[float, float]:
    """Return max |h(x) − x| over sites and tokens, and the largest norm ‖x‖ among them."""
    farthest, scale = 0.0, 0.0
    for map_, site in _maps(edits, streams):
        x = streams[site].to(torch.float64)
        farthest = max(farthest, float((map_(x) - x).abs().max()))
        scale = max(scale, float(x.norm(dim=-1).max()))
    return farthest, scale


def apart(
    edits: Sequence[Edit], streams: Mapping[Site, Tensor], others: Mapping[Site, Tensor]
) -> float:
    """Return by how much what the edits would do to two models' streams differs, anywhere."""
    farthest = 0.0
    for map_, site in _maps(edits, streams):
        x, y = (table[site].to(torch.float64) for table in (streams, others))
        farthest = max(farthest, float(((map_(x) - x) - (map_(y) - y)).abs().max()))
    return farthest


def _maps(
    edits: Sequence[Edit], streams: Mapping[Site, Tensor]
) -> Iterator[tuple[AffineMap, Site]]:
    for edit in edits:
        if isinstance(edit.map, AffineMap):
            yield from ((edit.map, site) for site in edit.sites if site in streams)
