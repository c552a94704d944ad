"""Tasks of lm-evaluation-harness: what base and baked model score on each document of them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bake.errors import InputError, UsageError, first_line
from bake.verify.models import Live

BATCH = 8
"""Requests that the harness runs side by side."""


@dataclass(frozen=True, slots=True)
class TaskScores:
    """One model on one task."""

    metric: str
    values: tuple[float, ...]
    """Of every document, in the task's order; none outside of 0 and 1."""


def check_harness() -> None:
    """Require that lm-evaluation-harness is installed, before anything is measured for it.

    Raises:
        UsageError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise UsageError(
            "the gate has tasks of lm-evaluation-harness, which is not installed",
            fix="pip install 'bake-directions[eval]', or leave the gate out with --no-gate",
        )


def known_tasks(folder: Path | None) -> Any:
    """Return the harness's ``TaskManager``, which reads thousands of files: ten seconds or more.

    Args:
        folder: of the user's own tasks, as the harness takes it.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=None if folder is None else str(folder))


def run_tasks(
    live: Live, tokenizer: Any, names: Sequence[str], known: Any
) -> dict[str, TaskScores]:
    """Return what a model scores on every document of some tasks, by the first of their metrics.

    Args:
        live: the model, in memory as a whole.
        tokenizer: of the artifact.
        names: of the tasks, or of groups of them.
        known: the tasks that there are, from `known_tasks`.

    Raises:
        InputError: there is no such task, its data cannot be had, or its metric is no share; or the
            harness cannot use the tokenizer.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            "lm-evaluation-harness cannot use the tokenizer",
            where=tokenizer.name_or_path,
            why="it has no token that begins or ends a text",
            fix="leave the gate's tasks out with --no-gate",
        )
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=live.model, tokenizer=tokenizer, batch_size=BATCH)
    found = {}
    for name in names:
        try:
            result: Any = simple_evaluate(
                model=model, tasks=[name], task_manager=known, log_samples=True, bootstrap_iters=0
            )
        except (KeyError, ValueError, OSError) as error:
            raise InputError(
                f"the task {name} cannot be run: {first_line(error)}",
                where="lm-evaluation-harness",
                fix="name one that it knows, and the folder of your own tasks with --tasks",
            ) from error
        found[name] = _scores(name, result)
    return found


def _scores(name: str, result: Any) -> TaskScores:
    """Return the scores of a task; those of a group are of all its tasks, one after another."""
    metrics, values = [], []
    for task in sorted(result["samples"]):
        samples = result["samples"][task]
        metric = samples[0]["metrics"][0]
        metrics.append(metric)
        # A task that filters answers in several ways counts by the first of them.
        first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        values += [sample[metric] for sample in sorted(first, key=lambda s: int(s["doc_id"]))]
    for value in values:
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(
                f"the task {name} scores a document {value!r} by {metrics[0]}",
                where="lm-evaluation-harness",
                why="a limit is on a mean of shares between 0 and 1",
                fix="name a task whose first metric is one, such as acc or exact_match",
            )
    return TaskScores(", ".join(dict.fromkeys(metrics)), tuple(map(float, values)))
