"""One feature of a sparse autoencoder: a row of ``W_dec`` [features, d], and nothing else.

Gemma Scope has ``params.npz``; SAELens a folder with ``cfg.json`` and ``sae_weights.safetensors``,
whose ``hook_name`` says the site. Only the row of ``feature`` is read, whatever the file's size.
"""

import re
import zipfile
from pathlib import Path

from torch import Tensor

from bake.directions.direction import Direction, Role
from bake.directions.json_file import read_object
from bake.directions.npy import read_row
from bake.directions.reader import Content, Reader, Request
from bake.directions.safetensors_file import rows_of
from bake.directions.torch_archive import ZIP_DAMAGE
from bake.errors import DirectionError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
DECODER = "W_dec"
_HOOK = re.compile(r"blocks\.(\d{1,5})\.hook_(resid_(?:pre|mid|post))")
_MAX_CONFIG = 1 << 22


def _recognises(path: Path) -> bool:
    if path.is_dir():
        return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()
    if path.suffix == ".npz":
        try:
            with zipfile.ZipFile(path) as archive:
                return f"{DECODER}.npy" in archive.namelist()
        except ZIP_DAMAGE:
            return False
    return path.name == WEIGHTS


def _read(request: Request) -> Content:
    path = request.path
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        path = path.parent
    weights = path / WEIGHTS if path.is_dir() else path
    key = request.key or DECODER
    if request.feature is None:
        raise DirectionError(
            "the file holds the features of a sparse autoencoder, and `feature` names none",
            fix=f"set feature = 0, for example: the row of {key} that is the direction",
        )
    row = _row(weights, key, request.feature)
    site = _site(path / CONFIG) if path.is_dir() else None
    files = (path / CONFIG, weights) if path.is_dir() else (weights,)
    layer = None if site is None else int(site.rpartition(".")[2])
    said = {"feature": str(request.feature), "key": key}
    return Content((Direction({Role.VECTOR: row}, layer, site),), said, files=files)


def _row(path: Path, key: str, feature: int) -> Tensor:
    if path.suffix != ".npz":
        return rows_of(path, key, feature)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
            return read_row(file, feature)
    except KeyError as error:
        raise DirectionError(f"the archive holds no {key!r}") from error
    except ZIP_DAMAGE as error:
        raise DirectionError(f"the .npz archive cannot be read: {error}") from error


def _site(path: Path) -> str | None:
    """Return the site that SAELens names, of the residual stream; other hooks have no one site."""
    found = read_object(path, _MAX_CONFIG)
    inner = found.get("metadata")
    every = {**(inner if isinstance(inner, dict) else {}), **found}
    # A transcoder reads at hook_name and writes elsewhere, where its decoder's rows belong.
    match = _HOOK.fullmatch(str(every.get("hook_name_out") or every.get("hook_name")))
    return None if match is None else f"{match[2]}.{match[1]}"


READER = Reader(
    "a sparse autoencoder (params.npz of Gemma Scope, a folder of SAELens), with `feature`",
    _recognises,
    _read,
    frozenset({"feature", "key"}),
    kinds=("offset",),
    files=(CONFIG, WEIGHTS),
    beside=lambda name: (CONFIG,) if name == WEIGHTS else (),
)
