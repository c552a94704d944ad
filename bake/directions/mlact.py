"""AcT and AurA of apple/ml-act (arXiv 2410.23054): a folder of ``<module>.statedict``.

Each file is the state of one hook on a module's output (act/hooks/transport.py, aura_hook.py):
``net.w1`` and ``net.b1`` [1, d] of a linear map; ``mu1``, ``mu2``, ``std1``, ``std2`` [d] of a mean
or a Gaussian transport, which look alike; or ``auroc`` [d]. The hook leaves neurons outside the
quantiles of its fit alone unless they are ``q_all``. That is the caller's word and not the file's,
and so is ``strength``.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bake.directions.arrays import Place, listing, one_row
from bake.directions.direction import SAYS, Direction, Role
from bake.directions.modules import modules_of, places_of
from bake.directions.reader import Content, Reader, Request
from bake.directions.torch_archive import load, tensor_of
from bake.errors import DirectionError

SUFFIX = ".statedict"
ALL = "q_all"
METHODS = ("mean", "gaussian")
_DEAD = 1e-4
"""The standard deviation below which GaussianOTHook leaves a unit alone."""


def _files(path: Path) -> list[Path]:
    paths = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in paths if file.suffix == SUFFIX and file.is_file()]


def _read(request: Request) -> Content:
    if request.method not in (None, *METHODS):
        raise DirectionError(f"method = {request.method!r} is none of {', '.join(METHODS)}")
    files: dict[str, Path] = {}
    for file in _files(request.path):
        # A tuple's first element is the module's output; another one is not the stream's.
        name = file.name.removesuffix(SUFFIX).removesuffix(":0")
        if name in files:
            raise DirectionError(f"{files[name].name} and {file.name} are of one module's output")
        files[name] = file
    places = places_of(list(files))
    unknown = [name for name in files if name not in places or places[name][1] is None]
    if unknown or not files:
        raise DirectionError(f"bake knows no site for {listing(unknown or [request.path.name])}")
    items = [_item(file, places[name], request) for name, file in files.items()]
    said = {}
    if any(Role.LOW in item.tensors for item in items):
        said[SAYS] = (
            f"ml-act maps each neuron between the quantiles {request.quantiles} of its fit only; "
            "the weights map every value"
        )
    return Content(tuple(items), modules_of(places) | said, files=tuple(files.values()))


def _item(file: Path, place: Place, request: Request) -> Direction:
    state = load(file)
    if not isinstance(state, dict):
        raise DirectionError(f"{file.name} is no state of a hook")
    if "auroc" in state:
        auroc = _row(state, "auroc", file)
        factor = torch.where(auroc > 0.5, 1 - 2 * (auroc - 0.5), torch.ones_like(auroc))
        return Direction({Role.SCALE: factor}, *place)
    limits = _limits(state, request, file)
    if "net.w1" in state:
        scale, shift = _row(state, "net.w1", file), _row(state, "net.b1", file)
        return Direction({Role.SCALE: scale, Role.OFFSET: shift, **limits}, *place)
    if request.method is None:
        raise DirectionError(
            f"{file.name} holds means and deviations, of a mean or of a Gaussian transport",
            why="the files of both look alike",
            fix='set method = "mean" or method = "gaussian"',
        )
    mu1, mu2, std1, std2 = (_row(state, name, file) for name in ("mu1", "mu2", "std1", "std2"))
    if len({mu1.numel(), mu2.numel(), std1.numel(), std2.numel()}) > 1:
        raise DirectionError(f"mu1, mu2, std1 and std2 of {file.name} differ in their widths")
    live = (std1 > _DEAD) & (std2 > _DEAD)
    ratio = std2 / std1 if request.method == "gaussian" else torch.ones_like(std1)
    scale = torch.where(live, ratio, torch.ones_like(std1))
    shift = torch.where(live, mu2 - ratio * mu1, torch.zeros_like(mu1))
    return Direction({Role.SCALE: scale, Role.OFFSET: shift, **limits}, *place)


def _limits(state: Mapping[str, object], request: Request, file: Path) -> dict[Role, Tensor]:
    """Return the values between which the map of a hook acts; none where it maps all of them.

    The state has ``quantiles_dict_src``, {name: (low, high)}, and ``quantiles_src``, a name or, of
    a hook that was loaded once, the pair itself.

    Raises:
        DirectionError: nothing says which they are, or the file does not hold those that are said.
    """
    said = request.quantiles or state.get("quantiles_src")
    if said == ALL:
        return {}
    if request.quantiles is not None:
        held = state.get("quantiles_dict_src")
        pair = held.get(said) if isinstance(held, dict) else state.get("quantiles_src")
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            known = ", ".join(map(repr, held)) if isinstance(held, dict) else "none by name"
            raise DirectionError(
                f"{file.name} holds no quantiles {said!r} of its fit",
                why=f"it holds {known}",
                fix=f'set quantiles = "{ALL}" if the system was run with it',
            )
        low, high = (_row({"limit": one}, "limit", file) for one in pair)
        return {Role.LOW: low, Role.HIGH: high}
    raise DirectionError(
        f"{file.name} acts between the quantiles {said!r} of its fit"
        if isinstance(said, str)
        else f"{file.name} does not say between which quantiles of its fit it acts",
        why="the mask depends on the activation, so that no affine map is the same function",
        fix=f'set quantiles = "{ALL}" to apply the map to all values: another function, unless the '
        f'system was run with {ALL}; or name the quantiles, "q_0_100" for example, for kind = '
        '"masked-scale"',
    )


def _row(state: Mapping[str, object], name: str, file: Path) -> Tensor:
    """Return a tensor of a state as a vector in float64."""
    label = f"{name} of {file.name}"
    return one_row(tensor_of(state.get(name), label), label).to(torch.float64)


READER = Reader(
    f"hooks of ml-act (a folder of <module>{SUFFIX}, or one of them)",
    lambda path: bool(_files(path)),
    _read,
    frozenset({"method", "quantiles"}),
    kinds=("scale",),
    globs=(f"*{SUFFIX}",),
)
