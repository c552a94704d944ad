"""What the gate's limits are held against: runs of the baked model and of its base."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bake.artifact.schema import Gate, RefusalsGate
from bake.errors import InputError
from bake.verify.gate import Check, bounded, gate_json, not_measured
from bake.verify.greedy import answers
from bake.verify.interval import share
from bake.verify.perplexity import Losses, perplexity_ratio
from bake.verify.prompts import lines_of, parse_prompts
from bake.verify.refusals import ANSWER, PHRASES, refuses
from bake.verify.runner import Runner
from bake.verify.scores import Scored
from bake.verify.tasks import known_tasks, run_tasks
from bake.verify.text import Text
from bake.verify.tokenizer import load_tokenizer


def measured_gate(
    runner: Runner, text: Text | str, found: Mapping[str, Losses], values: Scored
) -> dict[str, Any]:
    """Return what a report says of the recipe's gate; nothing where it has none.

    Args:
        runner: runs the models.
        text: what perplexity was measured on, or why it was not.
        found: the losses on it, by model.
        values: every score with its value of every greedy text.

    Raises:
        InputError: the base refuses nothing of what has to stay refused, or a task cannot be had.
    """
    inputs = runner.inputs
    gate = inputs.gate
    if gate is None:
        return {} if inputs.recorded_gate is None else not_measured("left out with --no-gate")
    checks: list[Check] = []
    if gate.perplexity is not None:
        assert isinstance(text, Text), "Verification.check asks for a text and a tokenizer"
        checks.append(_perplexity(gate.perplexity, text, found))
    if gate.refusals is not None:
        checks.append(_refusals(runner, gate.refusals))
    for spec, bounds in gate.scores.items():
        score, numbers = values[spec]
        checks += bounded(f"scores {spec}", spec, bounds, numbers, unit=score.unit)
    if gate.tasks:
        checks += _tasks(runner, gate)
    return gate_json(checks)


def _perplexity(bound: float, text: Text, found: Mapping[str, Losses]) -> Check:
    ratio = perplexity_ratio(found["baked"], found["base"])
    name = f"perplexity on {text.source}, baked / base"
    return Check("perplexity", name, ratio, bound, "at most")


def _refusals(runner: Runner, gate: RefusalsGate) -> Check:
    """Return which share of what the base refuses the baked model refuses as well."""
    tokenizer, where = load_tokenizer(runner.inputs.artifact.path), gate.prompts.file
    prompts = parse_prompts(lines_of(gate.prompts.text), Path(where), tokenizer).tokens
    phrases = gate.phrases or PHRASES
    refused: Sequence[Sequence[int]] = prompts
    for name in ("base", "baked"):
        runner.inputs.asked.remark(f"refusals of the {name} model")
        live = runner.model(runner.sources[name][0], torch.float32)
        said = [refuses(text, phrases) for text in answers(live, refused, tokenizer, ANSWER)]
        if name == "base":
            refused = [prompt for prompt, no in zip(prompts, said, strict=True) if no]
        if not refused:
            raise InputError(
                f"the base refuses none of the {len(prompts)} prompts of the gate",
                where=where,
                why="there is no refusal that could be kept",
                fix="name prompts that it refuses, or in phrases how its refusals begin",
            )
    words = f"refused of the {len(refused)} prompts of {where} that the base refuses"
    return Check("refusals", words, share(said), gate.least, "at least")


def _tasks(runner: Runner, gate: Gate) -> list[Check]:
    inputs = runner.inputs
    tokenizer, known = load_tokenizer(inputs.artifact.path), known_tasks(inputs.asked.tasks)
    found = {}
    for name in ("base", "baked"):
        inputs.asked.remark(f"tasks of the {name} model")
        live = runner.model(runner.sources[name][0], torch.float32)
        found[name] = run_tasks(live, tokenizer, tuple(gate.tasks), known)
    checks = []
    for task, bounds in gate.tasks.items():
        values = {name: scores[task].values for name, scores in found.items()}
        words = f"task {task} ({found['base'][task].metric})"
        checks += bounded(f"tasks {task}", words, bounds, values, unit=True)
    return checks
