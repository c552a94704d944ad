"""The side effects of an edit, beside its purpose, and whether they stay within the recipe's gate.

Perplexity is of base, hooked and baked model on one text, scores are of their greedy texts, and the
gate holds the baked model against its base.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from bake.verify.gate import not_measured
from bake.verify.gate_runs import measured_gate
from bake.verify.greedy import Generated
from bake.verify.perplexity import Losses, losses_of, perplexity
from bake.verify.report import Report
from bake.verify.runner import Runner
from bake.verify.scores import Scored, scorer
from bake.verify.text import Text, text_of
from bake.verify.tokenizer import load_tokenizer

MODELS = ("base", "hooked", "baked")


@dataclass(frozen=True, slots=True)
class Reading:
    """What perplexity is measured on, and what the models make of it."""

    text: Text | str
    """Why there is none, where there is none."""
    losses: Mapping[str, Losses]
    """By model."""


def read_by_base(runner: Runner) -> Reading:
    """Return the losses of base and hooked model, which are run while the base is in memory.

    Raises:
        InputError: the text cannot be had.
    """
    inputs = runner.inputs
    if not inputs.artifact.carrier.checkpoint:
        return Reading(f"a {inputs.artifact.kind} is run by the runtimes alone", {})
    text = text_of(runner)
    if not isinstance(text, Text):
        return Reading(text, {})
    losses = {} if text.base is None else {"base": text.base}
    names = (name for name in MODELS if name != "baked" and name not in losses)
    return Reading(text, losses | {name: losses_of(runner, name, text.passages) for name in names})


def read_by_baked(runner: Runner, reading: Reading) -> Reading:
    """Return a reading with the baked model's losses, which is run while it is in memory."""
    if not isinstance(reading.text, Text):
        return reading
    losses = losses_of(runner, "baked", reading.text.passages)
    return replace(reading, losses={**reading.losses, "baked": losses})


def with_side_effects(
    report: Report, runner: Runner, texts: Mapping[str, Generated], reading: Reading
) -> Report:
    """Return a report with the side effects, held against the recipe's gate.

    Args:
        report: what was measured beside them.
        runner: runs the models.
        texts: the greedy text of each model, where a score asks for it.
        reading: what the models make of a text.

    Raises:
        InputError: a score or a task cannot be had.
    """
    inputs, text = runner.inputs, reading.text
    if not inputs.artifact.carrier.checkpoint:
        gate = {} if inputs.recorded_gate is None else not_measured(str(text))
        return replace(report, text={"reason": text}, gate=gate)
    effects: dict[str, Any] = {}
    if reading.losses:
        effects["perplexity"] = {n: asdict(perplexity(of)) for n, of in reading.losses.items()}
    values = _scored(runner, texts)
    for spec, (score, numbers) in values.items():
        effects[spec] = {n: asdict(score.interval(of)) for n, of in numbers.items()}
    said = text.to_json() if isinstance(text, Text) else {"reason": text}
    gate = measured_gate(runner, text, reading.losses, values)
    runner.release()
    return replace(report, effects=effects, text=said, gate=gate)


def _scored(runner: Runner, texts: Mapping[str, Generated]) -> Scored:
    """Return every score with its value of every greedy text, by model."""
    inputs = runner.inputs
    if not inputs.scores:
        return {}
    tokenizer = load_tokenizer(inputs.artifact.path)
    written = {
        name: [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in texts[name].tokens]
        for name in MODELS
    }
    found = {}
    for spec in inputs.scores:
        score = scorer(spec)
        found[spec] = (score, {name: score.values(texts) for name, texts in written.items()})
    return found
