"""What becomes of every tensor of a base: parameters of the model, brought back to the files.

A parameter may lie in the files as it is, in several tensors, or share one with another. What is
tied stays tied where the adapter makes the same of both; otherwise each gets a tensor of its own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from bake.artifact.base_digests import BaseDigests
from bake.checkpoints import Checkpoint, TensorInfo, patch_config
from bake.checkpoints.planned import PlannedModel, PlannedTensor
from bake.errors import InputError
from bake.merge.change import Change, ReadRows
from bake.merge.pieces import pieces_of
from bake.merge.skeleton import Skeleton, skeleton_of
from bake.tiles import row_count

DTYPES = ("F64", "F32", "BF16", "F16")
TIED = "tie_word_embeddings"


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One tensor that is written anew.

    Attributes:
        source: the base's tensor that it is made from.
        change: what becomes of that.
    """

    source: str
    change: Change

    @property
    def side(self) -> str:
        """How the record calls it."""
        if not self.change.changes:
            return "copied"
        return "update" if self.change.whole is None else "replaced"


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """The tensors of a base that an adapter changes, by name, and the keys of its configuration."""

    base: Checkpoint
    items: Mapping[str, Item] = field(repr=False)
    config: Mapping[str, Any]

    def planned(self, digest: str, digests: BaseDigests) -> PlannedModel:
        """Return it as what is written, and judged by a verification.

        Args:
            digest: of the plan.
            digests: takes the hashes of the base's tensors that pass.
        """
        tensors = {}
        for name, item in self.items.items():
            info = self.base.tensors[item.source]
            read = digests.watched(item.source, partial(_rows, self.base, item.source))
            tiles = partial(item.change.tiles, read, info.shape)
            tensors[name] = PlannedTensor(name, info.dtype, info.shape, tiles)
        return PlannedModel(digest, tensors, patch_config(self.base.config_text, self.config))

    @property
    def result(self) -> Checkpoint:
        """What is written, as far as configuration and headers say it."""
        new = {}
        for name, item in self.items.items():
            info = self.base.tensors[item.source]
            new[name] = TensorInfo(name, info.dtype, item.change.shape or info.shape, "", 0, 0)
        text = patch_config(self.base.config_text, self.config)
        tensors = {**self.base.tensors, **new}
        config = json.loads(text)
        return replace(self.base, config=config, config_text=text, tensors=tensors)

    def rows(self, name: str) -> ReadRows:
        """Return what gives any rows of a tensor that is written anew, in float64."""
        item = self.items[name]
        read = partial(_rows, self.base, item.source)
        return item.change.reader(read, self.base.tensors[item.source].shape)


def work_of(base: Checkpoint, skeleton: Skeleton, found: Mapping[str, Change], where: str) -> Work:
    """Return what becomes of every tensor.

    Args:
        base: the checkpoint.
        skeleton: of it.
        found: what becomes of every parameter, by its name in the model.
        where: the adapter's file, for messages.

    Raises:
        InputError: a parameter has no tensor that numbers can be added to.
    """
    items: dict[str, Item] = {}
    apart: list[tuple[str, ...]] = []
    for keys in dict.fromkeys(skeleton.tied.values()):
        sorts = _sorts(keys, found)
        if not any(found[key].changes for key in keys):
            continue
        if len(sorts) > 1:
            apart.append(tuple(sort[0] for sort in sorts))
        for sort in sorts:
            change = found[sort[0]]
            if change.changes or len(sorts) > 1:
                items |= _written(base, skeleton, keys, sort, change, where)
    config = {TIED: False} if apart else {}
    if apart:
        _check_apart(Work(base, items, config), skeleton, apart, where)
    return Work(base, items, config)


def _sorts(keys: Sequence[str], found: Mapping[str, Change]) -> list[list[str]]:
    """Return the parameters that are one tensor, those of which the same becomes together."""
    sorts: list[list[str]] = []
    for key in keys:
        same = next((sort for sort in sorts if found[sort[0]].equals(found[key])), None)
        if same is None:
            sorts.append([key])
        else:
            same.append(key)
    return sorts


