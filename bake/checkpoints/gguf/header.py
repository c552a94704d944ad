"""The header of a GGUF file: parse it strictly, and write one that differs in a few keys.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Magic, version, the counts of
tensors and of metadata keys, the keys with their values, the tensors' descriptions, padding to the
alignment, then the tensors' bytes, each padded. A header is copied key by key as bytes, so that a
value is never decoded and encoded again. The checks are those of ggml's own reader
(ggml/src/gguf.cpp) and a few more.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from bake.checkpoints.gguf.types import BY_NUMBER, GgmlType
from bake.errors import CheckpointError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_HEADER = 1 << 30
"""Longest header in bytes. Vocabularies of a quarter of a million tokens take some ten million."""

_VERSIONS = (2, 3)
# Type numbers of metadata values (``gguf_type``) as struct spells them.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY, _UINT32, _BOOL = 8, 9, 4, 7
_MAX_AXES, _MAX_NAME, _MAX_ALIGNMENT = 4, 63, 1 << 16  # GGML_MAX_DIMS, GGML_MAX_NAME less a zero


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: its name.
        kind: its type.
        shape: the sizes of its axes, the contiguous one last (the reverse of ggml's order).
        shard: the name of the file that holds it.
        start: offset of its first byte, counted from the start of that file.
        stop: offset past its last byte, without padding.
    """

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    shard: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class GgufValue:
    """One metadata value: its bytes as the file has them, and what they mean if it is a scalar."""

    raw: bytes
    """Type and value, as they follow the key."""
    value: int | float | bool | bytes | None
    """A string's bytes, a scalar, or None for an array."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Everything of one file that stands before its tensors' bytes."""

    version: int
    alignment: int
    metadata: Mapping[str, GgufValue]
    tensors: tuple[GgufTensor, ...]

    def text(self, key: str) -> str | None:
        """Return a string value, or None where the key is missing or holds something else."""
        found = self.metadata.get(key)
        if found is None or not isinstance(found.value, bytes):
            return None
        return found.value.decode("utf-8", errors="replace")

    def number(self, key: str) -> int | None:
        """Return a whole number, or None where the key is missing or holds something else."""
        found = self.metadata.get(key)
        return found.value if found is not None and type(found.value) is int else None


class _Cursor:
    """Reads a file front to back and never past its end."""

    def __init__(self, file: BinaryIO, shard: str, size: int) -> None:
        self.file, self.shard, self.size = file, shard, size
        self.position = 0

    def error(self, what: str, **rest: str) -> CheckpointError:
        return CheckpointError(what, where=f"header of {self.shard}", **rest)

    def take(self, count: int) -> bytes:
        if count > min(self.size, MAX_HEADER) - self.position:
            raise self.error(
                f"is truncated or hostile: {count} bytes are announced at byte {self.position}, "
                f"and the file has {self.size}"
            )
        found = self.file.read(count)
        if len(found) != count:
            raise self.error("became shorter while it was read")
        self.position += count
        return found

    def unpack(self, form: str) -> int:
        (found,) = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))
        return int(found)

    def string(self) -> bytes:
        return self.take(self.unpack("Q"))

    def name(self, what: str) -> str:
        raw = self.string()
        text = raw.decode("utf-8", errors="replace")
        if not raw or not text.isprintable() or "\ufffd" in text:
            raise self.error(f"the name {raw[:80]!r} of a {what} cannot be printed")
        return text


def parse_header(file: BinaryIO, *, shard: str, size: int) -> GgufHeader:
    """Return the header of a file that is read from its beginning.

    Args:
        file: the file, at offset 0.
        shard: its name, for messages.
        size: its length in bytes; the tensors must fill it.

    Raises:
        CheckpointError: anything that the format forbids.
    """
    cursor = _Cursor(file, shard, size)
    if size < 24 or cursor.take(4) != MAGIC:
        raise CheckpointError("is no GGUF file: it does not begin with 'GGUF'", where=shard)
    version = _version(cursor)
    tensors, keys = cursor.unpack("Q"), cursor.unpack("Q")
    # A key takes 13 bytes at least and a tensor 33, so that counts alone cannot fill the memory.
    if keys * 13 + tensors * 33 > size:
        raise cursor.error(f"announces {tensors} tensors and {keys} keys in {size} bytes")
    metadata: dict[str, GgufValue] = {}
    for _ in range(keys):
        key = cursor.name("key")
        if key in metadata:
            raise cursor.error(f"names the key {key!r} twice")
        metadata[key] = _value(cursor, key)
    alignment = _alignment(cursor, metadata.get("general.alignment"))
    rows = [_tensor_row(cursor) for _ in range(tensors)]
    base = padded(cursor.position, alignment)
    found = _placed(rows, shard, base, alignment, size)
    return GgufHeader(version, alignment, metadata, found)


