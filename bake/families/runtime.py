"""``Runtime``: what a program that serves models does with those of one family.

Facts, read from the program's source and named there; which carriers this repository's tests have
run in it stands beside them. The plan draws its verdicts from both.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from bake.artifact.carrier import CARRIERS, read_by
from bake.errors import FamilyError
from bake.families.section import Json, Section
from bake.section import nearest

RUNTIMES = ("transformers", "peft", "vllm", "llama.cpp", "sglang", "ollama", "mlx-lm")
"""Every runtime that a plan judges. The tables are read from transformers' classes, and PEFT adapts
any of their modules: these two need no section of a table."""
DESCRIBED = RUNTIMES[2:]
"""The runtimes that a table has sections for."""

READS: Mapping[str, tuple[str, ...]] = {name: read_by(name) for name in RUNTIMES}
"""The carriers that each runtime loads, a checkpoint also through its own converter."""

ADAPTABLE = ("linear", "expert", "embed", "positions", "head")
"""What a low-rank adapter can be for: a linear layer of a block, an expert's, a table, the head."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """What one runtime does with models of this family."""

    source: str
    checkpoint: bool
    """Whether it loads checkpoints of this architecture, by itself or through its own converter."""
    biases: tuple[str, ...]
    """The linear layers whose bias it applies; every other bias it drops or refuses."""
    extra_bias: Literal["dropped", "refused"]
    """What it does with a bias tensor that it has no slot for."""
    untied_head: bool
    """Whether it loads an output head that differs from the embedding."""
    extra_head: Literal["dropped", "refused"]
    """What it does with an output head of its own, where it loads none."""
    lora: tuple[str, ...] | None
    """What an adapter may change there: some of ``ADAPTABLE``; None where nothing is known."""
    control_vector: bool | None
    """Whether it adds control vectors behind the blocks; None where nothing is known."""
    misplaced: tuple[str, ...] = ()
    """The linear layers whose bias it loads in the wrong order: only zeros come out right."""
    defaults: Mapping[str, Json] = field(default_factory=dict)
    """What it takes for keys that config.json does not say at its top level."""


def read_runtimes(
    rows: Mapping[str, Json], modules: Collection[str], where: str
) -> Mapping[str, Runtime]:
    """Return the runtimes of a table.

    Args:
        rows: the table's ``runtime`` sections by name.
        modules: the table's linear layers.
        where: the table, for messages.

    Raises:
        FamilyError: a section is of no known runtime, lacks a key or holds an unknown one.
    """
    found = {}
    for name, row in rows.items():
        place = f"{where} [runtime.{name}]"
        if name not in DESCRIBED:
            raise FamilyError(
                f"there is no runtime {name!r}", where=place, fix=nearest(name, DESCRIBED)
            )
        found[name] = _runtime(row, place)
        for key in ("biases", "misplaced"):
            for module in getattr(found[name], key):
                if module not in modules:
                    raise FamilyError(
                        f"{key} names {module!r}, which is no linear layer of the table",
                        where=place,
                    )
    return found


def read_run(rows: Mapping[str, Json], where: str) -> Mapping[str, tuple[str, ...]]:
    """Return, for every runtime, the carriers that tests have run in it.

    Raises:
        FamilyError: a name that is no runtime or no carrier.
    """
    section = Section(rows, where)
    found = {name: section.some_of(name, CARRIERS) or () for name in RUNTIMES}
    section.close()
    return found


def _runtime(row: Mapping[str, Json], where: str) -> Runtime:
    section = Section(row, where)
    source = section.take("source", str)
    loads = section.take("checkpoint", bool, True)
    # What it does with a checkpoint has to be said of a runtime that loads one, and of no other.
    untied = section.take("untied_head", bool) if loads else False
    extra_head: Literal["dropped", "refused"] = "refused"
    if loads and not untied:
        extra_head = section.choice("extra_head", ("dropped", "refused"))
    runtime = Runtime(
        source=source,
        checkpoint=loads,
        biases=section.strings("biases") if loads else (),
        extra_bias=section.choice("extra_bias", ("dropped", "refused")) if loads else "refused",
        untied_head=untied,
        extra_head=extra_head,
        lora=section.some_of("lora", ADAPTABLE),
        control_vector=section.optional("control_vector", bool),
        misplaced=section.strings("misplaced", ()),
        defaults=section.take("defaults", dict, {}),
    )
    section.close()
    return runtime
