"""LM-Steer (arXiv 2305.12798): ``[args, state, step]`` as its ``train.py`` saves it.

The state holds ``projector1`` and ``projector2`` [steers, d, r], or ``add_vec`` [steers, d]. What
enters the head, the final norm's output, becomes s + ε v (s P1) P2ᵀ, or s + ε a v
(``Projected_Adaptor.forward``). ε is among the arguments and stands in what is read here; the
steering value v is the recipe's ``strength`` or ``coefficient``. ``feature`` picks one steer of
several. ``offset_vec`` is added to the logits, and no direction.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bake.directions.direction import Direction, Role
from bake.directions.reader import Content, Reader, Request
from bake.directions.torch_archive import Record, keys_in, load, tensor_of
from bake.errors import DirectionError
from bake.sites import SiteKind

PAIR, ADDED = ("projector1", "projector2"), "add_vec"
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


class Arguments(Record):
    """Stands for ``argparse.Namespace``."""


RECORDS: Mapping[str, type[Record]] = {"argparse.Namespace": Arguments}


def _recognises(path: Path) -> bool:
    if path.suffix not in _SUFFIXES or not path.is_file():
        return False
    try:
        keys = keys_in(path)
    except DirectionError:  # which the reader of plain .pt files says better
        return False
    return {*PAIR} <= keys or ADDED in keys


def _read(request: Request) -> Content:
    value = load(request.path, RECORDS)
    found = value if isinstance(value, list | tuple) else []
    if len(found) != 3 or not isinstance(found[0], Arguments) or not isinstance(found[1], dict):
        raise DirectionError("the file is no list of arguments, state and step of LM-Steer")
    epsilon, state = found[0].fields.get("epsilon"), found[1]
    if not isinstance(epsilon, int | float) or isinstance(epsilon, bool) or not 0 < epsilon < 1e6:
        raise DirectionError(f"the arguments say epsilon = {epsilon!r}, which scales the steering")
    steers = [_picked(state, name, request) for name in (*PAIR, ADDED) if name in state]
    said = {"epsilon": f"{epsilon:g}", "site": "what enters the head"}
    site = str(SiteKind.LN_FINAL_OUT)
    if len(steers) == 2:
        if steers[0].dim() != 2:
            raise DirectionError(f"{PAIR[0]} has steers of shape {list(steers[0].shape)}")
        roles = {Role.LEFT: epsilon * steers[1], Role.RIGHT: steers[0].T}
        return Content((Direction(roles, None, site),), said)
    if len(steers) == 1 and ADDED in state:
        return Content((Direction({Role.VECTOR: epsilon * steers[0]}, None, site),), said)
    raise DirectionError(
        f"the state holds {', '.join(map(str, state))}",
        why=f"a steer is {' and '.join(PAIR)}, or {ADDED}",
    )


def _picked(state: Mapping[str, object], name: str, request: Request) -> Tensor:
    """Return one steer of a tensor [steers, …] in float64."""
    tensor = tensor_of(state[name], name)
    if tensor.dim() not in (2, 3) or not tensor.is_floating_point():
        raise DirectionError(f"{name} has shape {list(tensor.shape)} where [steers, d, …] is meant")
    count = tensor.shape[0]
    if request.feature is None and count != 1:
        raise DirectionError(
            f"the file holds {count} steers",
            fix="name one with feature, counted from 0: LM-Steer trains the first",
        )
    if (request.feature or 0) >= count:
        raise DirectionError(f"there is no steer {request.feature}: the file holds {count}")
    return tensor[request.feature or 0].to(torch.float64)


READER = Reader(
    "a checkpoint of LM-Steer, saved by torch.save ([args, state, step])",
    _recognises,
    _read,
    frozenset({"feature"}),
    kinds=("linear",),
)
