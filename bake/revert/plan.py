"""The plan of an artifact, compiled again from the edits that it carries."""

import torch

from bake.checkpoints import Checkpoint
from bake.edit_store import EDITS, FITTED, load_edits
from bake.edits import Edit
from bake.families.fit import layout_of
from bake.families.layout import Layout
from bake.families.table import parse_family
from bake.plan import Plan, compile_plan
from bake.plan.record import plan_record
from bake.revert.record import RevertRecord

_SAME = ("tensors", "biases", "config")


def _edits(record: RevertRecord) -> tuple[Edit, ...]:
    """Return the edits that an artifact's weights hold: fitted stand-ins, where there are some."""
    fitted = record.folder / FITTED
    return load_edits(fitted if fitted.is_file() else record.folder / EDITS)


def _layout(record: RevertRecord, base: Checkpoint) -> Layout:
    """Return the base's layout, by the user's own table where the record holds one."""
    own = record.content.get("family")
    table = None if own is None else parse_family(str(own["text"]), str(own["file"]))
    return layout_of(base, table)


def recompiled(record: RevertRecord, base: Checkpoint) -> Plan:
    """Return the plan that the recorded edits lead to on a base.

    Args:
        record: of the artifact.
        base: config and tensors of the base; its weights are read for norms only.

    Raises:
        InputError: the edits are missing or malformed.
        FamilyError: no table fits the base.
    """

    def read(name: str) -> torch.Tensor:
        return base.read(name).to(torch.float64)

    return compile_plan(
        _edits(record),
        _layout(record, base),
        gain=read,
        config=base.config,
        allow=tuple(record.content.get("allow", ())),
        targets=tuple(record.content.get("target", ("transformers",))),
    )


def same_updates(record: RevertRecord, plan: Plan) -> bool:
    """Tell whether a plan changes what the record says: the same tensors in the same ways.

    The digests are no measure: the last bits of a decomposition differ between machines.
    """
    found = plan_record(plan)
    return all(found[key] == record.plan.get(key) for key in _SAME)
