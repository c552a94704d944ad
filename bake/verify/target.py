"""``Target``: what every runtime is held against, the reference over the tokens that it serves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bake.verify.greedy import Generated
from bake.verify.inputs import GREEDY, Inputs
from bake.verify.metrics import largest_difference
from bake.verify.runner import Runner
from bake.verify.runs import Batch, batches_of, dtype_name, halves
from bake.verify.spoiled import MISTAKES, spoiled
from bake.verify.stored import stored_dtypes
from bake.verify.tolerance import FLOOR_FACTOR, logprob_tolerance

PROMPTS, TOKENS = 8, 16
"""How many prompts a runtime is asked for, and how many tokens of each. llama.cpp answers one
position at a time."""
TRIES = 8
"""Mistakes of a kind that are tried until the prompts reach one."""
PURPOSE = " for the runtimes"

Logits = Float[Tensor, "tokens vocab"]


@dataclass(frozen=True, slots=True, eq=False)
class SpoiledReference:
    """The reference in float64, with one mistake."""

    name: str
    logprobs: Float[np.ndarray, "tokens vocab"]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """The reference in float64, and how near to it a runtime has to be."""

    prompts: tuple[tuple[int, ...], ...]
    logprobs: Float[np.ndarray, "tokens vocab"]
    base: Float[np.ndarray, "tokens vocab"]
    """Log-probabilities of the base model in float64."""
    greedy: Generated
    limit: float
    """Nats by which a runtime in float32 may differ."""
    floors: Mapping[str, float]
    """max |Δlog p| of the reference beside itself in other dtypes and batches, by name."""
    spoiled: tuple[SpoiledReference, ...] = ()
    """References with a mistake in them, which what is served has to miss."""

    @property
    def effect(self) -> float:
        """max |Δlog p| of hooked against base."""
        return float(np.abs(self.logprobs - self.base).max())


def target_of(runner: Runner) -> Target:
    """Run the reference, and return what every runtime is held against."""
    inputs, double = runner.inputs, torch.float64
    # The first few tokens of the first few prompts.
    prompts = tuple(prompt[:TOKENS] for prompt in inputs.prompts.tokens[:PROMPTS])
    batches = batches_of(prompts)
    base = runner.trace(f"base model{PURPOSE}", "base", double, batches=batches).logits
    hooked = runner.reference(double, PURPOSE, batches=batches).logits
    greedy = runner.reference_text(double, GREEDY, PURPOSE, prompts=prompts)
    spoiled_references = _spoiled(runner, batches, hooked)
    narrow, rebatched = {}, {}
    for dtype in dict.fromkeys((*inputs.dtypes, *stored_dtypes(inputs.artifact))):
        narrow[dtype] = runner.reference(dtype, PURPOSE, batches=batches).logits
        purpose = f"{PURPOSE}, other batches"
        rebatched[dtype] = runner.reference(dtype, purpose, batches=halves(batches)).logits
    runner.release()
    return Target(
        prompts=prompts,
        logprobs=hooked.log_softmax(-1).numpy(),
        base=base.log_softmax(-1).numpy(),
        greedy=greedy,
        limit=serving_limit(inputs, hooked, narrow),
        floors=_floors(hooked, narrow, rebatched),
        spoiled=spoiled_references,
    )


def serving_limit(inputs: Inputs, hooked: Logits, narrow: Mapping[torch.dtype, Logits]) -> float:
    """Return by how many nats a runtime in float32 may differ from the reference.

    Args:
        inputs: whose layout says how many operations round.
        hooked: the reference's logits in float64.
        narrow: those of the dtypes that the weights are stored and served in, whose largest
            difference is the noise floor.
    """
    layout, scale = inputs.layout, float(hooked.abs().max())
    floor = max((largest_difference(logits, hooked) for logits in narrow.values()), default=0.0)
    tolerance = logprob_tolerance(
        torch.float32, layers=layout.layers, hidden=layout.hidden, scale=scale
    )
    # A log-probability moves by twice what a logit does.
    return tolerance + 2 * FLOOR_FACTOR * floor


def _floors(
    hooked: Logits, narrow: Mapping[torch.dtype, Logits], rebatched: Mapping[torch.dtype, Logits]
) -> dict[str, float]:
    """Return how far the reference lies from itself, by name."""
    floors = {}
    for dtype, logits in narrow.items():
        name = dtype_name(dtype)
        logprobs = logits.to(torch.float64).log_softmax(-1)
        others = rebatched[dtype].to(torch.float64).log_softmax(-1)
        exact = hooked.log_softmax(-1)
        floors[f"hooked in {name} − in float64"] = largest_difference(logprobs, exact)
        floors[f"hooked in {name}, other batches"] = largest_difference(logprobs, others)
    return floors


def _spoiled(
    runner: Runner, batches: Sequence[Batch], hooked: Logits
) -> tuple[SpoiledReference, ...]:
    """Return a spoiled reference of each kind, for what cannot be spoiled itself.

    A mistake that the prompts do not reach proves nothing either way (a site may be forgotten where
    the next one does the same), so that the next is tried then.
    """
    artifact = runner.inputs.artifact
    if artifact.carrier.checkpoint:
        return ()  # its controls are bakes of their own
    reference, limit = hooked.log_softmax(-1), serving_limit(runner.inputs, hooked, {})
    references = []
    for kind in MISTAKES:
        for name, edits in islice(spoiled(artifact.edits, artifact.plan_digest, kind), TRIES):
            label = f"hooked model with a mistake, {kind}, {name}"
            run = runner.trace(label, "base", torch.float64, edits, batches=batches)
            logprobs = run.logits.log_softmax(-1)
            if largest_difference(logprobs, reference) > 2 * limit:
                references.append(SpoiledReference(f"{kind}, {name}", logprobs.numpy()))
                break
    return tuple(references)
