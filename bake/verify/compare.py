"""Compare a baked checkpoint with the hook-steered base model, logit by logit.

The reference shares no code with the fold: it loads the base with transformers, puts the edits on
as hooks and runs it. The baked checkpoint is loaded as any user would load it.
"""

import json
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bake import __version__
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.edit_store import load_edits
from bake.edits import Edit
from bake.errors import ExactnessBug, InputError, VerificationFailed
from bake.families import Layout, find_family, read_family, resolve
from bake.steer import steered
from bake.verify.precision import double_precision
from bake.verify.report import Report, Row
from bake.verify.tolerance import FLOOR_FACTOR, logit_tolerance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD, EDITS = "bake.json", "bake/edits.safetensors"
TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Softcapped attention exists in eager mode only, and grouped expert kernels take no float64.
LOADING = {"attn_implementation": "eager", "experts_implementation": "eager"}

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Baked:
    """A baked checkpoint with the record that it carries."""

    path: Path
    record: dict[str, Any]
    edits: tuple[Edit, ...]

    @property
    def exactness(self) -> str:
        """What the plan says of the artifact."""
        return str(self.record["plan"]["exactness"])


def open_baked(path: Path) -> Baked:
    """Return a baked checkpoint.

    Raises:
        InputError: the folder holds no record of bake, or a malformed one.
    """
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        kind, plan, base = record["kind"], record["plan"], record["base"]
        _ = plan["digest"], plan["exactness"], base["model"]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"this is no artifact of bake: {RECORD} cannot be read ({error!r})",
            where=str(path),
            fix="name a folder that `bake export` wrote",
        ) from error
    if kind != "checkpoint":
        raise InputError(f"bake verifies checkpoints, and this is a {kind}", where=str(path))
    return Baked(path, record, load_edits(path / EDITS))


def compare(
    out: Path,
    *,
    base: str | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    family: Path | None = None,
    progress: Progress = lambda text: None,
) -> Report:
    """Measure how far a baked checkpoint lies from the hook-steered base model.

    Args:
        out: a folder that ``bake export`` wrote.
        base: the base model's folder or Hub id; as recorded when None.
        prompts: token ids; random ones of several lengths when None.
        family: a table of the user's own, where the export used one.
        progress: told what is being done.

    Raises:
        InputError: the artifact or the base cannot be read, or the base is another one.
        ExactnessBug: a plan that says EXACT measures otherwise.
    """
    baked = open_baked(out)
    checkpoint = open_checkpoint(base or _recorded_base(baked), complete=True)
    recorded = baked.record["base"].get("digest")
    if recorded is not None and checkpoint.digest() != recorded:
        raise InputError(
            f"{checkpoint.source} is not the base that the artifact was made from",
            why=f"its digest is {checkpoint.digest()}, the record has {recorded}",
            fix="name the right base with --base",
        )
    layout = layout_of(checkpoint, family)
    tokens = _tensors(prompts) if prompts else random_tokens(layout.dims["vocab"])
    return _Comparison(baked, checkpoint, layout, tokens, progress).report()


def layout_of(checkpoint: Checkpoint, family: Path | None = None) -> Layout:
    """Return the layout of a checkpoint, from its config and headers."""
    table = find_family(checkpoint.config) if family is None else read_family(family)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
    return resolve(table, checkpoint.config, shapes, dtypes)


def random_tokens(vocab: int) -> tuple[Tensor, ...]:
    """Return batches of random token ids, [2, 8], [2, 24] and [1, 48], the same every time."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8), (2, 24), (1, 48))
    return tuple(torch.randint(0, vocab, shape, generator=generator) for shape in shapes)


def _tensors(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([list(prompt)]) for prompt in prompts)


def _recorded_base(baked: Baked) -> str:
    base = baked.record["base"]
    if base.get("path") is not None:
        return str(baked.path / base["path"])
    return f"{base['model']}@{base['revision']}" if base.get("revision") else str(base["model"])


@dataclass(frozen=True, slots=True)
class _Runs:
    """Logits of every token of every prompt, [tokens, vocab], in float64."""

    base: Tensor
    hooked: Tensor
    baked: Tensor


@dataclass(slots=True)
class _Comparison:
    """One base, one baked checkpoint, some tokens."""

    baked: Baked
    checkpoint: Checkpoint
    layout: Layout
    tokens: tuple[Tensor, ...]
    progress: Progress

    def report(self) -> Report:
        storage = TORCH[self.layout.dtype]
        exact = self._runs(torch.float64)
        serving = exact if storage == torch.float64 else self._runs(storage)
        rows = self._rows(storage, exact, serving)
        report = Report(
            artifact=str(self.baked.path),
            base=self.checkpoint.source,
            plan_digest=str(self.baked.record["plan"]["digest"]),
            exactness=self.baked.exactness,
            dtype=self.layout.dtype,
            rows=rows,
            environment=_environment(),
        )
        return report

    def _runs(self, dtype: torch.dtype) -> _Runs:
        name = str(dtype).removeprefix("torch.")
        self.progress(f"base and hooked model in {name}")
        model = _load(self.checkpoint.path, dtype)
        base = self._logits(model, dtype, ())
        hooked = self._logits(model, dtype, self.baked.edits)
        del model
        self.progress(f"baked model in {name}")
        return _Runs(base, hooked, self._logits(_load(self.baked.path, dtype), dtype, ()))

    def _logits(
        self, model: "PreTrainedModel", dtype: torch.dtype, edits: Sequence[Edit]
    ) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if dtype == torch.float64:
                stack.enter_context(double_precision())
            if edits:
                stack.enter_context(steered(model, self.layout, edits))
            batches = [model(tokens, use_cache=False).logits for tokens in self.tokens]
        return torch.cat([logits.flatten(0, 1).to(torch.float64) for logits in batches])

    def _rows(self, storage: torch.dtype, exact: _Runs, serving: _Runs) -> tuple[Row, ...]:
        scale = float(exact.hooked.abs().max())
        tolerance = partial(
            logit_tolerance, layers=self.layout.layers, hidden=self.layout.hidden, scale=scale
        )
        effect = _largest(exact.hooked - exact.base)
        floor = _largest(serving.hooked - exact.hooked)
        wide = storage in (torch.float64, torch.float32)
        limit = tolerance(storage) if wide else FLOOR_FACTOR * floor
        smallest = tolerance(torch.float64)
        error = _largest(exact.baked - exact.hooked)
        demanded = self.baked.exactness == "exact"
        rows = [
            Row("effect: hooked − base", effect, smallest, effect > smallest, "must be larger"),
            Row(
                "baked − hooked, evaluated in float64",
                error,
                limit,
                error <= limit if demanded else None,
                f"{error / effect:.1e} of the effect" if effect else "no effect",
            ),
        ]
        if storage != torch.float64:
            dtype = str(storage).removeprefix("torch.")
            measured = _largest(serving.baked - exact.hooked)
            allowed = FLOOR_FACTOR * floor + (limit if wide else 0.0)
            rows += [
                Row(f"noise floor: hooked in {dtype} − in float64", floor, None, None),
                Row(
                    f"baked in {dtype} − hooked in float64",
                    measured,
                    allowed,
                    measured <= allowed if demanded else None,
                ),
            ]
        agreement = (serving.baked.argmax(-1) == serving.hooked.argmax(-1)).double().mean()
        rows.append(Row("same most likely token", float(agreement), None, None, "share of tokens"))
        rows.append(Row("mean KL(hooked ‖ baked)", _divergence(serving), None, None, "nats"))
        return tuple(rows)


def raise_unless_passed(report: Report) -> None:
    """Raise what a failed report means.

    Raises:
        VerificationFailed: the edit has no effect, or a plan that is not exact missed a limit.
        ExactnessBug: a plan that says EXACT measures otherwise.
    """
    if report.passed:
        return
    effect, *others = report.rows
    if effect.passed is False:
        raise VerificationFailed(
            f"the edit has no effect: hooked and base differ by {effect.value:.1e}",
            where=report.artifact,
            why="equality proves nothing where nothing was changed",
            fix="look at the direction and the sites with `bake plan`",
        )
    missed = next((row for row in others if row.passed is False), None)
    if missed is None:
        raise VerificationFailed("nothing was demanded of this artifact", where=report.artifact)
    raise ExactnessBug(
        f"{missed.name}: {missed.value:.2e} is above {missed.limit:.2e}",
        where=report.artifact,
        why="the plan says EXACT, so the files were changed after the export, or bake is wrong",
        fix="export again; if it fails again, report it with bake.json",
    )


def _load(path: Path, dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, output_loading_info=True, local_files_only=True, **LOADING
    )
    wrong = {key: sorted(names) for key, names in info.items() if names}
    if wrong:
        raise InputError(
            f"transformers loads this checkpoint with {wrong}",
            where=str(path),
            why="a tensor that the class does not expect, or lacks, changes the model in silence",
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _divergence(runs: _Runs) -> float:
    hooked, baked = (x.log_softmax(-1) for x in (runs.hooked, runs.baked))
    return float((hooked.exp() * (hooked - baked)).sum(-1).mean())


def _environment() -> dict[str, str]:
    import transformers

    return {
        "bake": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
