"""The artifact in the runtimes that will serve it, against the hooked base model.

Each runtime is a process of its own, in the environment that is named for it, and loads the files
as any user's would. One that is not installed is missed before anything is measured.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bake.converter import convert, find_converter
from bake.process import RuntimeFailed
from bake.verify.inputs import GREEDY, Inputs
from bake.verify.limits import Limits
from bake.verify.metrics import Compared, compare_logits
from bake.verify.rows import Row
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.registry import RUNTIMES, Runtimes
from bake.verify.runtimes.request import RuntimeRequest, RuntimeResult
from bake.verify.served_rows import ServedRows, ServedRun, served_rows
from bake.verify.stored.beside import base_beside
from bake.verify.stored.registry import gguf_file
from bake.verify.target import Target, target_of

UNEDITED = 2
"""How many of the prompts a runtime serves without the edit as well."""


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """What came of asking the runtimes; nothing where none was to be asked."""

    rows: tuple[Row, ...] = ()
    records: tuple[dict[str, Any], ...] = ()
    compared: Mapping[str, Compared] = field(default_factory=dict)
    """All numbers of each runtime that answered, over the tokens that it was asked for."""
    effect: Compared | None = None
    """Those of the base, over the same tokens."""
    texts: tuple[tuple[int, ...], ...] = ()
    """Greedy texts of the first runtime that answered."""


def serve(limits: Limits, draw_further: Callable[[], None]) -> Served:
    """Ask every runtime of a verification, and return what came of each.

    A failure of one is its verdict; the others are asked all the same. Where one loses more than
    the floor allows, and no more than may be lost at all, the floor is not left to chance: it is
    drawn further, and the runtime serves the base over all prompts.

    Args:
        limits: with all that was run.
        draw_further: draws the floor of storage further, in the runs that ``limits`` holds.
    """
    runtimes = limits.inputs.asked.runtimes
    if runtimes is None:
        return Served()
    target = target_of(limits.evidence, limits)
    answers = {name: _answer(name, runtimes, target) for name in runtimes.names}
    rows = _rows(answers, target)
    if close := [name for name, found in rows.items() if _is_close(found, target)]:
        draw_further()
        count = len(target.prompts)
        for name in close:
            run = answers[name]
            if isinstance(run, ServedRun) and run.unedited is not None and run.few < count:
                answers[name] = _answer(name, runtimes, target, count)
        rows = _rows(answers, target)  # beside another floor
    return _served(answers, rows, target)


def _rows(
    answers: Mapping[str, ServedRun | RuntimeFailed], target: Target
) -> dict[str, ServedRows]:
    """Return what came of every runtime that answered."""
    runs = {name: run for name, run in answers.items() if isinstance(run, ServedRun)}
    return {name: served_rows(name, run, target) for name, run in runs.items()}


def _is_close(found: ServedRows, target: Target) -> bool:
    """Whether chance may have decided: the floor forbids what a larger one would allow."""
    failed = [row for row in found.rows if row.group == "runtime" and row.passed is False]
    most = target.limits.most
    return any(row.limit and row.limit < row.value <= most for row in failed)


def _answer(
    name: str, runtimes: Runtimes, target: Target, unedited: int = UNEDITED
) -> ServedRun | RuntimeFailed:
    target.limits.inputs.asked.remark(f"{name} serves the artifact")
    try:
        return _run(name, runtimes, target, unedited)
    except RuntimeFailed as error:
        return error


def _served(
    answers: Mapping[str, ServedRun | RuntimeFailed],
    found_rows: Mapping[str, ServedRows],
    target: Target,
) -> Served:
    """Return rows and records of runtimes that were asked."""
    rows, records = list[Row](), list[dict[str, Any]]()
    compared, texts = dict[str, Compared](), tuple[tuple[int, ...], ...]()
    for name, found in answers.items():
        if isinstance(found, RuntimeFailed):
            records.append({"runtime": name, "status": "failed", "reason": str(found)})
            rows.append(Row(f"{name}: serves the artifact", 0.0, 1.0, False, found.what, "runtime"))
            continue
        own = found_rows[name]
        rows += own.rows
        compared |= compare_logits(target.hooked, {name: found.logprobs})
        texts = texts or found.texts
        records.append(
            {
                "runtime": name,
                "status": _status(own.rows),
                "version": found.version,
                "environment": dict(found.environment),
                "prompts": len(target.prompts),
                "tokens": sum(map(len, target.spoken)),
                "greedy_tokens": GREEDY,
                "lost": own.lost,
                "floor": own.floor,
                "limit": own.limit,
                "numbers": {row.name: row.value for row in own.rows},
                "metrics": asdict(compared[name].metrics),
            }
        )
    effect = compare_logits(target.hooked, {"base": target.base})["base"]
    return Served(tuple(rows), tuple(records), compared, effect, texts)


def _status(rows: tuple[Row, ...]) -> str:
    verdicts = [row.passed for row in rows if row.passed is not None and row.group == "runtime"]
    if not all(verdicts):
        return "failed"
    return "passed" if verdicts else "measured"


def _run(name: str, runtimes: Runtimes, target: Target, unedited: int) -> ServedRun:
    """Return what a runtime says of the artifact, and of the base over the first few prompts."""
    inputs = target.limits.inputs
    carrier, own = inputs.artifact.carrier, inputs.artifact.path
    if carrier.suffix == ".gguf":
        own = gguf_file(inputs.artifact)
    base, few = _base_file(inputs), min(unedited, len(target.prompts))
    with tempfile.TemporaryDirectory(prefix="bake-") as scratch:
        if not carrier.whole:
            assert base is not None, "an adapter is loaded over it"
            result = _ask(name, runtimes, target, base, Path(scratch), adapter=own, few=few)
            bare = result.unadapted
        else:
            result = _ask(name, runtimes, target, own, Path(scratch))
            bare = ()
            if base is not None:
                inputs.asked.remark(f"{name} serves the base")
                own_base = _ask(name, runtimes, target.first(few), base, Path(scratch))
                bare = own_base.prompt_logprobs[:few]
    count = len(target.spoken)
    return ServedRun(
        version=result.version,
        environment=result.environment,
        texts=result.greedy[count:],
        logprobs=_joined(result.prompt_logprobs[:count]),
        unedited=_joined(bare) if bare else None,
        few=few,
    )


def _base_file(inputs: Inputs) -> Path | None:
    """Return what a runtime loads as the base: a folder, or a GGUF; None where it is not here."""
    if inputs.artifact.carrier.suffix != ".gguf":
        return inputs.base.path
    if (own := base_beside(inputs.artifact)) is not None:
        return own
    if inputs.planned.gguf is not None:
        return inputs.planned.gguf.original.path
    # A converted artifact has a converted base; of another one the base is not at hand.
    about = inputs.artifact.record.gguf
    return inputs.base.path if about is None or about.converter else None


def _ask(
    name: str,
    runtimes: Runtimes,
    target: Target,
    model: Path,
    scratch: Path,
    *,
    adapter: Path | None = None,
    few: int = 0,
) -> RuntimeResult:
    """Return a runtime's answer over prompts with and without the hooked model's answers."""
    runtime = RUNTIMES[name]
    if runtime.gguf and model.is_dir():
        model = _converted(runtimes, model, scratch)
    request = RuntimeRequest(
        model,
        (*target.spoken, *target.prompts),
        GREEDY,
        target.hooked.shape[1],
        "float32",
        adapter=adapter,
        unadapted=few,
    )
    return ask(runtime, request, runtimes.python(name), timeout=runtimes.timeout)


def _joined(tables: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(tables).astype(np.float64))


def _converted(runtimes: Runtimes, checkpoint: Path, scratch: Path) -> Path:
    """Return a checkpoint as a GGUF file in float32, by llama.cpp's own converter."""
    model = scratch / f"{checkpoint.name}.gguf"
    script = find_converter(runtimes.converter)
    convert(checkpoint, model, converter=script, python=Path(sys.executable))
    return model
