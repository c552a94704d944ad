"""The artifact in the runtimes that will serve it, against the hooked base model.

Each runtime is a process of its own, in the environment that is named for it, and loads the files
as any user's would. One that is not installed is missed before anything is measured.
"""

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bake.converter import convert, find_converter
from bake.process import RuntimeFailed
from bake.verify.inputs import GREEDY, Inputs
from bake.verify.metrics import Compared, compare_logits
from bake.verify.report import Row
from bake.verify.runner import Runner
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.registry import RUNTIMES, Runtimes
from bake.verify.runtimes.request import RuntimeRequest, RuntimeResult
from bake.verify.served_rows import served_rows, target_rows
from bake.verify.target import Target, target_of

UNADAPTED = 2
"""How many of the prompts an adapter's runtime serves without the adapter as well."""


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """What came of asking the runtimes; nothing where none was to be asked."""

    rows: tuple[Row, ...] = ()
    records: tuple[dict[str, Any], ...] = ()
    compared: Mapping[str, Compared] = field(default_factory=dict)
    """All numbers of each runtime that answered, over the tokens that it was asked for."""
    effect: Compared | None = None
    """Those of the base, over the same tokens."""


def serve(runner: Runner) -> Served:
    """Ask every runtime of a verification, and return effect, floors and what came of each."""
    inputs = runner.inputs
    if inputs.asked.runtimes is None:
        return Served()
    inputs.asked.remark("reference for the runtimes")
    return serve_all(inputs, inputs.asked.runtimes, target_of(runner))


def serve_all(inputs: Inputs, runtimes: Runtimes, target: Target) -> Served:
    """Ask runtimes, and return their rows and records.

    A failure of one is its verdict; the others are asked all the same.
    """
    rows, compared = list(target_rows(target)), dict[str, Compared]()
    records: list[dict[str, Any]] = []
    reference = torch.from_numpy(target.logprobs)
    for name in runtimes.names:
        inputs.asked.remark(f"{name} serves the artifact")
        try:
            result = _ask(name, runtimes, inputs, target)
        except RuntimeFailed as error:
            records.append({"runtime": name, "status": "failed", "reason": str(error)})
            rows.append(Row(f"{name}: serves the artifact", 0.0, 1.0, False, error.what, "runtime"))
            continue
        answered = torch.from_numpy(np.concatenate(result.prompt_logprobs))
        compared[name] = compare_logits(reference, answered)
        own = served_rows(name, result, inputs, target)
        rows += own
        records.append(
            {
                "runtime": name,
                "status": _status(own),
                "version": result.version,
                "environment": dict(result.environment),
                "prompts": len(target.prompts),
                "tokens": sum(map(len, target.prompts)),
                "greedy_tokens": GREEDY,
                "numbers": {row.name: row.value for row in own},
                "limit": target.limit,
                "metrics": asdict(compared[name].metrics),
            }
        )
    effect = compare_logits(reference, torch.from_numpy(target.base))
    return Served(tuple(rows), tuple(records), compared, effect)


def _status(rows: tuple[Row, ...]) -> str:
    verdicts = [row.passed for row in rows if row.passed is not None]
    if not all(verdicts):
        return "failed"
    return "passed" if verdicts else "measured"


def _ask(name: str, runtimes: Runtimes, inputs: Inputs, target: Target) -> RuntimeResult:
    """Return a runtime's answer: for the artifact, or for the base with the artifact over it."""
    runtime, carrier, folder = RUNTIMES[name], inputs.artifact.carrier, inputs.artifact.path
    own = _only_gguf(folder) if carrier.suffix == ".gguf" else folder
    model = own if carrier.whole else inputs.base.path
    with tempfile.TemporaryDirectory(prefix="bake-") as scratch:
        if runtime.gguf and model.is_dir():
            model = _converted(runtimes, model, Path(scratch))
        request = RuntimeRequest(
            model,
            target.prompts,
            GREEDY,
            target.logprobs.shape[1],
            "float32",
            adapter=None if carrier.whole else own,
            unadapted=0 if carrier.whole else min(UNADAPTED, len(target.prompts)),
        )
        return ask(runtime, request, runtimes.python(name), timeout=runtimes.timeout)


def _converted(runtimes: Runtimes, checkpoint: Path, scratch: Path) -> Path:
    """Return a checkpoint as a GGUF file in float32, by llama.cpp's own converter."""
    model = scratch / "model.gguf"
    script = find_converter(runtimes.converter)
    convert(checkpoint, model, converter=script, python=Path(sys.executable))
    return model


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise RuntimeFailed("the artifact holds no GGUF file", where=str(folder))
    return files[0]  # llama.cpp finds the further parts of a split file by itself
