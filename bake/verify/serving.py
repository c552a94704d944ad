"""The artifact in the runtimes that will serve it, against the hooked base model.

Each runtime is a process of its own, in the environment that is named for it, and loads the files
as any user's would. One that is not installed is reported as not run, never as passed.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from bake.checkpoints import Checkpoint
from bake.errors import BakeError, UsageError
from bake.families import Layout
from bake.verify.artifact import CHECKPOINT, MERGE, Baked
from bake.verify.evidence import TORCH
from bake.verify.greedy import Generated, disagreement, generate
from bake.verify.metrics import largest_difference
from bake.verify.models import load
from bake.verify.report import Row
from bake.verify.runs import batches_of, run
from bake.verify.runtimes import hf, llamacpp, vllm
from bake.verify.runtimes.base import (
    RuntimeFailed,
    RuntimeMissing,
    RuntimeRequest,
    RuntimeResult,
)
from bake.verify.runtimes.converter import convert
from bake.verify.tolerance import FLOOR_FACTOR, logprob_tolerance

PROMPTS, TOKENS, GREEDY = 8, 16, 16
"""How many prompts a runtime is asked for, how many tokens of each, and how many greedy tokens.
llama.cpp answers one position at a time."""

SERVES: Mapping[str, tuple[str, ...]] = {
    "transformers": (CHECKPOINT, MERGE),
    "peft": ("lora",),
    "vllm": (CHECKPOINT, MERGE, "lora"),
    "llama.cpp": (CHECKPOINT, MERGE, "gguf", "gguf-lora", "control-vector"),
}
"""The kinds of artifact that each runtime loads; llama.cpp a checkpoint once it is converted."""


def serving(kind: str) -> tuple[str, ...]:
    """Return the runtimes that load a kind of artifact."""
    return tuple(name for name, kinds in SERVES.items() if kind in kinds)


@dataclass(frozen=True, slots=True)
class Runtimes:
    """Which runtimes to ask, and where they are."""

    names: tuple[str, ...]
    pythons: Mapping[str, Path] = field(default_factory=dict)
    """The interpreter of each runtime's environment; this one where none is named."""
    converter: Path | None = None
    """llama.cpp's ``convert_hf_to_gguf.py``."""
    timeout: float = 3600.0

    def python(self, name: str) -> Path:
        """Return the interpreter that a runtime is asked through."""
        return self.pythons.get(name, Path(sys.executable))

    def check(self, kind: str) -> None:
        """Require that every runtime is known and loads artifacts of that kind.

        Raises:
            UsageError: one is unknown or does not.
        """
        for name in (*self.names, *self.pythons):
            if name not in SERVES:
                raise UsageError(
                    f"there is no runtime {name!r}", fix=f"they are {', '.join(SERVES)}"
                )
        for name in self.names:
            if kind not in SERVES[name]:
                fitting = ", ".join(serving(kind))
                fix = f"a {kind} is for {fitting}" if fitting else None
                raise UsageError(f"{name} loads no {kind}", fix=fix)


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """What every runtime is held against: the hooked base model in float64."""

    prompts: tuple[tuple[int, ...], ...]
    logprobs: Float[np.ndarray, "tokens vocab"]
    greedy: Generated
    limit: float
    """Nats by which a runtime in float32 may differ."""
    effect: float
    """max |Δlog p| of hooked against base."""
    vocab: int
    count: int


def target_of(
    artifact: Baked,
    base: Checkpoint,
    layout: Layout,
    prompts: Sequence[Sequence[int]],
    *,
    family: Path | None = None,
    streamed: bool = False,
    generate_count: int = GREEDY,
) -> Target:
    """Return the reference for every runtime, computed with hooks on the base.

    Args:
        artifact: whose edits are the hooks.
        base: the base checkpoint.
        layout: its layout.
        prompts: token ids; the first few tokens of the first few prompts are taken.
        family: a table of the user's own.
        streamed: hold one block in memory at a time.
        generate_count: greedy tokens after each prompt.
    """
    asked = asked_of(prompts)
    batches, edits = batches_of(asked), artifact.edits
    live = load(base, torch.float64, family=family, streamed=streamed)
    plain = run(live, batches).logits
    hooked = run(live, batches, edits).logits
    greedy = generate(live, asked, generate_count, edits)
    del live
    narrow = {
        dtype: run(load(base, dtype, family=family, streamed=streamed), batches, edits).logits
        for dtype in dict.fromkeys((*narrow_dtypes(layout), *_stored_in(artifact)))
    }
    return target_from(layout, asked, plain, hooked, narrow, greedy, generate_count)


