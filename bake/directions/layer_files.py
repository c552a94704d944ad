"""Folders of one file for each layer, whose names say the layer: CAA and EasyEdit 2.

CAA (arXiv 2312.06681) writes ``vec_layer_<l>_<model>.pt``, [d], and adds it to the output of block
l (``BlockOutputWrapper``). EasyEdit 2 writes ``layer_<l>.pt`` or ``layer_<l>_<mode>_trim<t>.pt``
for the same place. A folder of several models or modes needs the one that is meant as ``key``; one
file of such a name stands for itself.
"""

import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bake.directions.arrays import Place, layered, listing, one_row
from bake.directions.reader import Content, Reader, Request
from bake.directions.torch_archive import load, tensor_of
from bake.errors import DirectionError
from bake.positions import Word
from bake.sites import Site, SiteKind

_CAA = re.compile(r"vec_layer_(\d{1,5})(?:_(.+))?\.pt")
_EASYEDIT = re.compile(r"layer_(\d{1,5})(?:_(.+))?\.pt")


def _named(path: Path, pattern: re.Pattern[str]) -> dict[Path, re.Match[str]]:
    """Return the files of a system at a path, a folder or one of them, by their names."""
    paths = sorted(path.iterdir()) if path.is_dir() else [path]
    matches = {file: pattern.fullmatch(file.name) for file in paths if file.is_file()}
    return {file: match for file, match in matches.items() if match is not None}


def _read(request: Request, pattern: re.Pattern[str]) -> Content:
    named = _named(request.path, pattern)
    groups = sorted({match[2] or "" for match in named.values()})
    if request.key is None and len(groups) > 1:
        raise DirectionError(
            f"the folder holds files of {listing(groups)}", fix="name one of them with `key`"
        )
    if not named or (request.key is not None and request.key not in groups):
        raise DirectionError(
            f"there are no files of {request.key!r}" if named else "there is no file of a layer",
            fix=f"the folder holds {listing(groups)}" if named else None,
        )
    rows: dict[Place, Tensor] = {}
    taken: list[Path] = []
    for file, match in named.items():
        if request.key in (None, match[2] or ""):
            layer = int(match[1])
            place = layer, str(Site(SiteKind.RESID_POST, layer))
            if place in rows:
                raise DirectionError(f"two files are of layer {layer}: {file.name} is the second")
            rows[place] = one_row(tensor_of(load(file), file.name), file.name)
            taken.append(file)
    key = request.key or groups[0]
    return replace(layered(rows).beside({"key": key} if key else {}), files=tuple(taken))


CAA = Reader(
    "vectors of CAA (a folder of vec_layer_<l>_<model>.pt, or one of them)",
    lambda path: bool(_named(path, _CAA)),
    lambda request: _read(request, _CAA),
    frozenset({"key"}),
    kinds=("offset",),
    positions=Word.AFTER_INSTRUCTION,
    globs=("vec_layer_*.pt",),
)
EASYEDIT = Reader(
    "vectors of EasyEdit 2 (a folder of layer_<l>.pt or layer_<l>_<mode>_trim<t>.pt)",
    lambda path: path.is_dir() and bool(_named(path, _EASYEDIT)),
    lambda request: _read(request, _EASYEDIT),
    frozenset({"key"}),
    kinds=("offset",),
    globs=("layer_*.pt",),
)
