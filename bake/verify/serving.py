"""The artifact in the runtimes that will serve it, against the hooked base model.

Each runtime is a process of its own, in the environment that is named for it, and loads the files
as any user's would. One that is not installed is reported as not run, never as passed.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from bake.artifact.carrier import KINDS
from bake.checkpoints import Checkpoint
from bake.converter import convert
from bake.edits import Edit
from bake.errors import BakeError
from bake.families import Layout
from bake.process import RuntimeFailed, RuntimeMissing
from bake.verify.artifact import CHECKPOINT, MERGE, Baked
from bake.verify.evidence import TORCH
from bake.verify.greedy import Generated, disagreement, generate
from bake.verify.metrics import Compared, compare_logits, largest_difference, mean_kl
from bake.verify.models import load
from bake.verify.report import Row
from bake.verify.runs import batches_of, halves, run
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.registry import RUNTIMES, Runtimes
from bake.verify.runtimes.request import RuntimeRequest, RuntimeResult
from bake.verify.spoiled import MISTAKES, spoiled
from bake.verify.tolerance import FLOOR_FACTOR, logprob_tolerance

PROMPTS, TOKENS, GREEDY = 8, 16, 16
"""How many prompts a runtime is asked for, how many tokens of each, and how many greedy tokens.
llama.cpp answers one position at a time."""
UNADAPTED = 2
"""How many of the prompts an adapter's runtime serves without the adapter as well."""
TRIES = 8
"""Mistakes of a kind that are tried until the prompts reach one."""


@dataclass(frozen=True, slots=True, eq=False)
class Spoiled:
    """The hooked base model in float64, with one mistake."""

    name: str
    logprobs: Float[np.ndarray, "tokens vocab"]


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """What came of asking the runtimes."""

    rows: tuple[Row, ...]
    records: tuple[dict[str, Any], ...]
    compared: Mapping[str, Compared]
    """All numbers of each runtime that answered, over the tokens that it was asked for."""
    effect: Compared | None = None
    """Those of the base, over the same tokens."""


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
    base: Float[np.ndarray, "tokens vocab"]
    """Log-probabilities of the base model in float64."""
    floors: Mapping[str, float]
    """max |Δlog p| of the reference beside itself in other dtypes and batches, by name."""
    spoiled: tuple[Spoiled, ...] = ()
    """References with a mistake in them, which what is served has to miss."""
    most_kl: float | None = None
    """What an approximate plan may lose of the effect's KL."""


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

    def logits(chosen: Sequence[Edit]) -> Float[torch.Tensor, "tokens vocab"]:
        return run(live, batches, chosen).logits

    plain, hooked = logits(()), logits(edits)
    greedy = generate(live, asked, generate_count, edits)
    made = target_from(layout, asked, plain, hooked, {}, greedy, generate_count)
    wrong = _spoiled(artifact, made.limit, hooked, logits)
    narrow, again = {}, {}
    for dtype in dict.fromkeys((*narrow_dtypes(layout), *_stored_in(artifact))):
        live = load(base, dtype, family=family, streamed=streamed)
        narrow[dtype] = logits(edits)
        again[dtype] = run(live, halves(batches), edits).logits
    made = target_from(layout, asked, plain, hooked, narrow, greedy, generate_count, again)
    return replace(made, spoiled=wrong)


