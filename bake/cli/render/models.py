"""Family tables, and one model against its own."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bake.cli.render.pieces import facts, listed, section, site_list, table

if TYPE_CHECKING:
    from bake.families import Family, Layout


def families(tables: Sequence["Family"]) -> list[RenderableType]:
    """Return the tables that bake knows."""
    made = table("family", "tier", "architectures", "models")
    for family in tables:
        made.add_row(family.name, family.tier, ", ".join(family.classes), family.title)
    return [made]


def model_check(
    layout: "Layout", source: str, slots: Sequence[Mapping[str, Any]]
) -> list[RenderableType]:
    """Return how a model and its table fit."""
    family = layout.family
    claimed = len(layout.shapes) - len(layout.untouched)
    ran = [(name, ", ".join(carriers)) for name, carriers in family.run.items() if carriers]
    recasts = [f"as {name}" for name in family.recasts]
    return [
        facts(
            [
                ("model", source),
                ("family", f"{family.name}: {family.title}"),
                ("tier", family.tier),
                ("read from", family.source),
                ("tensors", f"{claimed} claimed, {len(layout.untouched)} left as they are"),
                ("head", head(layout)),
                *([("stream", f"closed: {closed}")] if (closed := family.stream.closed) else []),
            ]
        ),
        section("Sites", Text(site_list(layout.sites))),
        section("Bias slots", _slots(slots)),
        section("Runtimes", _runtimes(family)),
        section("Carriers that tests have run", facts(ran or [("none", "")])),
        *listed('Can be declared, with allow = ["recast"]', recasts),
        *listed("Keys of the config taken to change nothing", layout.assumed),
        *listed("Tensors left as they are", layout.untouched),
    ]


def _slots(slots: Sequence[Mapping[str, Any]]) -> Table:
    made = table("linear layer", "bias", "config flag", "applied by")
    for slot in slots:
        made.add_row(slot["module"], slot["state"], slot["flag"] or "", ", ".join(slot["runtimes"]))
    return made


def _runtimes(family: "Family") -> Table:
    made = table("runtime", "untied head", "other biases", "adapters of", "read from")
    for name, runtime in family.runtimes.items():
        told: str = "loaded" if runtime.untied_head else runtime.extra_head
        biases = runtime.extra_bias if runtime.checkpoint else ""
        adapters = "" if runtime.lora is None else ", ".join(runtime.lora) or "none"
        told = told if runtime.checkpoint else "no checkpoint"
        made.add_row(name, told, biases, adapters, runtime.source)
    return made


def head(layout: "Layout") -> str:
    """Return what the model's output head is."""
    return "tied to the embedding" if layout.tied else "separate from the embedding"
