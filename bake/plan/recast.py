"""Recast: declare a model as another architecture that computes the same and has bias slots."""

from collections.abc import Mapping
from dataclasses import replace

from bake.errors import FamilyError
from bake.families import BiasSlot, Layout, Linear, Recast, configured, family_named
from bake.families.section import Json
from bake.families.table import MISSING, LinearRow
from bake.plan.types import ConfigChange


def obstacle(layout: Layout, recast: Recast, config: Mapping[str, Json]) -> str | None:
    """Return why this model cannot be recast exactly, or None."""
    for key, allowed in recast.when.items():
        value = configured(layout.family, config, key)
        if value not in allowed:
            shown = "unsaid" if value is MISSING else repr(value)
            return f"{key} is {shown}, and {recast.family} needs it to be {allowed[0]!r}"
    return None


def recast_layout(layout: Layout, recast: Recast) -> Layout:
    """Return the same model as a layout of the recast's family: same tensors, more bias slots."""
    family = family_named(recast.family)
    rows = {row.module: row for row in family.linears}

    def lifted(linear: Linear) -> Linear:
        row = rows.get(linear.module)
        if row is None:
            raise FamilyError(f"{family.name} has no layer {linear.module}: the recast is wrong")
        return replace(linear, bias=_lifted_slot(linear.bias, row))

    branches = tuple(branch.mapped(lifted, lifted) for branch in layout.branches)
    return replace(layout, family=family, flags=dict(family.flags), branches=branches)


def _lifted_slot(slot: BiasSlot, row: LinearRow) -> BiasSlot:
    if row.bias in ("always", "never"):
        raise FamilyError(f"a recast needs a config flag for the bias of {row.module}")
    present = slot.state == "present"
    return BiasSlot(slot.name, slot.size, "present" if present else "closed", row.bias)


def recast_changes(
    layout: Layout, recast: Recast, config: Mapping[str, Json]
) -> tuple[ConfigChange, ...]:
    """Return the changes to config.json, the source class's unsaid defaults written out."""
    changes = [
        ConfigChange(key, config.get(key), value)
        for key, value in recast.set.items()
        if config.get(key) != value
    ]
    changes += [ConfigChange(key, config[key], None) for key in recast.drop if key in config]
    changes += [
        ConfigChange(key, None, layout.family.defaults[key])
        for key in recast.explicit
        if key not in config
    ]
    return tuple(changes)
