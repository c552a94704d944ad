"""Interventions of pyreft and pyvene: a folder with ``config.json`` and ``intkey_<key>.bin``.

``IntervenableModel.save`` writes the state of one intervention for each of ``representations``,
named by its key, and its class in ``intervention_types``. LoReFT (arXiv 2404.03592) is
h + R (W h + b − Rᵀh) with R ``rotate_layer`` [d, r], W ``weight`` [r, d] and b ``bias`` [r]
(pyreft/interventions.py); an ``AdditionIntervention`` adds its ``source_representation``. The
activation inside LoReFT is taken as linear, its default: it is not in the file.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bake.directions.arrays import STACK, Place
from bake.directions.direction import Direction, Role
from bake.directions.json_file import read_object
from bake.directions.modules import modules_of, places_of
from bake.directions.reader import Content, Reader, Request
from bake.directions.torch_archive import load, tensor_of
from bake.errors import DirectionError
from bake.sites import Site, SiteKind

CONFIG = "config.json"
_MAX_CONFIG = 1 << 22
_FIELDS = ("layer", "component", "unit", "max_number_of_units")
"""The first of a RepresentationConfig, which a configuration holds as a list or as an object."""
# mlp_activation is absent: with gates it is what act_fn returns, before the product with up_proj.
_COMPONENTS = {
    "block_input": SiteKind.RESID_PRE,
    "block_output": SiteKind.RESID_POST,
    "attention_value_output": SiteKind.Z,
    "attention_output": SiteKind.ATTN_OUT,
    "mlp_output": SiteKind.MLP_OUT,
}
_PATH = re.compile(STACK + r"(?:layers|h)\[(\d{1,5})\](\.[a-z_.]+)?\.output")
_NAME = re.compile(r"[\w\[\].]{1,200}")


def _recognises(path: Path) -> bool:
    return path.is_dir() and (path / CONFIG).is_file() and any(path.glob("intkey_*.bin"))


def _read(request: Request) -> Content:
    folder = request.path
    config = read_object(folder / CONFIG, _MAX_CONFIG)
    kinds, where = config.get("intervention_types"), config.get("representations")
    if not (isinstance(kinds, list) and isinstance(where, list) and len(kinds) == len(where) > 0):
        raise DirectionError(
            f"{CONFIG} has no intervention_types and representations of one length"
        )
    items: list[Direction] = []
    modules: dict[str, str] = {}
    files = [folder / CONFIG]
    times: Counter[str] = Counter()
    for kind, row in zip(kinds, where, strict=True):
        layer, component, unit, units = _fields(row)
        if unit != "pos":
            raise DirectionError(
                f"the intervention at {component} of layer {layer} has the unit {unit!r}",
                why="it acts on some heads, and its vectors are as wide as one of them",
                fix="save what it does at z.<layer>.h<head> in bake's own format",
            )
        name = component.replace(".", "_")
        start = f"comp_{name}" if "." in component else f"layer_{layer}_comp_{name}"
        key = f"{start}_unit_{unit.replace('.', '_')}_nunit_{units}"
        files.append(folder / f"intkey_{key}#{times[key]}.bin")
        times[key] += 1
        place, said = _place(layer, component)
        items.append(Direction(_tensors(str(kind), files[-1]), *place))
        modules |= said
    return Content(tuple(items), modules, files=tuple(files))


def _fields(row: object) -> tuple[int, str, str, int]:
    """Return layer, component, unit and number of units of a representation."""
    values = [row.get(k) for k in _FIELDS] if isinstance(row, Mapping) else row
    match values:
        case [int(layer), str(component), str(unit), int(units), *_] if layer >= 0:
            if _NAME.fullmatch(component) and _NAME.fullmatch(unit):
                return layer, component, unit, units
    raise DirectionError(f"{CONFIG} holds a representation that is none: {str(row)[:80]}")


def _place(layer: int, component: str) -> tuple[Place, dict[str, str]]:
    """Return the place of a representation, and what of its module a recipe has to check."""
    if component in _COMPONENTS:
        return (layer, str(Site(_COMPONENTS[component], layer))), {}
    match = _PATH.fullmatch(component)
    name = "" if match is None else f"layers.{match[1]}{match[2] or ''}"
    if match is not None and not match[2]:
        return (int(match[1]), str(Site(SiteKind.RESID_POST, int(match[1])))), {}
    places = places_of([name])
    if name not in places:
        raise DirectionError(
            f"bake knows no site for the component {component!r} of layer {layer}",
            why=f"it knows {', '.join(_COMPONENTS)} and the outputs of modules",
        )
    return places[name], modules_of(places)


def _tensors(kind: str, file: Path) -> dict[Role, Tensor]:
    # As Python writes a class: <class 'pyreft.interventions.LoreftIntervention'>.
    make = _MAPS.get((re.findall(r"\w+", kind) or [""])[-1])
    if make is None:
        raise DirectionError(
            f"the intervention {kind[:80]!r} is none that bake reads",
            why=f"it reads {' and '.join(_MAPS)}",
            fix="save what it does as the roles of bake's own format, where it is an affine map",
        )
    state = load(file)
    if not isinstance(state, dict):
        raise DirectionError(f"{file.name} is no state of an intervention")
    if "interchange_dim" in state:
        part, whole = (tensor_of(state.get(k), k) for k in ("interchange_dim", "embed_dim"))
        if not torch.equal(part, whole):
            raise DirectionError(
                f"{file.name} changes {part.tolist()} of {whole.tolist()} channels",
                fix="save the vector that is added, with zeros for the other channels",
            )

    def get(key: str) -> Tensor:
        return tensor_of(state.get(key), f"{key} of {file.name}").to(torch.float64)

    try:
        return make(get)
    except RuntimeError as error:  # factors of sizes that do not fit
        raise DirectionError(f"the tensors of {file.name} do not fit: {error}") from error


Get = Callable[[str], Tensor]


def _loreft(get: Get) -> dict[Role, Tensor]:
    turn = get("rotate_layer")
    return {Role.LEFT: turn, Role.RIGHT: get("weight") - turn.mT, Role.BIAS: turn @ get("bias")}


def _addition(get: Get) -> dict[Role, Tensor]:
    return {Role.VECTOR: get("source_representation").reshape(-1)}


_MAPS: Mapping[str, Callable[[Get], dict[Role, Tensor]]] = {
    "LoreftIntervention": _loreft,
    "AdditionIntervention": _addition,
}

READER = Reader(
    f"interventions of pyreft or pyvene (a folder with {CONFIG} and intkey_*.bin)",
    _recognises,
    _read,
    kinds=("linear", "offset"),
    globs=(CONFIG, "intkey_*.bin"),
    says="pyreft intervenes at the first and last tokens of the prompt that its data say; the "
    "weights do it at every position, and with a linear act_fn, which the files do not name",
)
