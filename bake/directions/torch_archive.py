"""Read what ``torch.save`` wrote without running any code of the file.

Three locks, each enough by itself against a pickle that calls something: the archive's own
directory is checked before anything is unpacked; the pickle's opcodes are listed, not executed, and
may name only tensors, dictionaries and the classes that a reader asks for; and ``torch.load`` then
runs with ``weights_only=True``, in which each of those classes stands for a ``Record``, an inert
object of ours that keeps its fields and nothing else.
"""

import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bake.errors import DirectionError

MAX_PICKLE = 1 << 26  # bytes; the pickle holds names and shapes, the values lie beside it

_STORAGES = (
    *("Float", "Double", "Half", "BFloat16"),
    # Not floats: let through so that the message can say what the tensor holds.
    *("Long", "Int", "Short", "Char", "Byte", "Bool"),
)
PLAIN_NAMES = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        *(f"torch.{kind}Storage" for kind in _STORAGES),
    }
)
# Opcodes that reach a class or a function by another way than GLOBAL; torch.save writes none.
_INDIRECT = frozenset({"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})
# What zipfile raises on a damaged file: names that do not decode, offsets that do not exist.
ZIP_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    ValueError,
)
# What torch's unpickler raises on opcodes in an order that no writer gives them.
_MALFORMED = (
    *ZIP_DAMAGE,
    pickle.UnpicklingError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
)
_RESAVE = "open it where you trust it and save the tensors alone: torch.save({name: tensor}, path)"


class Record:
    """The fields of an object whose class is named in a pickle and never imported.

    A subclass stands for one class. Its fields are whatever the pickle says: check them.
    """

    __slots__ = ("fields",)

    fields: Mapping[str, object]

    def __new__(cls) -> "Record":
        """Return a record without fields; the unpickler makes objects without ``__init__``."""
        record = super().__new__(cls)
        record.fields = {}
        return record

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise pickle.UnpicklingError(f"the fields of {type(self).__name__} have no names")
        self.fields = state


def names_in(path: Path) -> frozenset[str]:
    """Return the classes and functions that the archive's pickle names, without executing it.

    Raises:
        DirectionError: the file is no archive of ``torch.save``, or its directory is not sound.
    """
    return _names(_code(path))


def keys_in(path: Path) -> frozenset[str]:
    """Return the texts in the archive's pickle, the keys of its dictionaries among them.

    Raises:
        DirectionError: as ``names_in``.
    """
    code = _code(path)
    _names(code)
    texts = (argument for op, argument, _ in pickletools.genops(code) if "UNICODE" in op.name)
    return frozenset(str(text) for text in texts)


def _code(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(_directory(archive, path.stat().st_size))
    except ZIP_DAMAGE as error:
        raise DirectionError(
            "the file is no archive of torch.save (a zip file)",
            why="a bare pickle, or the format of torch before 1.6, can only be read by running it",
            fix="open it where you trust it and save it again with torch.save",
        ) from error


def load(path: Path, records: Mapping[str, type[Record]] | None = None) -> object:
    """Return what the archive holds: tensors in dictionaries, lists and records.

    Args:
        path: a file that ``torch.save`` wrote.
        records: by the full name of a class in the pickle, the inert class to rebuild instead.

    Raises:
        DirectionError: as ``names_in``; or the pickle names anything but tensors, dictionaries
            and the classes of ``records``; or torch cannot read it.
    """
    records = records or {}
    foreign = names_in(path) - PLAIN_NAMES - records.keys()
    if foreign:
        raise DirectionError(
            f"the file needs {', '.join(sorted(foreign))} to be rebuilt",
            why="bake runs no code of an artifact: it reads tensors in dictionaries and lists",
            fix=_RESAVE,
        )
    try:
        with torch.serialization.safe_globals([(kind, name) for name, kind in records.items()]):
            value: object = torch.load(path, map_location="cpu", weights_only=True)
    except _MALFORMED as error:
        # torch's own text goes on to recommend weights_only=False: only its cause is passed on.
        cause = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        raise DirectionError(
            f"torch cannot read the file: {type(error).__name__}: {cause[:200]}",
            why="the archive is damaged, or was not written by torch.save",
        ) from error
    return value


def tensor_of(value: object, name: str) -> Tensor:
    """Return a value of an archive as a tensor that fits in its own storage.

    Raises:
        DirectionError: it is no tensor, or it claims more elements than are stored (a stride of
            zero repeats one number as often as a hostile file likes).
    """
    if not isinstance(value, Tensor):
        raise DirectionError(f"{name} is a {type(value).__name__} where a tensor is meant")
    claimed, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if claimed > stored:
        raise DirectionError(f"{name} claims {claimed} bytes, and its storage holds {stored}")
    return value


def _directory(archive: zipfile.ZipFile, size: int) -> zipfile.ZipInfo:
    """Check the zip's directory and return the entry of its one pickle."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1 or any(name.endswith("constants.pkl") for name in names):
        raise DirectionError(
            "the zip file is no archive of torch.save: "
            + ("it is TorchScript" if pickles else "it holds no data.pkl"),
            fix=_RESAVE,
        )
    for entry in entries:
        if names.count(entry.filename) > 1:
            raise DirectionError(f"the archive holds {entry.filename!r} twice")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise DirectionError(
                f"{entry.filename!r} in the archive is compressed or encrypted",
                why="torch.save stores plainly; what inflates can be larger than any memory",
            )
    claimed = sum(entry.file_size for entry in entries)
    if claimed > size or pickles[0].file_size > MAX_PICKLE:
        raise DirectionError(
            f"the archive claims {claimed} bytes, {pickles[0].file_size} of them a pickle, "
            f"and the file has {size}"
        )
    return pickles[0]


def _names(code: bytes) -> frozenset[str]:
    names: set[str] = set()
    try:
        for opcode, argument, _ in pickletools.genops(code):
            if opcode.name in _INDIRECT or (opcode.name == "PROTO" and argument != 2):
                raise DirectionError(
                    f"the pickle uses {opcode.name} {argument or ''}".rstrip()
                    + ", which torch.save does not write by default",
                    fix=_RESAVE,
                )
            if opcode.name == "GLOBAL":
                names.add(str(argument).replace(" ", "."))
    except ValueError as error:
        raise DirectionError(f"the pickle is malformed: {str(error)[:200]}") from error
    return frozenset(names)
