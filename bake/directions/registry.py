"""``read_directions``: choose the reader of an artifact by closed rules, and read it.

A further format is one more file beside this one and one more row of ``READERS``.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from bake.checkpoints.hashes import sha256_of
from bake.directions import (
    arditi,
    bake_format,
    leace,
    npy,
    npz,
    pt,
    repeng,
    safetensors_file,
)
from bake.directions.direction import Directions
from bake.directions.reader import Reader, Request, Shape
from bake.errors import DirectionError, UsageError
from bake.section import nearest

READERS: Mapping[str, Reader] = MappingProxyType(
    {
        # The systems' own formats come first: their files have a plain format's extension too.
        "arditi": arditi.READER,
        "bake": bake_format.READER,
        "leace": leace.READER,
        "repeng": repeng.READER,
        "npy": npy.READER,
        "npz": npz.READER,
        "pt": pt.READER,
        "safetensors": safetensors_file.READER,
    }
)


def read_directions(
    path: Path, *, reader: str | None = None, key: str | None = None, shape: str | None = None
) -> Directions:
    """Return the directions of an artifact, checked, with where they came from.

    Args:
        path: a file, or the folder of a system that writes one.
        reader: a name of ``READERS``; without it the path's extension and content choose.
        key: the name of one tensor or eraser, where the artifact holds several.
        shape: ``"vector"``, ``"subspace"`` or ``"layers"``, where a plain tensor's shape can be
            read in two ways.

    Raises:
        UsageError: an unknown reader or shape, or an option that the format has no use for.
        DirectionError: the artifact is missing, malformed, hostile, of no known format, or needs
            ``key`` or ``shape``.
    """
    meant = None if shape is None else Shape(_known(shape, "shape", tuple(Shape)))
    request = Request(path, key, meant)
    try:
        if not path.is_file() and not path.is_dir():
            raise DirectionError("there is no such file or folder")
        name = _choose(path) if reader is None else _known(reader, "reader", READERS)
        _check_options(name, request)
        content = READERS[name].read(request)
        return Directions(
            concept=content.concept or path.stem,
            format=name,
            source=str(path),
            digest=digest(content.files or (path,)),
            items=content.items,
            metadata=content.metadata,
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


def _choose(path: Path) -> str:
    for name, reader in READERS.items():
        if reader.recognises(path):
            return name
    kind = "a folder without the files of a known system" if path.is_dir() else _content(path)
    raise DirectionError(
        f"no reader recognises it: it is {kind}",
        why="the formats are "
        + "; ".join(f"{name}, {reader.summary}" for name, reader in READERS.items()),
        fix="name the reader if the file has another extension than its format's",
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
    given = {"key": request.key, "shape": request.shape}
    for option, value in given.items():
        if value is not None and option not in READERS[name].options:
            raise UsageError(
                f"the format {name!r} has no use for {option} = {str(value)!r}",
                where=str(request.path),
                why="its files say themselves what they hold",
                fix=f"leave `{option}` out",
            )
