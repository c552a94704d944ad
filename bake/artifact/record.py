"""``bake.json``: its one reader, with its limits, and its one writer. ``verify.json`` beside it.

A record may be anybody's. It is read once, strictly, into ``Record``: a key that is not known, that
stands twice or that holds another type than is meant is an error, whoever asks. A record of version
1 has no number; what it could leave out and later ones write is filled in. One of a later version
than this bake knows is refused as such.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bake import __version__
from bake.artifact.carrier import KINDS
from bake.artifact.names import printable
from bake.artifact.schema import VERSION, CodedTensor, GgufRecord, PlanRecord, Provenance, Record
from bake.checkpoints import strictjson
from bake.checkpoints.folder import RECORD as RECORD
from bake.checkpoints.folder import regular_file
from bake.errors import InputError
from bake.nearby import nearby

_LIMIT = 64_000_000
# What version 1 could leave out, and version 2 always says.
_ABSENT: Mapping[str, Any] = {"allow": (), "target": ()}
_NULLS = {"base": ("revision", "digest", "path", "card"), "adapter": ("path",)}

# msgspec's names of types, in the words of bake's messages.
_TYPES = {"str": "text", "int": "number", "float": "number", "bool": "truth value", "array": "list"}
_EXPECTED = re.compile(r"Expected `(.+?)`, got `(\w+)`")
_FIELD = re.compile(r"Object (missing required|contains unknown) field `(.*)`", re.DOTALL)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON file of an artifact, read strictly.

    Raises:
        InputError: it is missing, too long or malformed.
    """
    return _read(regular_file(folder.resolve(), name), name)


def _read(path: Path, name: str) -> dict[str, Any]:
    text = strictjson.read_text(path, _LIMIT, where=name)
    return strictjson.parse_object(text, where=name, constants=True)


def read_record(folder: Path) -> Record:
    """Return the record of an artifact.

    Raises:
        InputError: the folder holds none, a malformed one, or one of a newer bake.
    """
    if not folder.is_dir():
        raise InputError(
            "this is no artifact of bake: there is no such folder",
            where=str(folder),
            fix=nearby(folder, "name what `bake export` wrote"),
        )
    return record_at(folder / RECORD, str(folder))


def record_at(path: Path, where: str) -> Record:
    """Return the record that a file holds.

    Args:
        path: the file, wherever it was fetched to.
        where: what messages name: the artifact.

    Raises:
        InputError: it cannot be read, is malformed, or of a newer bake.
    """
    try:
        content = _read(regular_file(path.parent.resolve(), path.name), RECORD)
    except (InputError, OSError) as error:
        raise InputError(
            f"this is no artifact of bake: {RECORD} cannot be read",
            where=where,
            why=str(error),
            fix="name a folder that `bake export` wrote",
        ) from error
    return parse_record(content, f"{where}/{RECORD}")


def parse_record(content: Mapping[str, Any], where: str) -> Record:
    """Return the record that JSON values describe.

    Args:
        content: as ``read_json`` returns them; of any version.
        where: the file, for messages.

    Raises:
        InputError: they are malformed, or of a version that this bake does not know.
    """
    version = content.get("schema", 1)
    if isinstance(version, int) and version > VERSION:
        raise InputError(
            f"the record is of version {version}, and this bake reads up to version {VERSION}",
            where=where,
            why="a newer bake wrote the artifact",
            fix="update bake: pip install --upgrade bake-directions",
        )
    kind = content.get("kind")
    if isinstance(kind, str) and kind not in KINDS:
        raise InputError(
            f"the kind {kind!r} is unknown", where=where, fix=f"known are {', '.join(KINDS)}"
        )
    try:
        return Record.of(content if "schema" in content else _upgraded(content))
    except msgspec.ValidationError as error:
        raise InputError(
            f"this is no artifact of bake: the record is malformed: {_reason(error)}",
            where=where,
            fix="export it again, or download it again",
        ) from error


def _upgraded(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record of version 1 as one of version 2, with the keys that it could leave out."""
    parts = ((key, content.get(key), absent) for key, absent in _NULLS.items())
    whole = {
        key: {**dict.fromkeys(absent), **part}
        for key, part, absent in parts
        if isinstance(part, dict)
    }
    return {**_ABSENT, **content, **whole, "schema": VERSION}


def _reason(error: msgspec.ValidationError) -> str:
    """Return what is wrong with a record: ``plan.findings is no list``, ``base.model is missing``.

    msgspec says the same as ``Expected `array`, got `null` - at `$.plan.findings```.
    """
    text, _, place = str(error).partition(" - at `$")
    place = place.rstrip("`").removeprefix(".")
    if match := _FIELD.fullmatch(text):
        name = f"{place}.{match[2]}".removeprefix(".")
        said = "is missing" if match[1].startswith("missing") else "is a key that nobody knows"
        return f"{printable(name)} {said}"
    if (match := _EXPECTED.match(text)) is None:
        return f"{place}: {printable(text)}"
    if match[2] == "null":
        return f"{place} is missing"
    wanted = [_TYPES.get(word, word) for word in match[1].split(" | ") if word != "null"]
    outer, bracket, index = place.rpartition("[")
    if not bracket or not place.endswith("]"):
        return f"{place or 'it'} is no {' or '.join(wanted)}"
    return f"{outer} is no {'object' if '.' in index else 'list'} of {'s or '.join(wanted)}s"


def new_record(
    provenance: Provenance,
    kind: str,
    plan: PlanRecord,
    *,
    files: Mapping[str, str] | None,
    base_tensors: Mapping[str, str] | None = None,
    gguf: GgufRecord | None = None,
    codes: Sequence[CodedTensor] = (),
) -> Record:
    """Return the record of an artifact that this bake writes.

    Args:
        provenance: what it is made from.
        kind: the carrier.
        plan: what it executes.
        files: the sha256 of every other file, by name; None where nobody knows them yet.
        base_tensors: the sha256 of the edited tensors in the base, by name.
        gguf: of a GGUF file, where it comes from.
        codes: the weights that were written back as codes.
    """
    return Record(
        **{name: getattr(provenance, name) for name in Provenance.__struct_fields__},
        bake=__version__,
        schema=VERSION,
        kind=kind,
        plan=plan,
        base_tensors=dict(base_tensors or {}),
        gguf=gguf,
        codes=tuple(codes),
        files=None if files is None else dict(files),
    )


def record_text(record: Record) -> str:
    """Return the text of ``bake.json``."""
    return json.dumps(record.to_json(), indent=2, ensure_ascii=False) + "\n"


def has_text(record: Record, text: str) -> bool:
    """Tell whether a text is what bake writes for a record; in version 1 it had no number."""
    own = record_text(record)
    return text in (own, own.replace(f'  "schema": {VERSION},\n', "", 1))
