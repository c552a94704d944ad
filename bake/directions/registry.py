"""``read_directions``: choose the reader of an artifact by closed rules, and read it.

A further format is one more file beside this one and one more row of ``READERS``.
"""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

from bake.checkpoints.hashes import sha256_of
from bake.directions import (
    activations,
    angular,
    arditi,
    bake_format,
    heretic,
    iti,
    layer_files,
    leace,
    lm_steer,
    mlact,
    npy,
    npz,
    pt,
    pyvene,
    quadratic,
    repeng,
    rnngineering,
    rome,
    sae,
    safetensors_file,
    steering_vectors,
    svec,
    wisent,
)
from bake.directions.direction import POSITIONS, SAYS, Direction, Directions
from bake.directions.reader import Options, Reader, Request, Shape
from bake.errors import DirectionError, UsageError
from bake.nearby import nearby
from bake.section import nearest
from bake.sites import parse_site

READERS: Mapping[str, Reader] = MappingProxyType(
    {
        # The systems' own formats come first: their files have a plain format's extension too.
        "activations": activations.READER,
        "angular": angular.READER,
        "arditi": arditi.READER,
        "bake": bake_format.READER,
        "caa": layer_files.CAA,
        "easyedit": layer_files.EASYEDIT,
        "heretic": heretic.READER,
        "iti": iti.READER,
        "leace": leace.READER,
        "lm-steer": lm_steer.READER,
        "mlact": mlact.READER,
        "pyvene": pyvene.READER,
        "quadratic": quadratic.READER,
        "repeng": repeng.READER,
        "rnngineering": rnngineering.READER,
        "rome": rome.READER,
        "sae": sae.READER,
        "steering-vectors": steering_vectors.READER,
        "svec": svec.READER,
        "wisent": wisent.READER,
        "npy": npy.READER,
        "npz": npz.READER,
        "pt": pt.READER,
        "safetensors": safetensors_file.READER,
    }
)

PLAIN = ("npy", "npz", "pt", "safetensors")
"""Formats of no system, which some systems' files have as well."""

RESEMBLES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        r"adapter_config\.json": (
            "an adapter of PEFT, as heretic saves one too",
            "merge it with `bake merge BASE ADAPTER`",
        ),
        r".*head_wise\.npy": (
            "activations of ITI without the labels that go with them",
            "put its …_labels.npy beside it and name the …_head_wise.npy",
        ),
        r"layer_?\d+\.(npy|npz|safetensors|pkl)|.*_layer_?\d+\.(npy|npz|safetensors|pkl)": (
            "one file for each layer",
            "save them together: torch.save({layer: vector}, 'all.pt')",
        ),
    }
)
"""What a file or a folder of no known format may be, by the names in it, and what to do then."""


NOT_THE_FILE: Mapping[bytes, tuple[str, str]] = MappingProxyType(
    {
        b"": ("it is empty", "fetch or save it again"),
        b"version https://git-lfs": (
            "it is a pointer of Git LFS to the file, and not the file",
            "run `git lfs pull` where it was cloned, or download the file itself",
        ),
        b"<!doctype html": (
            "it is a web page",
            "download the file itself: /resolve/ in its address on the Hub, and not /blob/",
        ),
        b"<html": ("it is a web page", "download the file itself"),
    }
)
"""What comes in place of a file of whatever name, by its first bytes, and what to do then."""


