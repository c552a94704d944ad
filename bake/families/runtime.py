"""``Runtime``: what a program that serves models does with those of one family.

Facts, read from the program's source and named there; which carriers this repository's tests have
run in it stands beside them. The plan draws its verdicts from both.
"""

from collections.abc import Mapping
from typing import Any, Literal

from bake.artifact.carrier import CARRIERS, read_by
from bake.families.section import Json, Table, Texts
from bake.section import Toml

RUNTIMES = ("transformers", "peft", "vllm", "llama.cpp", "sglang", "ollama", "mlx-lm")
"""Every runtime that a plan judges. The tables are read from transformers' classes, and PEFT adapts
any of their modules: these two need no section of a table."""
DESCRIBED = RUNTIMES[2:]
"""The runtimes that a table has sections for."""

READS: Mapping[str, tuple[str, ...]] = {name: read_by(name) for name in RUNTIMES}
"""The carriers that each runtime loads, a checkpoint also through its own converter."""

Adaptable = Literal["linear", "expert", "embed", "positions", "head"]
"""What a low-rank adapter can be for: a linear layer of a block, an expert's, a table, the head."""

Carriers = tuple[Literal[*CARRIERS], ...]  # type: ignore[valid-type]


class Runtime(Table, frozen=True, kw_only=True):
    """What one runtime does with models of this family."""

    source: str
    checkpoint: bool = True
    """Whether it loads checkpoints of this architecture, by itself or through its own converter."""
    biases: Texts
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
    misplaced: Texts = ()
    """The linear layers whose bias it loads in the wrong order: only zeros come out right."""
    defaults: Mapping[str, Json] = {}
    """What it takes for keys that config.json does not say at its top level."""

    @classmethod
    def read(cls, values: Toml, where: str, **known: Any) -> "Runtime":
        """Return the section of a file.

        What it does with a checkpoint has to be said of a runtime that loads one, and of no other.
        """
        given = values if isinstance(values, dict) else {}
        loads, unties = given.get("checkpoint", True), given.get("untied_head", True)
        if not loads:
            known |= {"biases": (), "extra_bias": "refused", "untied_head": False}
        if unties:
            known["extra_head"] = "refused"
        return super().read(values, where, **known)