def _written(
    base: Checkpoint,
    skeleton: Skeleton,
    tied: Sequence[str],
    keys: Sequence[str],
    change: Change,
    where: str,
) -> dict[str, Item]:
    """Return the tensors of some parameters that are one."""
    own = [skeleton.disk[key] for key in keys if key in skeleton.disk]
    if own:
        for name in own:
            _check_stored(base, skeleton, name, change, where)
        return {name: Item(name, change) for name in own} if change.changes else {}
    if keys[0] in skeleton.converted:
        pieces = pieces_of(skeleton, keys[0], change, base.tensors, where)
        for name, piece in pieces.items():
            _check_stored(base, skeleton, name, piece, where)
        return {name: Item(name, piece) for name, piece in pieces.items()}
    source = next((skeleton.disk[key] for key in tied if key in skeleton.disk), None)
    if source is None:
        raise _missing(base, keys[0], where)
    _check_stored(base, skeleton, source, change, where)
    new = skeleton.new_name(keys[0], base.tensors)
    if new is None:
        raise InputError(
            f"the adapter tells {keys[0]} and {source} apart, which are one tensor of the base",
            where=where,
            why="bake finds no name under which transformers would read the other one",
        )
    return {new: Item(source, change)}


def _check_apart(work: Work, before: Skeleton, apart: Sequence[Sequence[str]], where: str) -> None:
    """Require that transformers will keep apart what was tied and is two tensors now, no more."""
    after = skeleton_of(work.result.config, work.result.tensors, lambda one, two: True)
    why = None
    for first, *others in apart:
        if any(key in after.tied[first] or key not in after.disk for key in others):
            why = f"the class of the base ties them whatever {TIED} says"
    lost = [key for key in before.tied if before.held(key) and not after.held(key)]
    if lost:
        # Zamba2's blocks share their weights by the key that ties its head.
        why = f"with {TIED} = false the class would not find {lost[0]} any more"
    if why is not None:
        raise InputError(
            f"the adapter tells {' and '.join(apart[0])} apart, which are one tensor of the base",
            where=where,
            why=why,
            fix="use the adapter with PEFT, or train another with ensure_weight_tying",
        )


def _missing(base: Checkpoint, key: str, where: str) -> InputError:
    stem = key.removesuffix(".weight")
    codes = [name for name in base.tensors if f"{stem}." in f".{name}" or f"{key}_" in name]
    if codes or base.config.get("quantization_config") is not None:
        return _quantised(f"{key} is not in the base as a weight", codes, where)
    return InputError(
        f"the adapter changes {key}, which the base does not hold",
        where=where,
        why="transformers would start it at random",
        fix="fetch the checkpoint again",
    )


def _check_stored(
    base: Checkpoint, skeleton: Skeleton, name: str, change: Change, where: str
) -> None:
    """Require that a tensor holds numbers, in the shape that the change has."""
    info = base.tensors[name]
    stem, known = name.removesuffix(".weight"), {*skeleton.disk.values()}
    beside = [
        other
        for other in base.tensors
        if other.startswith((f"{stem}.", f"{name}_")) and other != name and other not in known
    ]
    if info.dtype not in DTYPES or beside:
        raise _quantised(f"the base stores {name} as {info.dtype}", beside, where)
    shape = change.shape
    if shape is not None and tuple(shape) != tuple(info.shape) and len(info.shape) == len(shape):
        raise InputError(
            f"the adapter makes {list(shape)} of {name}, which is {list(info.shape)}", where=where
        )


def _quantised(what: str, beside: Sequence[str], where: str) -> InputError:
    named = f", with {', '.join(sorted(beside)[:3])} beside it" if beside else ""
    return InputError(
        f"{what}{named}",
        where=where,
        why="the base is quantised: factors are added to weights, and these are codes",
        fix="merge into the base in F32, BF16 or F16, then quantise the result; or use the adapter "
        "beside the quantised base",
    )


def _rows(base: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    if not base.tensors[name].shape:
        return base.read(name).reshape(1)
    height, *inner = base.tensors[name].shape
    rows = row_count((height, *inner)) // max(1, height)
    return base.read_rows(name, start * rows, stop * rows).reshape(stop - start, *inner)