def padded(position: int, alignment: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-position // alignment) * alignment


def _version(cursor: _Cursor) -> int:
    version = cursor.unpack("I")
    if version in _VERSIONS:
        return version
    if version & 0xFFFF == 0:
        raise cursor.error(
            "is a big-endian GGUF file", fix="convert it with gguf-py's gguf-convert-endian"
        )
    raise cursor.error(
        f"has GGUF version {version}; bake reads {' and '.join(map(str, _VERSIONS))}",
        fix="convert the model again with a current llama.cpp",
    )


def _value(cursor: _Cursor, key: str) -> GgufValue:
    kind = cursor.unpack("I")
    head = struct.pack("<I", kind)
    if kind == _STRING:
        text = cursor.string()
        return GgufValue(head + struct.pack("<Q", len(text)) + text, text)
    if kind in _SCALARS:
        raw = cursor.take(struct.calcsize(f"<{_SCALARS[kind]}"))
        if kind == _BOOL and raw not in (b"\0", b"\1"):
            raise cursor.error(f"{key} is a truth value with the byte {raw[0]}")
        (value,) = struct.unpack(f"<{_SCALARS[kind]}", raw)
        return GgufValue(head + raw, value)
    if kind == _ARRAY:
        return GgufValue(head + _array(cursor, key), None)
    raise cursor.error(f"{key} has the unknown value type {kind}")


def _array(cursor: _Cursor, key: str) -> bytes:
    """Return the bytes of an array: type of the items, their count, the items."""
    kind, count = cursor.unpack("I"), cursor.unpack("Q")
    head = struct.pack("<IQ", kind, count)
    if kind in _SCALARS:
        return head + cursor.take(count * struct.calcsize(f"<{_SCALARS[kind]}"))
    if kind != _STRING:
        raise cursor.error(
            f"{key} is an array of items of type {kind}", why="ggml reads no such array"
        )
    if count * 8 > cursor.size - cursor.position:
        raise cursor.error(f"{key} announces {count} strings, more than the file can hold")
    parts = [head]
    for _ in range(count):
        length = cursor.take(8)
        parts += [length, cursor.take(int.from_bytes(length, "little"))]
    return b"".join(parts)


def _alignment(cursor: _Cursor, value: GgufValue | None) -> int:
    if value is None:
        return DEFAULT_ALIGNMENT
    found = value.value
    is_uint32 = value.raw[:4] == struct.pack("<I", _UINT32)
    if not is_uint32 or not isinstance(found, int) or not 1 <= found <= _MAX_ALIGNMENT:
        raise cursor.error(f"general.alignment = {found!r} is no alignment")
    if found & (found - 1):
        raise cursor.error(f"general.alignment = {found} is no power of two")
    return found


def _tensor_row(cursor: _Cursor) -> tuple[str, GgmlType, tuple[int, ...], int]:
    """Return name, type, shape and offset of one tensor, each checked on its own."""
    name = cursor.name("tensor")
    if len(name.encode()) > _MAX_NAME:
        raise cursor.error(f"the tensor name {name[:80]!r} is longer than {_MAX_NAME} bytes")
    axes = cursor.unpack("I")
    if not 1 <= axes <= _MAX_AXES:
        raise cursor.error(f"{name} has {axes} axes; a tensor has 1 to {_MAX_AXES}")
    sizes = tuple(cursor.unpack("Q") for _ in range(axes))
    if not 0 < math.prod(sizes) < 1 << 60:
        raise cursor.error(f"{name} has the sizes {list(sizes)}")
    number = cursor.unpack("I")
    if number not in BY_NUMBER:
        raise cursor.error(
            f"{name} has the unknown type {number}",
            why="without its block size nothing after it can be found",
        )
    return name, BY_NUMBER[number], sizes[::-1], cursor.unpack("Q")


def _placed(
    rows: Sequence[tuple[str, GgmlType, tuple[int, ...], int]],
    shard: str,
    base: int,
    alignment: int,
    size: int,
) -> tuple[GgufTensor, ...]:
    """Return the tensors, once they are seen to lie back to back up to the end of the file."""
    found: dict[str, GgufTensor] = {}
    position = 0
    end = base
    for name, kind, shape, offset in rows:
        where = f"header of {shard}: {name}"
        if name in found:
            raise CheckpointError("is named twice", where=where)
        if offset != position:
            raise CheckpointError(
                f"begins at offset {offset}, and the tensors before it end at {position}",
                where=where,
                why="ggml reads only tensors that lie back to back",
            )
        count = kind.tensor_bytes(shape, where=where)
        end = base + position + count
        found[name] = GgufTensor(name, kind, shape, shard, base + position, end)
        position = padded(position + count, alignment)
    if size < end:
        raise CheckpointError(
            f"is truncated: expected {end} bytes, found {size}",
            where=shard,
            fix="copy or download the file again",
        )
    if size > max(padded(end, alignment), base):
        raise CheckpointError(
            f"has bytes after its last tensor: expected {padded(end, alignment)} bytes, found "
            f"{size}",
            where=shard,
            why="no reader of GGUF looks at them, and they could hide another format",
        )
    return tuple(found.values())


def text_of(value: GgufValue, key: str, *, errors: str = "strict") -> str:
    """Return a value as text, the items of an array one after another.

    Args:
        value: of a key.
        key: its name, for messages.
        errors: what becomes of bytes that are no UTF-8, as ``bytes.decode`` names it.

    Raises:
        CheckpointError: a string of it is no UTF-8, and ``errors`` is strict.
    """
    items = _items(value.raw) if value.value is None else [value.value]
    try:
        return ", ".join(x.decode(errors=errors) if isinstance(x, bytes) else str(x) for x in items)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{key} holds a string that is no UTF-8") from error


def _items(raw: bytes) -> Sequence[int | float | bool | bytes]:
    """Return the items of an array, whose bytes were found to hold them."""
    kind, count = struct.unpack_from("<IQ", raw, 4)
    if kind in _SCALARS:
        return struct.unpack_from(f"<{count}{_SCALARS[kind]}", raw, 16)
    items, position = [], 16
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", raw, position)
        position += 8 + length
        items.append(raw[position - length : position])
    return items


def string_value(text: str) -> GgufValue:
    """Return a string as a metadata value."""
    raw = text.encode()
    return GgufValue(struct.pack("<IQ", _STRING, len(raw)) + raw, raw)


def like(value: GgufValue, number: int) -> GgufValue:
    """Return another number in the type of a whole-number value."""
    (kind,) = struct.unpack("<I", value.raw[:4])
    return GgufValue(value.raw[:4] + struct.pack(f"<{_SCALARS[kind]}", number), number)


def build_header(
    version: int,
    alignment: int,
    metadata: Mapping[str, GgufValue],
    tensors: Sequence[tuple[str, GgmlType, tuple[int, ...]]],
    *,
    shard: str,
) -> tuple[bytes, tuple[GgufTensor, ...]]:
    """Return the first bytes of a file, padding included, and the places of its tensors."""
    parts = [MAGIC, struct.pack("<IQQ", version, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_packed_string(key), value.raw]
    spans: list[tuple[int, int]] = []
    position = 0
    for name, kind, shape in tensors:
        count = kind.tensor_bytes(shape, where=f"{shard}: {name}")
        form = f"<I{len(shape)}QIQ"
        parts += [
            _packed_string(name),
            struct.pack(form, len(shape), *shape[::-1], kind.number, position),
        ]
        spans.append((position, position + count))
        position = padded(position + count, alignment)
    raw = b"".join(parts)
    base = padded(len(raw), alignment)
    placed = (
        GgufTensor(*row, shard, base + start, base + stop)
        for row, (start, stop) in zip(tensors, spans, strict=True)
    )
    return raw.ljust(base, b"\0"), tuple(placed)


def _packed_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
