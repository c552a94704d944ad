"""What PEFT makes of an adapter for a model: which parameter becomes what.

PEFT itself is asked, on a skeleton: it matches the configuration with the modules, wraps them and
loads the file, all without a value of the base. What it wrapped is then read off, so that a pattern
means what PEFT makes of it, in the version that is installed. Computed is nothing by it: sums are
made by ``bake.merge.change``, and ``bake verify`` runs PEFT at work against them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bake.errors import InputError
from bake.merge.adapter_config import CONFIG, WEIGHTS
from bake.merge.change import Change, Factors, Lengths
from bake.merge.converted import check_scales
from bake.merge.layers import bias_of, factors_of, lengths_of, rows_of
from bake.merge.limits import check_patterns
from bake.merge.reads import check_reads, check_table, taken_apart
from bake.merge.skeleton import Skeleton
from bake.merge.spots import Spot, spots_of
from bake.merge.wrapping import (
    NAME,
    check_complete,
    check_tokens,
    load_into,
    wrapped_by,
)


def changes_of(skeleton: Skeleton, folder: Path, config: Mapping[str, Any]) -> Mapping[str, Change]:
    """Return what becomes of every parameter of a model, by its name there.

    Args:
        skeleton: of the base; PEFT's wrappers are put into it, so it is of no use after.
        folder: of the adapter.
        config: its configuration, as ``read_config`` returns it.

    Raises:
        InputError: PEFT does not take the adapter up, or not all of it, or computes with it what
            is no sum of base and factors.
    """
    where, model = str(folder / WEIGHTS), skeleton.model
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    check_patterns(config, paths, str(folder / CONFIG))
    base = {id(value) for value in model.state_dict(keep_vars=True).values()}
    readers = {path: reader for path in paths if (reader := taken_apart(model, path))}
    wrapped = wrapped_by(model, folder, config)
    check_tokens(wrapped, str(folder / CONFIG))
    check_scales(wrapped, folder, config)
    before = {spot.key: id(spot.value) for spot in spots_of(wrapped.base_model.model, where)}
    load_into(wrapped, folder)
    wrapped.requires_grad_(False)
    check_complete(wrapped, base, where)
    spots = tuple(spots_of(wrapped.base_model.model, where))
    for spot in spots:
        path = spot.key.rpartition(".")[0]
        if spot.layers and path in readers:
            raise InputError(
                f"{readers[path]} reads {spot.key} without calling its layer, where PEFT's factors "
                "are",
                where=where,
                why="with the adapter at work it computes what the base computes there, and a "
                "merge would change it",
                fix=f"take the factors of {path} out of the file, and its name out of {CONFIG}",
            )
    found = _settled(spots, before, where)
    if getattr(wrapped.peft_config[NAME], "target_modules_to_tie", None):
        _check_tied(found, before, where)
    return found


def _check_tied(found: Mapping[str, Change], before: Mapping[str, int], where: str) -> None:
    """Require that tied layers have the same factors: PEFT loads both into one place.

    What scales them is each layer's own: alpha, rank and DoRA's magnitudes.
    """
    first: dict[int, str] = {}
    for key, change in found.items():
        other = first.setdefault(before[key], key)
        if not change.same_factors(found[other]):
            raise InputError(
                f"ensure_weight_tying is set, and the factors of {key} and {other} differ",
                where=where,
                why="PEFT loads one over the other",
                fix="save the adapter again where it was trained",
            )


def _settled(
    spots: tuple[Spot, ...], before: Mapping[str, int], where: str
) -> Mapping[str, Change]:
    """Return the change of every parameter; one that several share is loaded into once."""
    loaded: dict[int, tuple[str, Tensor]] = {}
    for spot in spots:
        if spot.value.is_meta:
            continue
        key, value = loaded.setdefault(before[spot.key], (spot.key, spot.value))
        if not torch.equal(value, spot.value):
            raise InputError(
                f"the file holds two values of one parameter: {key} and {spot.key} are tied",
                where=where,
                why="PEFT loads one over the other",
                fix="remove the one that is not meant from the file",
            )
    found = {}
    for spot in spots:
        _, whole = loaded.get(before[spot.key], ("", None))
        change = _change(spot, whole, where)
        for name, tensor in (("", change.whole), *_named(change)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{spot.key}{name} holds NaN or infinity", where=where)
        found[spot.key] = change
    return found


def _named(change: Change) -> Iterator[tuple[str, Tensor | None]]:
    for part in change.factors:
        yield ": a factor", part.left
        yield ": a factor", part.right
    yield ": a bias", change.offset
    yield ": a row", None if change.rows is None else change.rows.values


def _change(spot: Spot, whole: Tensor | None, where: str) -> Change:
    factors: list[Factors] = []
    offset: Tensor | None = None
    lengths: Lengths | None = None
    for layer in spot.layers:
        if spot.key.endswith("bias"):
            offset = bias_of(layer)
            continue
        check_reads(layer, spot.key, where)
        factors.append(factors_of(layer))
        lengths = lengths_of(layer, spot.key, where)
    rows = None
    if spot.tokens is not None:
        check_table(spot.tokens, spot.key, where)
        rows = rows_of(spot.tokens)
    return Change(whole, rows, tuple(factors), offset, lengths)
