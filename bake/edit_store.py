"""Write edits to one safetensors file and read them back: what an artifact carries to be verified.

Each distinct map is stored once, in float64, as the tensors of its form; the metadata's ``edits``
is a JSON list of kind, concept, sites and map number.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bake.affine import AffineMap, DenseMap, DiagonalMap, LowRankMap
from bake.edits import Edit, EditKind, WeightUpdate
from bake.errors import BakeError, InputError
from bake.sites import parse_site

EDITS = "bake/edits.safetensors"
"""Where an artifact keeps the edits: in a folder of its own, since loaders glob the top level."""
FITTED = "bake/fitted.safetensors"
"""Where it keeps what was folded instead, if stand-ins were fitted for some of the edits."""
FORMAT = "bake-edits"
Maps = dict[tuple[int, str], AffineMap | WeightUpdate]
"""The maps that were read so far, by number and form: edits that shared one share it again."""
_FORMS: dict[str, tuple[type, tuple[str, ...]]] = {
    "lowrank": (LowRankMap, ("left", "right", "bias")),
    "diagonal": (DiagonalMap, ("scale", "bias")),
    "dense": (DenseMap, ("full", "bias")),
    "update": (WeightUpdate, ("left", "right")),
}


def dump_edits(edits: Sequence[Edit]) -> bytes:
    """Return the file that holds the edits; the same edits give the same bytes."""
    numbers: dict[int, int] = {}
    tensors: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for edit in edits:
        number = numbers.setdefault(id(edit.map), len(numbers))
        form, fields = next(
            (form, fields) for form, (kind, fields) in _FORMS.items() if type(edit.map) is kind
        )
        for name in fields:
            tensors[f"{number}.{name}"] = getattr(edit.map, name).clone().contiguous()
        rows.append(
            {
                "kind": str(edit.kind),
                "concept": edit.concept,
                "sites": [str(site) for site in edit.sites],
                "map": number,
                "form": form,
            }
        )
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False)
    return _ordered(save(tensors, metadata={"format": FORMAT, "version": "1", "edits": text}))


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
    number, form = int(row["map"]), str(row["form"])
    if (number, form) not in maps:
        kind, fields = _FORMS[form]
        maps[number, form] = kind(*(tensors[f"{number}.{name}"] for name in fields))
    sites = tuple(parse_site(site) for site in row["sites"])
    return Edit(EditKind(row["kind"]), str(row["concept"]), sites, maps[number, form])
