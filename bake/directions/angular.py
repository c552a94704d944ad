"""Angular Steering (arXiv 2510.26243): ``.npy`` of {module: {first_direction, second_direction}}.

Its hook takes the component of a norm's output in the plane of both vectors to an angle, with the
length that it had: h − P h + ‖P h‖ (cos θ b₁ + sin θ b₂), with adaptive mode 1 only where h·b₁ > 0
(``AngularSteeringOperator.steer``). The file is a dictionary that NumPy pickles. It is rebuilt from
inert stand-ins: of NumPy's own classes nothing is run.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bake.directions.direction import Direction, Role
from bake.directions.modules import modules_of, places_of
from bake.directions.npy import header_of
from bake.directions.reader import Content, Reader, Request
from bake.errors import DirectionError

FIRST, SECOND = "first_direction", "second_direction"
_FLOATS = ("f2", "f4", "f8")
_MAX_PICKLE = 1 << 28


class _Type:
    """Stands for ``numpy.dtype``: its description."""

    def __init__(self, described: object = "", *_: object) -> None:
        self.described = described if isinstance(described, str) else ""

    def __setstate__(self, _: object) -> None:
        """Keep the description; byte order is that of the machine, as NumPy saves it."""


class _Array:
    """Stands for ``numpy.ndarray``: its state, which is checked before it is taken for one."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def tensor(self, name: str) -> Tensor:
        """Return the vector that the state describes."""
        state = self.state if isinstance(self.state, tuple) and len(self.state) == 5 else ()
        if not state or not isinstance(state[2], _Type) or not isinstance(state[4], bytes):
            raise DirectionError(f"{name} is no array of numbers")
        kind = state[2].described.lstrip("<=|")
        if kind not in _FLOATS:
            raise DirectionError(f"{name} holds {kind!r} values where floats are meant")
        if len(state[4]) % np.dtype(kind).itemsize or not state[4]:
            raise DirectionError(f"{name} holds {len(state[4])} bytes, which are no {kind} values")
        return torch.from_numpy(np.frombuffer(state[4], np.dtype(kind)).copy())


def _reconstruct(*_: object) -> _Array:
    return _Array()


_NAMES: Mapping[tuple[str, str], object] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
}


class _Unpickler(pickle.Unpickler):
    """Knows the names of NumPy's arrays, as inert stand-ins, and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        """Return what stands for a name of the pickle."""
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: object) -> object:
        """Refuse: such files have none."""
        raise pickle.UnpicklingError("it names an object outside of it")


def _recognises(path: Path) -> bool:
    if path.suffix != ".npy" or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(1 << 16)
    return b"|O" in start[:200] and FIRST.encode() in start and SECOND.encode() in start


def _read(request: Request) -> Content:
    found = _dictionary(request.path)
    places = places_of([str(name) for name in found])
    unknown = [name for name in found if places.get(str(name), (None, None))[1] is None]
    if unknown:
        raise DirectionError(f"bake knows no site for {unknown[0]!r}")
    items = []
    for name, own in found.items():
        if not isinstance(own, dict) or not {FIRST, SECOND} <= own.keys():
            raise DirectionError(f"{name!r} has no {FIRST} and {SECOND}")
        rows = [own[key] for key in (FIRST, SECOND)]
        if not all(isinstance(row, _Array) for row in rows):
            raise DirectionError(f"the directions of {name!r} are no arrays")
        vectors = [row.tensor(f"a direction of {name!r}") for row in rows]
        if vectors[0].shape != vectors[1].shape:
            raise DirectionError(f"the two directions of {name!r} differ in their widths")
        plane = torch.stack([vector.to(torch.float64) for vector in vectors])
        items.append(Direction({Role.SUBSPACE: plane}, *places[str(name)]))
    if not items:
        raise DirectionError("the dictionary is empty")
    return Content(tuple(items), modules_of(places))


def _dictionary(path: Path) -> Mapping[object, object]:
    """Return the dictionary in a .npy file of one pickled object.

    Raises:
        DirectionError: it holds another thing, or what only running it could rebuild.
    """
    data = path.read_bytes()
    described, _, shape, start = header_of(data)
    if "O" not in described or shape or len(data) - start > _MAX_PICKLE:
        raise DirectionError(f"an array of {described} and shape {list(shape)} is no dictionary")
    try:
        outer = _Unpickler(io.BytesIO(data[start:])).load()
        state = outer.state if isinstance(outer, _Array) else None
        inner = state[4] if isinstance(state, tuple) and len(state) == 5 else None
        value = inner[0] if isinstance(inner, list) and len(inner) == 1 else None
    except (
        pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError,
        OverflowError, MemoryError, ImportError, RecursionError, AssertionError,
    ) as error:  # fmt: skip
        raise DirectionError(
            f"the pickled dictionary cannot be read: {str(error)[:200]}",
            why="bake runs no code of an artifact: it reads dictionaries of plain arrays",
        ) from error
    if not isinstance(value, dict):
        raise DirectionError(f"the file holds a {type(value).__name__} where a dictionary is meant")
    return value


READER = Reader(
    "a configuration of Angular Steering (.npy of a dictionary by module)",
    _recognises,
    _read,
    kinds=("rotate",),
    says="Angular Steering takes the component in its plane to an angle, with the length that it "
    "had; a fixed turn (`degrees`) is another function, and `angle` is no affine map",
)
