"""The header of a safetensors file: parse it strictly, and write one for new tensors.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of little-endian length n,
n bytes of JSON that start with ``{`` and may end in spaces, then the tensors' bytes back to back.
The checks are those of the reference parser and a few that it leaves out (keys named twice,
unknown fields, names that cannot be printed).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeGuard

from bake.checkpoints import dtypes, strictjson
from bake.errors import CheckpointError

if TYPE_CHECKING:
    import torch

PREFIX = 8
"""Bytes of the length field before the header's text."""

MAX_HEADER = 100_000_000
"""Longest header text in bytes, the limit of the reference parser."""

_MAX_AXES = 64  # as many as a torch tensor can have


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies on disk.

    Attributes:
        name: the tensor's name in the checkpoint.
        dtype: the storage type as safetensors spells it, for example ``"BF16"``.
        shape: the sizes of the axes; ``()`` for a scalar.
        shard: the name of the file that holds it.
        start: offset of its first byte, counted from the start of that file.
        stop: offset past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The storage type as torch's; a CheckpointError where torch has none."""
        return dtypes.torch_dtype(self.dtype, where=f"{self.shard}: {self.name}")


def header_length(first: bytes, *, shard: str, size: int) -> int:
    """Return the length in bytes of a header's text, read from the first bytes of a file.

    Args:
        first: at least the first eight bytes, or the whole file when it is shorter.
        shard: the file's name, for messages.
        size: the file's length in bytes.

    Raises:
        CheckpointError: the file is too short for what it announces, or announces too much.
    """
    if first.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "is a Git LFS pointer and not the weights",
            where=shard,
            fix="run `git lfs pull` in that folder, or download the file from the Hub",
        )
    if size < PREFIX:
        raise CheckpointError(
            f"is truncated: expected at least {PREFIX} bytes, found {size}", where=shard
        )
    length = int.from_bytes(first[:PREFIX], "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"announces a header of {length} bytes; the limit is {MAX_HEADER}",
            where=shard,
            why="this is no safetensors file, or a hostile one",
        )
    if PREFIX + length > size:
        raise CheckpointError(
            f"is truncated: its header alone ends at byte {PREFIX + length}, found {size} bytes",
            where=shard,
        )
    return length


def parse_header(raw: bytes, *, shard: str, size: int) -> tuple[TensorInfo, ...]:
    """Return the tensors that a header describes, in the order in which their bytes lie.

    Args:
        raw: the header's text, without the length field.
        shard: the file's name.
        size: the file's length in bytes; the tensors must fill it exactly.

    Raises:
        CheckpointError: anything that the format forbids.
    """
    if not raw.startswith(b"{"):
        raise CheckpointError("has a header that does not begin with '{'", where=shard)
    if not raw.rstrip(b" ").endswith(b"}"):
        raise CheckpointError("has a header that does not end with '}'", where=shard)
    where = f"header of {shard}"
    entries = strictjson.parse_object(strictjson.decode(raw, where=where), where=where)
    _check_metadata(entries.pop("__metadata__", {}), where)
    base = PREFIX + len(raw)
    found = [_parse_entry(name, entry, shard, base) for name, entry in entries.items()]
    found.sort(key=lambda info: (info.start, info.stop))
    _check_layout(found, shard, base, size)
    return tuple(found)


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("__metadata__ is not an object of strings", where=where)


def _parse_entry(name: str, entry: Any, shard: str, base: int) -> TensorInfo:
    """Check one tensor on its own; its neighbours are checked by ``_check_layout``."""
    _check_name(name, f"header of {shard}")
    where = f"header of {shard}: {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            "a tensor is described by dtype, shape and data_offsets, and nothing else", where=where
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    _check_type(dtype, shape, where)
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"data_offsets {_brief(offsets)} is not a pair [begin, end] with begin <= end",
            where=where,
        )
    bits, span = math.prod(shape) * dtypes.BITS[dtype], offsets[1] - offsets[0]
    if bits != span * 8:
        raise CheckpointError(
            f"{dtype} of shape {_brief(shape)} does not fill the {span} bytes of its data_offsets",
            where=where,
        )
    return TensorInfo(name, dtype, tuple(shape), shard, base + offsets[0], base + offsets[1])


def _check_name(name: str, where: str) -> None:
    if not name or not name.isprintable():
        raise CheckpointError(f"the tensor name {name!r} cannot be printed", where=where)


def _check_type(dtype: Any, shape: Any, where: str) -> None:
    """Require a dtype and a shape that the format knows."""
    if not isinstance(dtype, str) or dtype not in dtypes.BITS:
        raise CheckpointError(
            f"unknown dtype {dtype!r}", where=where, fix=f"known are {', '.join(dtypes.BITS)}"
        )
    if not _naturals(shape) or len(shape) > _MAX_AXES:
        raise CheckpointError(
            f"the shape {_brief(shape)} is not a list of at most {_MAX_AXES} sizes >= 0",
            where=where,
        )


def _naturals(value: Any) -> TypeGuard[list[int]]:
    # subtle: True is an int to Python, and 2.0 is not a size although it equals one.
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def _brief(value: Any) -> str:
    text = str(value) if isinstance(value, list) and len(value) <= 8 else repr(type(value).__name__)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_layout(found: list[TensorInfo], shard: str, base: int, size: int) -> None:
    """Require tensors back to back from the header's end to the file's end."""
    position = base
    for info in found:
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a gap"
            raise CheckpointError(
                f"{what}: it begins at byte {info.start}, the bytes before end at {position}",
                where=f"header of {shard}: {info.name}",
            )
        position = info.stop
    if position > size:
        raise CheckpointError(
            f"is truncated: expected {position} bytes, found {size}",
            where=shard,
            fix="copy or download the file again",
        )
    if position < size:
        raise CheckpointError(
            f"has bytes after its last tensor: expected {position} bytes, found {size}",
            where=shard,
            why="no reader of safetensors accepts them, and they could hide another format",
        )


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    shard: str,
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """Return the first bytes of a new file and the places of its tensors.

    The layout is that of safetensors' own writer: tensors by descending type and then by name, and
    spaces so that the data begin at a multiple of eight. Its metadata come in another order in
    every run; here they are sorted.

    Args:
        tensors: dtype and shape by name.
        shard: the name of the new file.
        metadata: texts that are kept beside the tensors.

    Raises:
        CheckpointError: a name, dtype or shape that the format cannot hold.
    """
    for name, (dtype, shape) in tensors.items():
        _check_name(name, f"header of {shard}")
        _check_type(dtype, list(shape), f"header of {shard}: {name}")
    order = sorted(tensors, key=lambda name: (-dtypes.ORDER[tensors[name][0]], name))
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * dtypes.BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    size = PREFIX + len(text) + position
    return len(text).to_bytes(PREFIX, "little") + text, parse_header(text, shard=shard, size=size)