def _spoiled(
    artifact: Baked,
    limit: float,
    hooked: Float[torch.Tensor, "tokens vocab"],
    logits: Callable[[Sequence[Edit]], Float[torch.Tensor, "tokens vocab"]],
) -> tuple[Spoiled, ...]:
    """Return a spoiled reference of each kind, for what cannot be spoiled itself.

    A mistake that the prompts do not reach proves nothing either way (a site may be forgotten where
    the next one does the same), so that the next is tried then.
    """
    if artifact.kind in (CHECKPOINT, MERGE):
        return ()  # their controls are bakes of their own
    reference, found = hooked.log_softmax(-1), []
    for kind in MISTAKES:
        for name, edits in islice(spoiled(artifact.edits, artifact.plan_digest, kind), TRIES):
            table = logits(edits).log_softmax(-1)
            if largest_difference(table, reference) > 2 * limit:
                found.append(Spoiled(f"{kind}, {name}", table.numpy()))
                break
    return tuple(found)


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
    again: Mapping[torch.dtype, Float[torch.Tensor, "tokens vocab"]] = MappingProxyType({}),
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
        again: as ``narrow``, run in other batches.
    """
    logprobs, base = hooked.log_softmax(-1), plain.log_softmax(-1)
    floor = max((largest_difference(found, hooked) for found in narrow.values()), default=0.0)
    floors = {}
    for dtype, found in narrow.items():
        name = str(dtype).removeprefix("torch.")
        narrowed = found.to(torch.float64).log_softmax(-1)
        floors[f"hooked in {name} − in float64"] = largest_difference(narrowed, logprobs)
        if dtype in again:
            other = again[dtype].to(torch.float64).log_softmax(-1)
            floors[f"hooked in {name}, other batches"] = largest_difference(narrowed, other)
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
        effect=largest_difference(logprobs, base),
        vocab=hooked.shape[1],
        count=count,
        base=base.numpy(),
        floors=floors,
    )


def serve_all(
    runtimes: Runtimes,
    artifact: Baked,
    base: Checkpoint,
    target: Target,
    progress: Callable[[str], None],
) -> Served:
    """Ask every runtime, and return its rows and its record.

    A failure of one is its verdict; the others are asked all the same.
    """
    rows: list[Row] = []
    records: list[dict[str, Any]] = []
    compared: dict[str, Compared] = {}
    reference = torch.from_numpy(target.logprobs)
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
        answered = torch.from_numpy(np.concatenate(result.prompt_logprobs))
        compared[name] = compare_logits(reference, answered)
        made = (
            *_judged(name, result, artifact, target),
            *_divergence(name, artifact, target, compared[name].metrics.mean_kl),
        )
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
                "metrics": compared[name].metrics.to_json(),
            }
        )
    effect = compare_logits(reference, torch.from_numpy(target.base))
    return Served(tuple(rows), tuple(records), compared, effect)


def _ask(
    name: str,
    runtimes: Runtimes,
    artifact: Baked,
    base: Checkpoint,
    target: Target,
    scratch: Path,
) -> RuntimeResult:
    runtime, carrier = RUNTIMES[name], KINDS[artifact.kind]
    own = _only_gguf(artifact.path) if carrier.suffix == ".gguf" else artifact.path
    model = own if carrier.whole else base.path
    if runtime.gguf and model.is_dir():
        model = _converted(runtimes, model, scratch)
    request = RuntimeRequest(
        model,
        target.prompts,
        target.count,
        target.vocab,
        "float32",
        adapter=None if carrier.whole else own,
        unadapted=0 if carrier.whole else min(UNADAPTED, len(target.prompts)),
    )
    return ask(runtime, request, runtimes.python(name), timeout=runtimes.timeout)


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
        *_unadapted_rows(name, result, target, exact=exact),
        *_control_rows(name, served, artifact, target, exact=exact),
    )


def _divergence(name: str, artifact: Baked, target: Target, kl: float) -> tuple[Row, ...]:
    """KL over effect: what an approximate plan is judged by, in the runtime as elsewhere."""
    if artifact.exactness != "approximate":
        return ()
    whole = mean_kl(torch.from_numpy(target.logprobs), torch.from_numpy(target.base))
    share, most = kl / whole if whole else float("inf"), target.most_kl
    return (
        Row(
            f"{name}: mean KL(hooked ‖ served) / mean KL(hooked ‖ base)",
            share,
            most,
            None if most is None else share <= most,
            "",
            "runtime",
        ),
    )


def _unadapted_rows(
    name: str, result: RuntimeResult, target: Target, *, exact: bool
) -> tuple[Row, ...]:
    """The same engine without the adapter: it is the base, and it is not what was asked for."""
    if not result.unadapted:
        return ()
    bare = np.concatenate(result.unadapted).astype(np.float64)
    own, wrong = (np.abs(bare - t[: len(bare)]).max() for t in (target.base, target.logprobs))
    floor = f"{name}: noise floor, base served − base in float64"
    control = f"{name}: control: served without the adapter"
    return (
        # A base that is served wrong explains an adapter that is; it is not the artifact's fault.
        Row(floor, float(own), None, None, "max |Δlog p|", "floor"),
        _control(control, float(wrong), target.limit, exact=exact),
    )


def _control_rows(
    name: str, served: Float[np.ndarray, "tokens vocab"], artifact: Baked, target: Target, *,
    exact: bool,
) -> tuple[Row, ...]:  # fmt: skip
    """What is served misses every spoiled reference, so that it would be told from such a bake."""
    if artifact.kind in (CHECKPOINT, MERGE):
        return ()
    wrong = (Spoiled("nothing edited", target.base), *target.spoiled)
    return tuple(
        _control(
            f"{name}: control: {one.name}",
            float(np.abs(served - one.logprobs).max()),
            target.limit,
            exact=exact,
        )
        for one in wrong
    )


def _control(name: str, value: float, limit: float, *, exact: bool) -> Row:
    passed = value > limit if exact else None
    return Row(name, value, limit, passed, "must be larger" if exact else "", "control")


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