def asked_of(prompts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Return what a runtime is asked: the first few tokens of the first few prompts."""
    return tuple(tuple(prompt[:TOKENS]) for prompt in prompts[:PROMPTS])


def narrow_dtypes(layout: Layout) -> tuple[torch.dtype, ...]:
    """Return the dtypes below float64 in which the reference is run for its floor."""
    found = dict.fromkeys((torch.float32, TORCH[layout.dtype]))
    return tuple(dtype for dtype in found if dtype != torch.float64)


def target_from(
    layout: Layout,
    asked: tuple[tuple[int, ...], ...],
    plain: Float[torch.Tensor, "tokens vocab"],
    hooked: Float[torch.Tensor, "tokens vocab"],
    narrow: Mapping[torch.dtype, Float[torch.Tensor, "tokens vocab"]],
    greedy: Generated,
    count: int,
) -> Target:
    """Return what every runtime is held against.

    Args:
        layout: of the base.
        asked: the prompts.
        plain: the base's logits in float64.
        hooked: the reference's logits in float64.
        narrow: the reference's logits in other dtypes.
        greedy: the reference's greedy text.
        count: greedy tokens after each prompt.
    """
    logprobs = hooked.log_softmax(-1)
    floor = max(largest_difference(found, hooked) for found in narrow.values())
    tolerance = logprob_tolerance(
        torch.float32,
        layers=layout.layers,
        hidden=layout.hidden,
        scale=float(hooked.abs().max()),
    )
    return Target(
        prompts=asked,
        logprobs=logprobs.numpy(),
        greedy=greedy,
        # A log-probability moves by twice what a logit does.
        limit=tolerance + 2 * FLOOR_FACTOR * floor,
        effect=largest_difference(logprobs, plain.log_softmax(-1)),
        vocab=hooked.shape[1],
        count=count,
    )


def serve_all(
    runtimes: Runtimes,
    artifact: Baked,
    base: Checkpoint,
    target: Target,
    progress: Callable[[str], None],
) -> tuple[tuple[Row, ...], tuple[dict[str, Any], ...]]:
    """Ask every runtime, and return its rows and its record.

    A failure of one is its verdict; the others are asked all the same.
    """
    rows: list[Row] = []
    records: list[dict[str, Any]] = []
    for name in runtimes.names:
        progress(f"{name} serves the artifact")
        try:
            with tempfile.TemporaryDirectory(prefix="bake-") as scratch:
                result = _ask(name, runtimes, artifact, base, target, Path(scratch))
        except RuntimeMissing as error:
            records.append({"runtime": name, "status": "not run", "reason": error.what})
            continue
        except RuntimeFailed as error:
            records.append({"runtime": name, "status": "failed", "reason": str(error)})
            rows.append(Row(f"{name}: serves the artifact", 0.0, 1.0, False, error.what, "runtime"))
            continue
        made = _judged(name, result, artifact, target)
        rows += made
        passed = all(row.passed is not False for row in made)
        judged = any(row.passed is not None for row in made)
        records.append(
            {
                "runtime": name,
                "status": "failed" if not passed else "passed" if judged else "measured",
                "version": result.version,
                "environment": dict(result.environment),
                "prompts": len(target.prompts),
                "tokens": sum(map(len, target.prompts)),
                "greedy_tokens": target.count,
                "numbers": {row.name: row.value for row in made},
                "limit": target.limit,
            }
        )
    return tuple(rows), tuple(records)


def _ask(
    name: str,
    runtimes: Runtimes,
    artifact: Baked,
    base: Checkpoint,
    target: Target,
    scratch: Path,
) -> RuntimeResult:
    request = RuntimeRequest(artifact.path, target.prompts, target.count, target.vocab, "float32")
    python, timeout = runtimes.python(name), runtimes.timeout
    if artifact.kind == "lora":
        request = replace(request, model=base.path, adapter=artifact.path)
    if name in ("transformers", "peft"):
        return hf.run(request, python, timeout=timeout)
    if name == "vllm":
        return vllm.run(request, python, timeout=timeout)
    if artifact.kind == "gguf":
        request = replace(request, model=_only_gguf(artifact.path))
    elif artifact.kind in (CHECKPOINT, MERGE):
        request = replace(request, model=_converted(runtimes, artifact.path, scratch))
    else:
        model = _converted(runtimes, base.path, scratch)
        request = replace(request, model=model, adapter=_only_gguf(artifact.path))
    return llamacpp.run(request, python, timeout=timeout)


def _converted(runtimes: Runtimes, checkpoint: Path, scratch: Path) -> Path:
    """Return a checkpoint as a GGUF file in float32, by llama.cpp's own converter."""
    if runtimes.converter is None:
        raise RuntimeMissing(
            "llama.cpp reads a GGUF file, and no converter was named",
            fix="name llama.cpp's convert_hf_to_gguf.py with --converter",
        )
    made = scratch / "model.gguf"
    convert(checkpoint, made, converter=runtimes.converter, python=Path(sys.executable))
    return made


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise RuntimeFailed("the artifact holds no GGUF file", where=str(folder))
    return files[0]  # llama.cpp finds the further parts of a split file by itself


def _judged(name: str, result: RuntimeResult, artifact: Baked, target: Target) -> tuple[Row, ...]:
    served = np.concatenate(result.prompt_logprobs).astype(np.float64)
    value = float(np.abs(served - target.logprobs).max())
    exact = artifact.exactness == "exact" and not _quantised(artifact)
    parted = disagreement(target.greedy, result.greedy, target.limit)
    wrong = 0 if parted is None else 1
    note = "" if parted is None else f"prompt {parted[0]}, token {parted[1]}"
    share = f"{value / target.effect:.1e} of the effect" if target.effect else "no effect"
    return (
        Row(
            f"{name}: max |Δlog p|, served − hooked",
            value,
            target.limit,
            value <= target.limit if exact else None,
            share,
            "runtime",
        ),
        Row(
            f"{name}: texts that part from the hooked model's",
            float(wrong),
            0.0,
            not wrong if exact else None,
            note,
            "runtime",
        ),
    )


_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _types(artifact: Baked) -> frozenset[str]:
    """Return the types of the tensors of a GGUF artifact; of any other none."""
    if artifact.kind != "gguf":
        return frozenset()
    import gguf

    return frozenset(
        tensor.tensor_type.name
        for file in sorted(artifact.path.glob("*.gguf"))
        for tensor in gguf.GGUFReader(file).tensors
    )


def _stored_in(artifact: Baked) -> tuple[torch.dtype, ...]:
    """Return the floating types of a GGUF artifact, which may be narrower than the base's."""
    return tuple(_FLOATS[name] for name in sorted(_types(artifact) & _FLOATS.keys()))


def _quantised(artifact: Baked) -> bool:
    """Whether a GGUF artifact holds weights in codes, which cost more than any tolerance here."""
    return bool(_types(artifact) - _FLOATS.keys())


def not_run(records: Sequence[Mapping[str, Any]]) -> BakeError | None:
    """Return the error that a runtime which was asked for and not run is, or None."""
    missing = [record for record in records if record["status"] == "not run"]
    if not missing:
        return None
    names = ", ".join(str(record["runtime"]) for record in missing)
    return RuntimeMissing(
        f"not run: {names}",
        why=str(missing[0]["reason"]),
        fix="name the Python of an environment in which it is installed with --python NAME=PATH",
    )
