"""The GGUF reader against files that are broken or hostile: refused, with a reason."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bake.checkpoints.gguf.file import open_gguf
from bake.errors import BakeError, CheckpointError

STRING, ARRAY, UINT32, BOOL = 8, 9, 4, 7


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


ARCHITECTURE = key("general.architecture", STRING, text("llama"))


def row(
    name: str | bytes = "a.weight",
    sizes: tuple[int, ...] = (8, 2),
    kind: int = 0,
    offset: int = 0,
    axes: int | None = None,
) -> bytes:
    packed = struct.pack(f"<I{len(sizes)}Q", len(sizes) if axes is None else axes, *sizes)
    return text(name) + packed + struct.pack("<IQ", kind, offset)


def build(
    *,
    keys: tuple[bytes, ...] = (ARCHITECTURE,),
    rows: tuple[bytes, ...] = (row(),),
    data: int = 64,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    align: int = 32,
) -> bytes:
    tensors, values = counts or (len(rows), len(keys))
    head = magic + struct.pack("<IQQ", version, tensors, values) + b"".join((*keys, *rows))
    return head + bytes(-len(head) % align) + bytes(range(256)) * (data // 256) + bytes(data % 256)


def opened(tmp_path: Path, content: bytes) -> Any:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return open_gguf(path)


def test_the_pattern_is_read(tmp_path: Path) -> None:
    """The control of every test below."""
    model = opened(tmp_path, build())
    assert model.arch == "llama"
    assert model.tensors["a.weight"].shape == (2, 8)
    assert model.tensors["a.weight"].nbytes == 64
    assert model.read_rows("a.weight", 1, 2).shape == (1, 32)
    assert gguf.GGUFReader(tmp_path / "m.gguf").tensors[0].name == "a.weight"  # the oracle agrees


LONG = "b" * 64
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "does not begin with 'GGUF'"),
    "another format": (lambda: build(magic=b"PK\3\4"), "does not begin with 'GGUF'"),
    "version 1": (lambda: build(version=1), "has GGUF version 1; bake reads 2 and 3"),
    "version 99": (lambda: build(version=99), "has GGUF version 99"),
    "big-endian": (lambda: build(version=3 << 24), "is a big-endian GGUF file"),
    "more tensors than bytes": (
        lambda: build(counts=(2**61, 1)),
        "announces 2305843009213693952 tensors and 1 keys",
    ),
    "more keys than bytes": (lambda: build(counts=(1, 2**40)), "announces 1 tensors and 109951"),
    "one tensor too many": (
        lambda: build(counts=(2, 1), data=200),
        "the name b'' of a tensor cannot be printed",
    ),
    "endless string": (
        lambda: build(keys=(text("k") + struct.pack("<IQ", STRING, 2**63),)),
        "is truncated or hostile: 9223372036854775808 bytes are announced",
    ),
    "endless key": (lambda: build(keys=(struct.pack("<Q", 2**62),)), "is truncated or hostile"),
    "endless array": (
        lambda: build(keys=(key("k", ARRAY, struct.pack("<IQ", UINT32, 2**61)),)),
        "is truncated or hostile",
    ),
    "endless array of strings": (
        lambda: build(keys=(key("k", ARRAY, struct.pack("<IQ", STRING, 2**60)),)),
        "k announces 1152921504606846976 strings",
    ),
    "array of arrays": (
        lambda: build(keys=(key("k", ARRAY, struct.pack("<IQIQ", ARRAY, 1, UINT32, 0)),)),
        "k is an array of items of type 9",
    ),
    "unknown value type": (lambda: build(keys=(key("k", 13, b"\0"),)), "unknown value type 13"),
    "a bool of two": (lambda: build(keys=(key("k", BOOL, b"\2"),)), "with the byte 2"),
    "a key twice": (lambda: build(keys=(ARCHITECTURE, ARCHITECTURE)), "architecture' twice"),
    "an empty key": (lambda: build(keys=(key("", BOOL, b"\1"),)), "cannot be printed"),
    "a key with a newline": (lambda: build(keys=(key("a\nb", BOOL, b"\1"),)), "cannot be printed"),
    "a key that is no UTF-8": (lambda: build(keys=(key(b"\xff", BOOL, b"\1"),)), "be printed"),
    "no architecture": (lambda: build(keys=()), "does not say its general.architecture"),
    "alignment 0": (
        lambda: build(keys=(ARCHITECTURE, key("general.alignment", UINT32, bytes(4)))),
        "general.alignment = 0 is no alignment",
    ),
    "alignment 24": (
        lambda: build(keys=(ARCHITECTURE, key("general.alignment", UINT32, b"\x18\0\0\0"))),
        "general.alignment = 24 is no power of two",
    ),
    "alignment of another type": (
        lambda: build(keys=(ARCHITECTURE, key("general.alignment", 5, b"\x20\0\0\0"))),
        "general.alignment = 32 is no alignment",
    ),
    "huge alignment": (
        lambda: build(keys=(ARCHITECTURE, key("general.alignment", UINT32, b"\0\0\0\x40"))),
        "is no alignment",
    ),
    "no tensors": (lambda: build(rows=(), data=0), "holds no tensors"),
    "a tensor twice": (lambda: build(rows=(row(), row(offset=64)), data=128), "is named twice"),
    "a long name": (lambda: build(rows=(row(LONG),)), "is longer than 63 bytes"),
    "a name with a null": (lambda: build(rows=(row("a\0b"),)), "of a tensor cannot be printed"),
    "no axes": (lambda: build(rows=(row(sizes=()),)), "a.weight has 0 axes"),
    "five axes": (lambda: build(rows=(row(sizes=(2,) * 5),)), "a.weight has 5 axes"),
    "two thousand million axes": (lambda: build(rows=(row(axes=2**31),)), "2147483648 axes"),
    "an axis of 0": (lambda: build(rows=(row(sizes=(0, 8)),)), r"has the sizes \[0, 8\]"),
    "sizes that overflow": (lambda: build(rows=(row(sizes=(2**32, 2**32)),)), "has the sizes"),
    "a type that went away": (lambda: build(rows=(row(kind=4),)), "has the unknown type 4"),
    "a type of the future": (lambda: build(rows=(row(kind=4242),)), "has the unknown type 4242"),
    "half a block": (lambda: build(rows=(row(kind=8),)), "no whole number of Q8_0 blocks of 32"),
    "overlap": (
        lambda: build(rows=(row(), row("b.weight", offset=32)), data=128),
        "begins at offset 32, and the tensors before it end at 64",
    ),
    "a gap": (
        lambda: build(rows=(row(), row("b.weight", offset=128)), data=192),
        "begins at offset 128, and the tensors before it end at 64",
    ),
    "an offset past the end": (lambda: build(rows=(row(offset=2**40),)), "begins at offset 109"),
    "not aligned": (
        lambda: build(rows=(row(sizes=(3,)), row("b.weight", offset=12)), data=128),
        "begins at offset 12",
    ),
    "truncated": (lambda: build(data=63), "is truncated: expected"),
    "bytes behind": (lambda: build(data=128), "has bytes after its last tensor"),
    "a count of tensors": (
        lambda: build(keys=(ARCHITECTURE, key("split.tensors.count", 5, b"\5\0\0\0"))),
        "announces 5 tensors in all its parts, which hold 1",
    ),
    "a split of which this is one": (
        lambda: build(
            keys=(
                ARCHITECTURE,
                key("split.no", 2, bytes(2)),
                key("split.count", 2, b"\xff\xff"),
            )
        ),
        "is the first of 65535 parts, and its name does not say so",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(name: str, tmp_path: Path) -> None:
    make, message = HOSTILE[name]
    with pytest.raises(CheckpointError, match=message) as error:
        opened(tmp_path, make())
    assert "m.gguf" in str(error.value)


@pytest.mark.parametrize("missing", ["nothing there", "a folder"])
def test_no_file(missing: str, tmp_path: Path) -> None:
    path = tmp_path if missing == "a folder" else tmp_path / "m.gguf"
    with pytest.raises(CheckpointError, match="a GGUF model is a file"):
        open_gguf(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = build(keys=(ARCHITECTURE, key("a", ARRAY, struct.pack("<IQ", UINT32, 2) + bytes(8))))
    for length in range(len(whole)):
        with pytest.raises(CheckpointError):
            opened(tmp_path, whole[:length])
    assert opened(tmp_path, whole).arch == "llama"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_one_changed_byte_never_escapes(tmp_path: Path, position: int, value: int) -> None:
    """A damaged file is read as another file or refused; no other exception gets out."""
    content = bytearray(build(rows=(row(), row("b.weight", (32,), 8, 64)), data=98))
    content[position % len(content)] = value
    try:
        model = opened(tmp_path, bytes(content))
    except BakeError:
        return
    for name, info in model.tensors.items():
        assert sum(len(chunk) for chunk in model.chunks(name)) == info.nbytes


def test_file_that_changes_while_it_is_in_use(tmp_path: Path) -> None:
    model = opened(tmp_path, build())
    (tmp_path / "m.gguf").write_bytes(build(rows=(row(sizes=(4, 2)),), data=32))
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        model.read_rows("a.weight", 0, 1)


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    def part(number: int, count: int, name: str) -> bytes:
        keys = (
            ARCHITECTURE,
            key("split.no", 2, struct.pack("<H", number)),
            key("split.count", 2, struct.pack("<H", count)),
        )
        return build(keys=keys, rows=(row(name),))

    first = tmp_path / "m-00001-of-00002.gguf"
    second = tmp_path / "m-00002-of-00002.gguf"
    first.write_bytes(part(0, 2, "a.weight"))
    second.write_bytes(part(1, 2, "b.weight"))
    assert list(open_gguf(first).tensors) == ["a.weight", "b.weight"]  # the control
    second.write_bytes(part(1, 3, "b.weight"))
    with pytest.raises(CheckpointError, match="is not part 1 of 2"):
        open_gguf(first)
    second.write_bytes(part(1, 2, "a.weight"))
    with pytest.raises(CheckpointError, match=r"a\.weight is in m-00001-of-00002\.gguf too"):
        open_gguf(first)


def test_strange_but_true(tmp_path: Path) -> None:
    """What real files hold: another alignment, odd bytes in tokens, no padding at the end."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_array("tokenizer.ggml.tokens", [b"\xff\xfe".decode("latin-1"), "a\nb", ""])
    writer.add_tensor("a.weight", np.ones((3, 5), np.float32))
    writer.add_tensor("b.weight", np.ones(7, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert list(open_gguf(path).tensors) == ["a.weight", "b.weight"]
    assert open_gguf(path).parts[0].header.alignment == 64
    path.write_bytes(path.read_bytes()[: open_gguf(path).tensors["b.weight"].stop])
    assert open_gguf(path).tensors["b.weight"].shape == (7,)
    assert gguf_files.stored(path)["b.weight"] == ("F16", np.ones(7, np.float16).tobytes())
