"""``Runtime``: what a program that serves models does with those of one family.

Facts, read from the program's source and named there; which carriers this repository's tests have
run in it stands beside them. The plan draws its verdicts from both.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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

Adaptable = Literal["linear", "expert", "embed", "positions", "head"]
"""What a low-rank adapter can be for: a linear layer of a block, an expert's, a table, the head."""

_CARRIERS: Any = tuple[Literal[*CARRIERS], ...]  # type: ignore[valid-type]


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
    lora: tuple[Adaptable, ...] | None = None
    """What an adapter may change there; None where nothing is known."""
    control_vector: bool | None = None
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


def read_run(section: Section) -> Mapping[str, tuple[str, ...]]:
    """Return, for every runtime, the carriers that tests have run in it.

    Raises:
        FamilyError: a name that is no runtime or no carrier.
    """
    found = {name: section.value(name, _CARRIERS, ()) for name in RUNTIMES}
    section.close()
    return found


def _runtime(row: Mapping[str, Json], where: str) -> Runtime:
    section = Section(row, where)
    loads = section.value("checkpoint", bool, True)
    known: dict[str, Json] = {"checkpoint": loads}
    # What it does with a checkpoint has to be said of a runtime that loads one, and of no other.
    if not loads:
        known |= {"biases": (), "extra_bias": "refused", "untied_head": False}
    if not loads or row.get("untied_head") is True:
        known["extra_head"] = "refused"
    return section.read(Runtime, **known)
