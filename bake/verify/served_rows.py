"""Rows of what a runtime served: each number beside the limit that it is judged by."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from bake.verify.greedy import disagreement
from bake.verify.loss import divergence
from bake.verify.metrics import largest_difference
from bake.verify.rows import Row, above, at_most, unjudged
from bake.verify.target import Target


@dataclass(frozen=True, slots=True, eq=False)
class ServedRun:
    """What one runtime answered.

    Attributes:
        version: of the program.
        environment: versions and processor features that a report states beside the numbers.
        texts: the greedy text after every prompt.
        logprobs: over the prompts with answers.
        unedited: the same of the first few prompts, without the edit; None where the base that the
            runtime would load is not at hand.
        few: how many these are.
    """

    version: str
    environment: Mapping[str, str]
    texts: tuple[tuple[int, ...], ...]
    logprobs: Float64[Tensor, "tokens vocab"]
    unedited: Float64[Tensor, "few vocab"] | None
    few: int


@dataclass(frozen=True, slots=True)
class ServedRows:
    """The rows of one runtime, and the numbers that a headline takes."""

    rows: tuple[Row, ...]
    lost: float
    floor: float | None
    limit: float | None


def served_rows(name: str, run: ServedRun, target: Target) -> ServedRows:
    """Return what came of one runtime, each row's name beginning with the runtime's.

    Args:
        name: of the runtime.
        run: what it answered.
        target: what the answer is held against.
    """
    limits, effect = target.limits, target.effect
    lost = target.loss(run.logprobs).over(effect)
    storage, own = limits.floor.over(effect), None
    controls = [(f"{name}: control: nothing edited, share lost", 1.0)]
    if run.unedited is not None:
        few = target.first(run.few)
        own = divergence(few.base, run.unedited, few.speaking).over(few.effect)
        bare = few.loss(run.unedited).over(few.effect)
        controls.append((f"{name}: control: served without the edit, share lost", bare))
    limit = limits.loss(effect, storage, own or 0.0)
    floor = None if own is None else storage + own
    rows = [
        at_most(f"{name}: {SERVED}", lost, limit, "", "runtime"),
        *_added(name, run, target),
        _texts(name, run, target, judged=limit is not None and limits.exactness == "exact"),
    ]
    if own is not None:
        rows.append(unjudged(f"{name}: floor: base served, KL share", own, group="floor"))
    if limit is not None:
        rows += [above(label, value, limit, "cost control") for label, value in controls]
    return ServedRows(tuple(rows), lost, floor, limit)


def _added(name: str, run: ServedRun, target: Target) -> tuple[Row, ...]:
    """Return what lies between a decoded file and the same file served: the runtime's own part."""
    if target.decoded is None or run.unedited is None:
        return ()
    few, effect = target.first(run.few), target.effect
    assert few.decoded is not None
    added = divergence(target.decoded[1], run.logprobs, target.speaking).over(effect)
    own = divergence(few.decoded[0], run.unedited, few.speaking).over(few.effect)
    bare = divergence(few.decoded[1], run.unedited, few.speaking).over(few.effect)
    limit = target.limits.loss(effect, own)
    rows = [
        at_most(f"{name}: {ADDED}", added, limit, "", "runtime"),
        unjudged(f"{name}: floor: base's file served, KL share", own, group="floor"),
    ]
    if limit is not None:
        label = f"{name}: control: served without the edit, share added"
        rows.append(above(label, bare, limit, "cost control"))
    return tuple(rows)


ADDED = "added by the runtime: KL(stored ‖ served) / KL(hooked ‖ base)"
"""What a runtime makes of a GGUF beside what transformers makes of the weights it decodes to."""
SERVED = "lost when served: KL(hooked ‖ served) / KL(hooked ‖ base)"


def _texts(name: str, run: ServedRun, target: Target, *, judged: bool) -> Row:
    """The texts are the hooked model's, wherever that is surer of a token than the runtime errs.

    Where it is sure of none, nothing is compared and nothing is demanded.
    """
    error = largest_difference(target.hooked, run.logprobs)
    parted = disagreement(target.greedy, run.texts, error)
    sure = sum(margins[0] > 2 * error for margins in target.greedy.margins if margins)
    label = f"{name}: texts that part from the hooked model's"
    place = "" if parted is None else f"prompt {parted[0]}, token {parted[1]}"
    if not judged or not sure:
        return unjudged(label, float(parted is not None), place or f"{sure} begin surely")
    return at_most(label, float(parted is not None), 0.0, place, "runtime")
