"""The system's own hooks beside bake's: at its positions, on its conditions, in float64.

Bake's hooks, as weights, act always and at every token, and the verification is held against them.
What is measured here says how far that is from what the system itself does; nothing is demanded.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bake.errors import UsageError
from bake.positions import Spoken, Word
from bake.verify.metrics import divergences, largest_difference
from bake.verify.precision import double_precision
from bake.verify.rows import Row, unjudged
from bake.verify.runner import Runner
from bake.verify.tokenizer import CHAT, PLAIN


def run_as_system(runner: Runner) -> Float[Tensor, "tokens vocab"]:
    """Return the logits of the base under the systems' own hooks, in the transcript's order.

    Raises:
        UsageError: an edit acts from the end of the instruction on, and some prompts are chats and
            others are not.
    """
    inputs = runner.inputs
    edits, form = inputs.artifact.edits, inputs.prompts.form
    after = any(e.own is not None and e.own.positions.text == Word.AFTER_INSTRUCTION for e in edits)
    if after and CHAT in form and PLAIN in form:
        raise UsageError(
            "an edit acts from the end of the instruction on, and some of the prompts hold one and "
            "others do not",
            where=inputs.prompts.source,
            fix="verify with prompts of one form",
        )
    live = runner.model("base", torch.float64)
    assert live.layout is not None, "edits have a table"
    found = []
    with torch.no_grad(), double_precision():
        for prompt, answer in zip(
            runner.transcript.prompts, runner.transcript.answers, strict=True
        ):
            spoken = Spoken(len(prompt), len(prompt) if CHAT in form else None)
            with live.under(edits, as_system=spoken):
                tokens = torch.tensor([[*prompt, *answer]]).to(live.device)
                found.append(live.model(tokens, use_cache=False).logits[0].to("cpu"))
    return torch.cat(found)


def system_rows(system: Tensor, hooked: Tensor, base: Tensor, planned: Tensor) -> tuple[Row, ...]:
    """Return how far the plan lies from bake's hooks and from the systems' own, side by side.

    Args:
        system: logits under the systems' own hooks, [tokens, vocab] in float64.
        hooked: under bake's.
        base: of the base model.
        planned: of the plan, not rounded.
    """
    always, own = "bake's hooks", "the system's own hooks"
    rows = []
    for words, reference in ((always, hooked), (own, system)):
        effect, rest = (float(kl.mean()) for kl in divergences(reference, (base, planned)))
        difference = largest_difference(planned, reference)
        rows += [
            unjudged(f"max |Δlogit| of the plan from {words}", difference),
            unjudged(f"KL({words} ‖ plan) / KL({words} ‖ base)", rest / effect if effect else 0.0),
        ]
    return tuple(rows)
