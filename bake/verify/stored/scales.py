"""Scales of a quantised weight that are larger than its planned values need.

A value is held against the planned one in steps of its own block. So a scale is a tolerance that an
artifact states itself, and may be no larger than the base's and than the planned values call for.
"""

import torch

from bake.checkpoints.planned import PlannedTensor
from bake.checkpoints.quantised.coded import Coded

_SLACK = 2.0**-20  # relative; quotients in float64, in another order


def needless(original: Coded, baked: Coded, planned: PlannedTensor) -> bool:
    """Whether a block has a larger scale than its base's and than any that reaches its values.

    Args:
        original: the weight in the base.
        baked: in the artifact.
        planned: the values [rows, columns] that it is to have.
    """
    was, have = original.scales.read(), baked.scales.read()
    if was.scale.shape != have.scale.shape:
        return True
    grown = have.scale.abs() > was.scale.abs()
    if not bool(grown.any()):
        return False
    need, levels = torch.zeros_like(have.scale), baked.levels
    for start, stop, exact in planned.spans():
        turned = exact * torch.where(have.at(have.scale, start, stop) < 0, -1.0, 1.0)
        zero = torch.zeros_like(exact) if have.zero is None else have.at(have.zero, start, stop)
        reach = torch.where(turned > 0, levels.high - zero, zero - levels.low)
        sizes = exact.abs() / reach.clamp(min=torch.finfo(torch.float64).tiny)
        have.largest(need, sizes, start)
    most = baked.scales.hold(need * (1 + _SLACK))
    # Where the format holds no such scale, none may have grown.
    return bool((grown & ~(most.isfinite() & (have.scale.abs() <= most))).any())