def read_directions(
    path: Path, *, reader: str | None = None, **options: Unpack[Options]
) -> Directions:
    """Return the directions of an artifact, checked, with where they came from.

    Args:
        path: a file, or the folder of a system that writes one.
        reader: a name of ``READERS``; without it the path's extension and content choose.
        options: what the artifact cannot say itself: the fields of ``Request``. ``shape`` is a
            word of ``Shape``.

    Raises:
        UsageError: an unknown reader or shape, or an option that the format has no use for.
        DirectionError: the artifact is missing, malformed, hostile, of no known format, or needs
            an option.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if "shape" in given:
        given["shape"] = Shape(_known(given["shape"], "shape", tuple(Shape)))
    request = Request(path, **given)
    try:
        if not path.is_file() and not path.is_dir():
            raise DirectionError("there is no such file or folder", fix=nearby(path))
        _check_is_it(path)
        name = _choose(request) if reader is None else _known(reader, "reader", READERS)
        _check_options(name, request)
        content = READERS[name].read(request)
        return Directions(
            concept=content.concept or path.stem,
            format=name,
            source=str(path),
            digest=digest(content.files or (path,)),
            items=tuple(sorted(content.items, key=_order)),
            metadata=_said(READERS[name], content.metadata),
        )
    except OSError as error:
        raise DirectionError(
            f"cannot be opened: {error.strerror or error}", where=str(path)
        ) from error
    except DirectionError as error:
        where = str(path) if error.where in (None, str(path)) else f"{path}: {error.where}"
        raise DirectionError(error.what, where=where, why=error.why, fix=error.fix) from error


def digest(files: Sequence[Path]) -> str:
    """Return ``sha256:…``: of one file, its own; of several, that of what ``sha256sum`` prints.

    For a folder with the files a and b, it is that of ``sha256sum a b`` run inside the folder.
    """
    hashes = [(sha256_of(path), path.name) for path in files]
    if len(hashes) == 1:
        return f"sha256:{hashes[0][0]}"
    listing = "".join(f"{value}  {name}\n" for value, name in hashes)
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def _check_is_it(path: Path) -> None:
    """Refuse what downloads leave in place of a file: what its reader says of it would mislead."""
    if path.is_dir():
        return
    with path.open("rb") as file:
        start = file.read(max(map(len, NOT_THE_FILE))).lower()
    for magic, (what, fix) in NOT_THE_FILE.items():
        if start.startswith(magic) if magic else not start:
            raise DirectionError(what, fix=fix)


def _order(item: Direction) -> tuple[float, int, int]:
    """Sort as a forward pass reaches what was fitted; what belongs to no layer comes first."""
    if item.site is not None:
        return parse_site(item.site).order
    return -1.0 if item.layer is None else item.layer, 0, 0


def _said(reader: Reader, metadata: Mapping[str, str]) -> dict[str, str]:
    said = {POSITIONS: reader.positions, SAYS: reader.says}
    return {**{key: text for key, text in said.items() if text}, **metadata}


def _choose(request: Request) -> str:
    path = request.path
    found = [name for name, reader in READERS.items() if reader.recognises(path)]
    systems = [name for name in found if name not in PLAIN]
    if len(systems) > 1:
        raise DirectionError(
            f"it holds what {' and '.join(systems)} write, and one of them is meant",
            why="what the others wrote would be left out without a word",
            fix=" or ".join(f'reader = "{name}"' for name in systems),
        )
    if found:
        return found[0]
    kind = "a folder without the files of a known system" if path.is_dir() else _content(path)
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else [path.name]
    for pattern, (what, fix) in RESEMBLES.items():
        if any(re.fullmatch(pattern, name) for name in names):
            raise DirectionError(f"no reader recognises it: it resembles {what}", fix=fix)
    raise DirectionError(
        f"no reader recognises it: it is {kind}",
        fix="load it where you trust it, and save the vector with numpy.save or safetensors"
        if "pickle" in kind
        else "save its vectors as .npy, .pt or .safetensors, of several blocks by their numbers: "
        "torch.save({12: vector}, 'v.pt'); or name the format with reader: "
        f"{', '.join(READERS)}",
    )


def _content(path: Path) -> str:
    """Return what a file of an unknown extension is, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(8)
    known = {
        b"\x93NUMPY": "a NumPy array",
        b"PK\x03\x04": "a zip archive, as torch.save and numpy.savez write",
        b"GGUF": "a GGUF file",
        b"\x80": "a bare Python pickle, which only running it can read",
        b"{": "JSON text",
    }
    for magic, kind in known.items():
        if start.startswith(magic):
            return f"{kind} with the extension {path.suffix!r}"
    return f"a file with the extension {path.suffix!r}"


def _known(word: str, what: str, known: Collection[str]) -> str:
    if word not in known:
        raise UsageError(f"there is no {what} {word!r}", fix=nearest(word, known))
    return word


def _check_options(name: str, request: Request) -> None:
    for option in Options.__annotations__:
        value = getattr(request, option)
        if value is not None and option not in READERS[name].options:
            raise UsageError(
                f"the format {name!r} has no use for {option} = {str(value)!r}",
                where=str(request.path),
                why="its files say themselves what they hold",
                fix=f"leave `{option}` out",
            )
