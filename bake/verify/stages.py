"""How many stages a verification has, for whoever waits: about as many as remarks are made."""

from bake.verify.effects import MODELS
from bake.verify.inputs import Inputs
from bake.verify.moved import DRAWS
from bake.verify.prompts import own_texts
from bake.verify.tokenizer import has_tokenizer

FILES = 2
"""Digests, and the files against the plan."""
BENCH = 5
"""Base and reference in float64, the reference in float32, the plan, and the plan once more."""
CONTROLS = 4
"""Broken plans, one of each kind that there is; where every stand-in is forgotten once, more."""

DECODED = 3
"""What a GGUF and the base's decode to, and the base's under hooks."""


def stages_of(inputs: Inputs) -> int:
    """Return how many runs there are to be, and what else takes time."""
    count = FILES + BENCH + CONTROLS + (DRAWS if inputs.files.rounds else 0)
    count += inputs.asked.as_system + (DECODED if inputs.planned.gguf is not None else 0)
    count += 2 if inputs.generate else 0  # texts of base and reference
    if inputs.baked is not None:
        count += 1
        if has_tokenizer(inputs.artifact.path):
            limits = inputs.artifact.record.verify
            named = inputs.asked.text is not None or (
                limits is not None and limits.text is not None
            )
            # Of bake's own text the base reads every language before one is chosen.
            count += len(MODELS) + (0 if named else len(own_texts()["texts"]))
    return count + (0 if inputs.asked.runtimes is None else len(inputs.asked.runtimes.names))
