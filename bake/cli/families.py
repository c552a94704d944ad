"""``bake families``: the architectures that bake knows, and one model against its table."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec import structs

from bake.cli.options import table_options
from bake.cli.output import Output, bake_command

if TYPE_CHECKING:
    from bake.families import Family, Layout


@bake_command("families")
@click.argument("model", required=False)
@table_options
def command(
    output: Output, model: str | None, *, family: Path | None, assume_harmless: tuple[str, ...]
) -> None:
    """List the family tables, or check MODEL against its own.

    MODEL is a folder or a Hub id; of the latter only headers are read.
    """
    from bake.cli.render.models import families, model_check
    from bake.families import load_families, read_family

    if model is None:
        found = load_families() if family is None else (read_family(family),)
        output.present(
            data=lambda: {"families": [_family(table) for table in found]},
            view=lambda: families(found),
        )
        return
    from bake.checkpoints import open_checkpoint  # which loads torch, as a list of tables does not
    from bake.checkpoints.quantised.view import decoded
    from bake.families.fit import layout_of

    checkpoint = replace(decoded(open_checkpoint(model)), harmless=assume_harmless)
    layout = layout_of(checkpoint, family)
    slots = _slots(layout)
    output.present(
        data=lambda: {
            "model": checkpoint.source,
            "revision": checkpoint.revision,
            **_family(layout.family),
            "dims": dict(layout.dims),
            "dtype": layout.dtype,
            "tied": layout.tied,
            "tensors": len(layout.shapes),
            "untouched": list(layout.untouched),
            "assume_harmless": list(layout.assumed),
            "sites": [str(site) for site in layout.sites],
            "bias_slots": slots,
        },
        view=lambda: model_check(layout, checkpoint.source, slots),
    )


def _family(table: "Family") -> dict[str, Any]:
    return {
        "family": table.name,
        "title": table.title,
        "tier": table.tier,
        "source": table.source,
        "architectures": list(table.classes),
        "runtimes": {
            name: {**structs.asdict(runtime), "run": list(table.run.get(name, ()))}
            for name, runtime in table.runtimes.items()
        },
        "recasts": list(table.recasts),
    }


def _slots(layout: "Layout") -> list[dict[str, Any]]:
    """Return the bias slot of every linear layer of a block, and of the head, one row each."""
    slots: dict[str, dict[str, Any]] = {}
    for linear in (*layout.linears, layout.unembed):
        able = linear.bias.state != "never"
        applied = [
            name
            for name, runtime in layout.family.runtimes.items()
            if linear.module in runtime.biases and linear.module not in runtime.misplaced
        ]
        slots[linear.module] = {
            "module": linear.module,
            "state": linear.bias.state,
            "flag": linear.bias.flag,
            "runtimes": [*(["transformers"] if able else []), *applied],
        }
    return list(slots.values())
