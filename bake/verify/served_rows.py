"""Rows of what a runtime served: each number beside the limit that it is judged by."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float

from bake.verify.greedy import disagreement
from bake.verify.inputs import Inputs
from bake.verify.metrics import mean_kl
from bake.verify.report import SERVED_EFFECT, Row, above, at_most, unjudged
from bake.verify.runtimes.request import RuntimeResult
from bake.verify.stored import quantised
from bake.verify.target import SpoiledReference, Target


def target_rows(target: Target) -> tuple[Row, ...]:
    """Return the effect and the noise floors over the tokens that the runtimes serve."""
    effect = above(SERVED_EFFECT, target.effect, target.limit, "effect")
    floors = (
        unjudged(f"noise floor: {name}, max |Δlog p|", floor, group="floor")
        for name, floor in target.floors.items()
    )
    return (effect, *floors)


def served_rows(
    name: str, result: RuntimeResult, inputs: Inputs, target: Target
) -> tuple[Row, ...]:
    """Return what came of one runtime, each row's name beginning with the runtime's.

    Args:
        name: of the runtime.
        result: what it answered.
        inputs: the artifact, whose exactness decides what is demanded.
        target: what the answer is held against.
    """
    served = np.concatenate(result.prompt_logprobs).astype(np.float64)
    artifact = inputs.artifact
    demanded = artifact.exactness == "exact" and not quantised(artifact)
    rows = [
        *_difference_rows(name, served, result, target),
        *_unadapted_rows(name, result, target),
        *([] if artifact.carrier.checkpoint else _control_rows(name, served, target)),
    ]
    if not demanded:
        rows = [_undemanded(row) for row in rows]
    return (*rows, *_divergence_row(name, served, inputs, target))


def _undemanded(row: Row) -> Row:
    return replace(row, passed=None, note="" if row.group == "control" else row.note)


def _difference_rows(
    name: str, served: Float[np.ndarray, "tokens vocab"], result: RuntimeResult, target: Target
) -> tuple[Row, ...]:
    value = float(np.abs(served - target.logprobs).max())
    share = f"{value / target.effect:.1e} of the effect" if target.effect else "no effect"
    parted = disagreement(target.greedy, result.greedy, target.limit)
    place = "" if parted is None else f"prompt {parted[0]}, token {parted[1]}"
    texts = f"{name}: texts that part from the hooked model's"
    return (
        at_most(f"{name}: max |Δlog p|, served − hooked", value, target.limit, share, "runtime"),
        at_most(texts, 0.0 if parted is None else 1.0, 0.0, place, "runtime"),
    )


def _unadapted_rows(name: str, result: RuntimeResult, target: Target) -> tuple[Row, ...]:
    """The same engine without the adapter: it is the base, and it is not what was asked for."""
    if not result.unadapted:
        return ()
    bare = np.concatenate(result.unadapted).astype(np.float64)
    own, wrong = (np.abs(bare - t[: len(bare)]).max() for t in (target.base, target.logprobs))
    floor = f"{name}: noise floor, base served − base in float64"
    control = f"{name}: control: served without the adapter"
    return (
        # A base that is served wrong explains an adapter that is; it is not the artifact's fault.
        unjudged(floor, float(own), "max |Δlog p|", "floor"),
        above(control, float(wrong), target.limit, "control"),
    )


def _control_rows(
    name: str, served: Float[np.ndarray, "tokens vocab"], target: Target
) -> tuple[Row, ...]:
    """What is served misses every spoiled reference, so that it would be told from such a bake."""
    wrong = (SpoiledReference("nothing edited", target.base), *target.spoiled)
    values = (float(np.abs(served - one.logprobs).max()) for one in wrong)
    return tuple(
        above(f"{name}: control: {one.name}", value, target.limit, "control")
        for one, value in zip(wrong, values, strict=True)
    )


def _divergence_row(
    name: str, served: Float[np.ndarray, "tokens vocab"], inputs: Inputs, target: Target
) -> tuple[Row, ...]:
    """KL over effect: what an approximate plan is judged by, in the runtime as elsewhere."""
    if inputs.artifact.exactness != "approximate":
        return ()
    reference, most = torch.from_numpy(target.logprobs), inputs.most_kl
    lost, whole = (mean_kl(reference, torch.from_numpy(t)) for t in (served, target.base))
    share = lost / whole if whole else float("inf")
    label = f"{name}: mean KL(hooked ‖ served) / mean KL(hooked ‖ base)"
    return (at_most(label, share, most, group="runtime"),)
