"""The plan of an artifact, compiled again from the edits that it carries."""

from dataclasses import replace

import torch

from bake.checkpoints import Checkpoint
from bake.edit_store import EDITS, FITTED, load_edits
from bake.edits import Edit
from bake.families.fit import layout_of
from bake.families.layout import Layout
from bake.families.table import parse_family
from bake.plan import Plan, compile_plan
from bake.plan.record import plan_record
from bake.revert.record import Revertible

_SAME = ("tensors", "biases", "config")


def _edits(baked: Revertible) -> tuple[Edit, ...]:
    """Return the edits that an artifact's weights hold: fitted stand-ins, where there are some."""
    fitted = baked.folder / FITTED
    return load_edits(fitted if fitted.is_file() else baked.folder / EDITS)


def _layout(baked: Revertible, base: Checkpoint) -> Layout:
    """Return the base's layout, by the user's own table where the record holds one."""
    own = baked.record.family
    table = None if own is None else parse_family(own.text, own.file)
    # The plan was made by this table, and what it comes to again is held against the record:
    # which keys were let through then is settled.
    return layout_of(replace(base, harmless=tuple(base.config)), table)


def recompiled(baked: Revertible, base: Checkpoint) -> Plan:
    """Return the plan that the recorded edits lead to on a base.

    Args:
        baked: the artifact.
        base: config and tensors of the base; its weights are read for norms only.

    Raises:
        InputError: the edits are missing or malformed.
        FamilyError: no table fits the base.
    """

    def read(name: str) -> torch.Tensor:
        return base.read(name).to(torch.float64)

    return compile_plan(
        _edits(baked),
        _layout(baked, base),
        gain=read,
        config=base.config,
        allow=baked.record.allow,
        targets=baked.record.target or ("transformers",),
    )


def same_updates(baked: Revertible, plan: Plan) -> bool:
    """Tell whether a plan changes what the record says: the same tensors in the same ways.

    The digests are no measure: the last bits of a decomposition differ between machines.
    """
    here, recorded = plan_record(plan), baked.record.plan
    return all(getattr(here, key) == getattr(recorded, key) for key in _SAME)
