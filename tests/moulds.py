"""Models that transformers has read once: copies of them, filled with the tensors of other files.

What transformers makes of a configuration and of the names, shapes and types in a file depends on
no value. A tensor becomes a parameter or a buffer as it is, or its values go somewhere else:
experts become a stack, say. Where to is seen from a file that holds numbers in their place.
"""

import copy
import io
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

Read = Callable[[Path, torch.dtype], PreTrainedModel]
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Mould:
    """Makes copies of a model, in a quarter of the time that ``copy.deepcopy`` takes for each."""

    def __init__(self, model: PreTrainedModel) -> None:
        file = io.BytesIO()
        pickler = _ByNumber(file, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.dump(model)
        self._pickled, self._parts = file.getvalue(), copy.deepcopy(pickler.parts)

    def cast(self) -> PreTrainedModel:
        """Return a copy, which shares nothing with another that it could change."""
        unpickler = _ByNumber.Reader(io.BytesIO(self._pickled))
        unpickler.parts = copy.deepcopy(self._parts)
        model: PreTrainedModel = unpickler.load()
        return model


class _ByNumber(pickle.Pickler):
    """Leaves out tensors, which are slow to pickle, and functions, some of which have no name."""

    class Reader(pickle.Unpickler):
        parts: list[Any]

        def persistent_load(self, number: int) -> Any:
            return self.parts[number]

    def __init__(self, file: io.BytesIO, *, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self.parts: list[Any] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, part: Any) -> int | None:
        if not isinstance(part, Tensor | FunctionType):
            return None
        number = self._numbers.setdefault(id(part), len(self.parts))
        if number == len(self.parts):
            self.parts.append(part)
        return number


class Filling:
    """Where in a model the values of a file's tensors are."""

    def __init__(self, same: tuple[str, ...], moved: dict[str, Tensor]) -> None:
        self._same, self._moved = same, moved

    @classmethod
    def seen(cls, model: PreTrainedModel, path: Path, read: Read) -> Self | None:
        """Return what ``read`` did with a file; None where values are computed, not placed."""
        tensors = tensors_of(path)
        here = _places(model)
        same = tuple(n for n in tensors if n in here and _equal(here[n], tensors[n]))
        filled = {id(here[name]) for name in same}
        left = {n: id(t) for n, t in here.items() if id(t) not in filled}
        moved: dict[str, Tensor] = {}
        if left:
            if any(t.dtype not in PLAIN for t in tensors.values()):
                return None
            numbered = _places(_numbered(tensors, path, read))
            once = {place: name for name, place in left.items()}
            moved = {name: numbered[name].long() for name in once.values()}
            size = sum(tensor.numel() for tensor in tensors.values())
            if any(int(t.min()) < 0 or int(t.max()) >= size for t in moved.values()):
                return None
        filling = cls(same, moved)
        values = dict(filling._values(tensors))
        placed = {id(here[name]) for name in values}
        if placed != {id(t) for t in here.values()} or sum(
            value.numel() for value in values.values()
        ) < sum(value.numel() for value in tensors.values()):
            return None
        return filling if all(_equal(here[n], value) for n, value in values.items()) else None

    def fill(self, model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
        """Put the tensors of a file into a model."""
        places = _places(model)
        with torch.no_grad():
            for name, value in self._values(tensors):
                places[name].copy_(value)

    def _values(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, tensors[name]) for name in self._same)
        if self._moved:
            row = _row(tensors)
            yield from ((name, row[numbers]) for name, numbers in self._moved.items())


def _places(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what a file can fill."""
    found: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return found


def _equal(place: Tensor, value: Tensor) -> bool:
    return place.shape == value.shape and torch.equal(place, value.to(place.dtype))


def _row(tensors: dict[str, Tensor]) -> Tensor:
    """Return all values in a row."""
    return torch.cat([tensors[name].reshape(-1).double() for name in sorted(tensors)])


def _numbered(tensors: dict[str, Tensor], path: Path, read: Read) -> PreTrainedModel:
    """Return the model of a file that holds, for every value, its number in the row."""
    with tempfile.TemporaryDirectory() as folder:
        for file in path.glob("*.json"):
            shutil.copy(file, folder)
        numbers, first = {}, 0
        for name in sorted(tensors):
            shape, last = tensors[name].shape, first + tensors[name].numel()
            numbers[name] = torch.arange(first, last, dtype=torch.float64).reshape(shape)
            first = last
        for shard in path.glob("*.safetensors"):
            own = {name: numbers[name] for name in load_file(shard)}
            save_file(own, Path(folder) / shard.name, {"format": "pt"})
        return read(Path(folder), torch.float64)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(path.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors
