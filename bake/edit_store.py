"""Write edits to one safetensors file and read them back: what an artifact carries to be verified.

Each distinct map is stored once, in float64, as the tensors of its form; the metadata's ``edits``
is a JSON list of kind, concept, sites and map number.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bake.affine import AffineMap, DenseMap, DiagonalMap, LowRankMap
from bake.edits import Edit, EditKind, Own, WeightUpdate
from bake.errors import BakeError, InputError
from bake.nonlinear import Aimed, Clamp, Gated, Masked, Measure, Nonlinear, NormPreserving
from bake.positions import Positions
from bake.sites import parse_site

EDITS = "bake/edits.safetensors"
"""Where an artifact keeps the edits: in a folder of its own, since loaders glob the top level."""
FITTED = "bake/fitted.safetensors"
"""Where it keeps what was folded instead, if stand-ins were fitted for some of the edits."""
FORMAT = "bake-edits"
Map = AffineMap | WeightUpdate | Nonlinear
Maps = dict[tuple[int, str], Map]
"""The maps that were read so far, by number and form: edits that shared one share it again."""


@dataclass(frozen=True, slots=True)
class _Form:
    """How a map is stored: its tensors by name, its plain values and the map in it in its row."""

    of: type
    tensors: tuple[str, ...] = ()
    plain: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """How each of its numbers and words is read."""
    inner: bool = False
    """Whether it holds another map."""


def _numbers(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(map(float, values))


_FORMS: Mapping[str, _Form] = MappingProxyType(
    {
        "lowrank": _Form(LowRankMap, ("left", "right", "bias")),
        "diagonal": _Form(DiagonalMap, ("scale", "bias")),
        "dense": _Form(DenseMap, ("full", "bias")),
        "update": _Form(WeightUpdate, ("left", "right")),
        "clamp": _Form(
            Clamp, ("left", "right", "mean"), {"low": float, "high": float, "thresholds": _numbers}
        ),
        "masked": _Form(Masked, ("scale", "bias", "low", "high")),
        "norm-preserving": _Form(NormPreserving, inner=True),
        "aimed": _Form(Aimed, ("plane", "aim")),
        "gated": _Form(
            Gated, ("vector",), {"threshold": float, "above": bool, "measure": Measure}, inner=True
        ),
    }
)


def dump_edits(edits: Sequence[Edit]) -> bytes:
    """Return the file that holds the edits; the same edits give the same bytes."""
    stored = _Stored({}, {})
    rows: list[dict[str, Any]] = []
    for edit in edits:
        row = {
            "kind": str(edit.kind),
            "concept": edit.concept,
            "sites": [str(site) for site in edit.sites],
            **stored.row(edit.map),
        }
        if edit.inner is not None:
            row["map_kind"] = str(edit.inner)
        if edit.own is not None:
            row["own"] = {"positions": edit.own.positions.text}
            if edit.own.map is not None:
                row["own"] |= stored.row(edit.own.map)
        rows.append(row)
    tensors = stored.tensors
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False)
    return _ordered(save(tensors, metadata={"format": FORMAT, "version": "1", "edits": text}))


@dataclass(frozen=True, slots=True)
class _Stored:
    """What of the maps is stored so far."""

    numbers: dict[int, int]
    tensors: dict[str, Tensor]

    def row(self, map_: Map) -> dict[str, Any]:
        """Return what the row of an edit says of its map, once its tensors are among the others."""
        number = self.numbers.setdefault(id(map_), len(self.numbers))
        name, form = next((n, form) for n, form in _FORMS.items() if type(map_) is form.of)
        for tensor in form.tensors:
            self.tensors[f"{number}.{tensor}"] = getattr(map_, tensor).clone().contiguous()
        row = {"map": number, "form": name, **{word: getattr(map_, word) for word in form.plain}}
        # JSON has no infinity: a limit that is none is left out.
        row = {word: value for word, value in row.items() if value not in _UNLIMITED}
        return row | ({"inner": self.row(map_.map)} if form.inner else {})  # type: ignore[union-attr]


_UNLIMITED = (-math.inf, math.inf)


def _ordered(content: bytes) -> bytes:
    """Return a safetensors file with its metadata in order: the library writes it in any."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def edit_files(asked: Sequence[Edit], folded: Sequence[Edit]) -> dict[str, bytes]:
    """Return the files of an artifact that hold its edits, by name.

    Args:
        asked: what the hooks apply, and a verification compares with.
        folded: what went into the weights; another sequence where stand-ins were fitted.
    """
    files = {EDITS: dump_edits(asked)}
    if folded is not asked:
        files[FITTED] = dump_edits(folded)
    return files


def load_edits(path: Path) -> tuple[Edit, ...]:
    """Return the edits of a file that ``dump_edits`` made.

    Raises:
        InputError: the file is missing, or is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"the edits cannot be read: {error}", where=str(path)) from error
    if metadata.get("format") != FORMAT or metadata.get("version") != "1":
        raise InputError(f"the file is not in the format {FORMAT} 1", where=str(path))
    try:
        maps: Maps = {}
        return tuple(_edit(row, tensors, maps) for row in json.loads(metadata["edits"]))
    except (LookupError, TypeError, ValueError, RecursionError, BakeError) as error:
        raise InputError(f"the edits are malformed: {error!r}", where=str(path)) from error


def _edit(row: dict[str, Any], tensors: dict[str, Tensor], maps: Maps) -> Edit:
    sites = tuple(parse_site(site) for site in row["sites"])
    own = None
    if "own" in row:
        said = row["own"]
        found = _map(said, tensors, maps) if "map" in said else None
        assert found is None or isinstance(found, Nonlinear)
        own = Own(Positions(str(said["positions"])), found)
    edit_map = _map(row, tensors, maps)
    inner = EditKind(row["map_kind"]) if "map_kind" in row else None
    return Edit(EditKind(row["kind"]), str(row["concept"]), sites, edit_map, own, inner)


def _map(row: dict[str, Any], tensors: dict[str, Tensor], maps: Maps) -> Map:
    number, name = int(row["map"]), str(row["form"])
    if (number, name) not in maps:
        form = _FORMS[name]
        values = {word: tensors[f"{number}.{word}"] for word in form.tensors}
        limits = dict(zip(("low", "high"), _UNLIMITED, strict=True))
        plain = {word: read(row.get(word, limits.get(word))) for word, read in form.plain.items()}
        inner = {"map": _map(row["inner"], tensors, maps)} if form.inner else {}
        maps[number, name] = form.of(**values, **plain, **inner)
    return maps[number, name]
