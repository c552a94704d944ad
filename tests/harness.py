"""Bake a tiny model and compare it with the hook-steered base, in float64."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
from exporting import written
from torch import Tensor
from transformers import PreTrainedModel

from bake.affine import AffineMap
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.edits import Edit, EditKind, WeightUpdate
from bake.families import Layout
from bake.plan import Plan, compile_plan
from bake.sites import expand
from bake.steer import steered
from bake.verify.precision import double_precision

RELATIVE = 1e-9  # of the effect: what float64 has to reach


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A tiny base model on disk and in memory."""

    path: Path
    checkpoint: Checkpoint
    model: PreTrainedModel
    layout: Layout


@dataclass(frozen=True, slots=True)
class Measured:
    """Largest logit differences."""

    effect: float
    error: float


@cache
def base_at(path: Path) -> Base:
    """Return the base at a path, loaded once."""
    return Base(path, open_checkpoint(path), tiny.load(path), tiny.layout_of(path))


def vector(width: int, seed: int = 0) -> Tensor:
    """Return a random vector in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, generator=generator, dtype=torch.float64)


def matrix(width: int, seed: int = 0) -> Tensor:
    """Return a random square matrix with singular values around one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5


def orthogonal(width: int, seed: int = 0) -> Tensor:
    """Return a random orthogonal matrix."""
    return torch.linalg.qr(matrix(width, seed))[0]


def edit(
    base: Base, kind: str, map_: AffineMap | WeightUpdate, at: str | Sequence[str], name: str = "c"
) -> Edit:
    """Return an edit at the sites that patterns select."""
    sites = expand(
        at, layers=base.layout.layers, stream=base.layout.stream, having=base.layout.sites
    )
    return Edit(EditKind(kind), name, sites, map_)


def plan_of(
    base: Base,
    edits: Sequence[Edit],
    *,
    allow: Iterable[str] = (),
    targets: Iterable[str] = ("transformers",),
    widen: int | None = None,
) -> Plan:
    """Return the plan of some edits."""
    return compile_plan(
        edits,
        base.layout,
        gain=lambda name: base.checkpoint.read(name).to(torch.float64),
        config=base.checkpoint.config,
        allow=allow,
        targets=targets,
        widen=widen,
    )


def bake(base: Base, plan: Plan, out: Path, **options: Any) -> Path:
    """Write the planned checkpoint and return its folder."""
    record = {"base": {"model": str(base.path)}}
    return written("checkpoint", plan, base.checkpoint, out, record=record, **options).path


def logits(model: PreTrainedModel, base: Base, edits: Sequence[Edit] = ()) -> Tensor:
    """Return the logits of the standard tokens, in float64, under the edits as hooks."""
    with torch.no_grad(), double_precision(), steered(model, base.layout, edits):
        result: Tensor = model(tiny.tokens(), use_cache=False).logits
    return result


@cache
def plain_logits(base: Base) -> Tensor:
    """Return the base model's logits of the standard tokens, computed once."""
    return logits(base.model, base)


def measure(base: Base, edits: Sequence[Edit], baked: Path) -> Measured:
    """Return effect (hooked − base) and error (baked − hooked)."""
    hooked = logits(base.model, base, edits)
    effect = float((hooked - plain_logits(base)).abs().max())
    error = float((logits(tiny.load(baked), base) - hooked).abs().max())
    return Measured(effect, error)
