"""Read a checkpoint lazily and write an edited one: bytes, names, resume, atomicity, reload."""

import dataclasses
import errno
import hashlib
import json
import os
import random
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from exporting import write_new
from folders import files_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from bake.artifact import Artifact
from bake.artifact.staged import Journal, read_journal
from bake.checkpoints import (
    DELETE,
    Checkpoint,
    NewTensor,
    open_checkpoint,
    patch_config,
    stream,
    workers,
    writer,
)
from bake.checkpoints.hashes import sha256_of
from bake.checkpoints.header import TensorInfo
from bake.checkpoints.source import Counted
from bake.checkpoints.writer import Finished
from bake.errors import CheckpointError, InputError, UsageError

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64}
CONFIG = '{\n  "model_type": "llama",\n  "hidden_size": 6\n}\n'
SIDE_FILES = {
    "tokenizer.json": b'{"a": "\xc3\xa9"}\r\n',
    "tokenizer.model": bytes(range(256)),
    "LICENSE": b"terms\n",
    "empty.txt": b"",
    "modeling_custom.py": b"raise SystemExit\n",
    "additional_chat_templates/tool_use.jinja": b"{{ x }}",
}
LEFT_OUT = {
    "README.md": b"# the base",
    "SHA256SUMS": b"0 x",
    "pytorch_model.bin": b"\x80\x02",
    "pytorch_model.bin.index.json": b"{}",
    "consolidated.safetensors": b"not even parsed",
    "model.gguf": b"GGUF",
    ".env": b"HF_TOKEN=x",
}


def tensors_of(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "embed": (10, 6),
        "a.weight": (6, 6),
        "b.weight": (4, 6),
        "norm": (6,),
        "c": (3, 2, 5),
    }
    made = {k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()}
    return {
        **made,
        "scalar": torch.tensor(2.5, dtype=dtype),
        "void": torch.zeros(0, 6, dtype=dtype),
    }


def make_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    shards: int = 1,
    files: Mapping[str, bytes] = SIDE_FILES,
) -> Path:
    """Write a checkpoint by safetensors' own writer: the tensors dealt out over the shards."""
    tensors = tensors_of() if tensors is None else tensors
    path.mkdir(parents=True)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    weight_map = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
    for name in names:
        mine = {t: tensors[t] for t, file in weight_map.items() if file == name}
        save_file(mine, path / name, {"format": "pt"})
    if shards > 1:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index), encoding="utf-8")
    (path / "config.json").write_bytes(CONFIG.encode())
    for name, data in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)
    return path


def in_tiles(tensor: Tensor, rows: int = 2) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter([tensor] if not tensor.dim() else list(tensor.split(rows)) or [tensor])


def write(source: Checkpoint | Path, out: Path, **options: Any) -> Artifact:
    opened = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    return write_new(opened, out, **options)


def differences(a: bytes, b: bytes) -> tuple[int, int] | None:
    """Return the span that covers all bytes in which two equally long strings differ."""
    assert len(a) == len(b)
    found = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    return (found[0], found[-1] + 1) if found else None


# ---------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_safetensors_reads(tmp_path: Path, dtype: str, shards: int) -> None:
    expected = tensors_of(DTYPES[dtype])
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "base", expected, shards=shards))
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape, info.torch_dtype) == (dtype, (*tensor.shape,), tensor.dtype)
        assert info.nbytes == tensor.numel() * tensor.element_size()
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found, tensor)
        raw = (checkpoint.path / info.shard).read_bytes()[info.start : info.stop]
        assert checkpoint.tensor_digest(name) == hashlib.sha256(raw).hexdigest()


def test_every_type_of_torch_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    raw = torch.arange(48, dtype=torch.uint8)
    types = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32]
    types += [torch.uint32, torch.int64, torch.uint64, torch.float16, torch.bfloat16]
    types += [torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn]
    types += [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
    made = {str(t): (raw % 2).view(t) if t == torch.bool else raw.clone().view(t) for t in types}
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "base", made))
    with safe_open(checkpoint.path / "model.safetensors", framework="pt") as file:
        for name in made:
            expected = file.get_tensor(name)
            found = checkpoint.read(name)
            assert found.dtype == expected.dtype
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_a_tensor_read_has_its_own_memory(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "base"))
    checkpoint.read("norm").fill_(7)
    assert torch.equal(checkpoint.read("norm"), tensors_of()["norm"])


def test_tensors_come_in_on_disk_order(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "base", shards=2))
    places = [(info.shard, info.start) for info in checkpoint.tensors.values()]
    assert places == sorted(places)


class Spy:
    """A source of bytes that notes what was asked of it."""

    def __init__(self, files: Any) -> None:
        self.files, self.asked, self.stamps = files, [], files.stamps

    def size(self, file: str) -> int:
        return int(self.files.size(file))

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        self.asked.append((file, start, start + len(buffer)))
        self.files.read_into(file, start, buffer)


@pytest.mark.parametrize(("name", "start", "stop"), [("embed", 3, 7), ("c", 1, 5), ("norm", 0, 6)])
def test_rows_are_read_alone(tmp_path: Path, name: str, start: int, stop: int) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "base"))
    spy = Spy(checkpoint.files)
    checkpoint = dataclasses.replace(checkpoint, files=spy)
    expected = tensors_of()[name]
    rows = (
        expected if expected.ndim == 1 else expected.flatten(0, -2)
    )  # through all but the last axis
    assert torch.equal(checkpoint.read_rows(name, start, stop), rows[start:stop])
    info = checkpoint.tensors[name]
    row = info.nbytes // len(rows)
    assert spy.asked == [(info.shard, info.start + start * row, info.start + stop * row)]


def test_no_rows_is_no_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "base"))
    spy = Spy(checkpoint.files)
    checkpoint = dataclasses.replace(checkpoint, files=spy)
    assert checkpoint.read_rows("embed", 4, 4).shape == (0, 6)
    assert checkpoint.read_rows("void", 0, 0).shape == (0, 6)
    assert not spy.asked


@pytest.mark.parametrize(
    ("name", "start", "stop"),
    [("embed", 3, 11), ("embed", -1, 2), ("embed", 3, 2), ("scalar", 0, 1)],
)
def test_rows_that_do_not_exist_are_refused(
    tmp_path: Path, name: str, start: int, stop: int
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "base"))
    with pytest.raises(UsageError, match=f"has no rows {start} to {stop}"):
        checkpoint.read_rows(name, start, stop)


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "base"))
    with pytest.raises(CheckpointError, match=r"there is no tensor lm_head\.weight"):
        checkpoint.read("lm_head.weight")


def test_side_files_travel_and_the_rest_is_reported(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", files={**SIDE_FILES, **LEFT_OUT})
    for ignored in (".git/config", ".gitattributes", ".cache/x", "onnx/model.onnx"):
        (base / ignored).parent.mkdir(exist_ok=True)
        (base / ignored).write_bytes(b"x")
    checkpoint = open_checkpoint(base)
    assert set(checkpoint.side_files) == set(SIDE_FILES)
    assert set(checkpoint.left_out) == {*LEFT_OUT, "onnx/"}


def test_the_digest_follows_config_index_and_headers(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    first = open_checkpoint(base).digest()
    assert open_checkpoint(make_checkpoint(tmp_path / "same")).digest() == first
    renamed = {k.replace("norm", "morn"): v for k, v in tensors_of().items()}
    assert open_checkpoint(make_checkpoint(tmp_path / "name", renamed)).digest() != first
    (base / "config.json").write_text(CONFIG + " ", encoding="utf-8")
    assert open_checkpoint(base).digest() != first


def test_a_relative_path_and_a_string_name_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for source in ("base", "./base", str(base), Path("base")):
        checkpoint = open_checkpoint(source)
        assert checkpoint.path == base.resolve()
        assert (checkpoint.source, checkpoint.revision) == (str(source), None)


def test_a_folder_with_the_spelling_of_a_hub_id_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("owner/name").path == tmp_path.resolve() / "owner" / "name"


# ---------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("shards", [1, 3])
def test_an_unedited_copy_is_identical(tmp_path: Path, shards: int) -> None:
    base = make_checkpoint(tmp_path / "base", shards=shards)
    written = write(base, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(base)
    assert written.bytes_edited == 0
    assert written.path == tmp_path / "out"
    hashes = {n: hashlib.sha256(d).hexdigest() for n, d in files_of(tmp_path / "out").items()}
    assert dict(written.files) == hashes
    assert written.bytes_written == sum(map(len, files_of(base).values()))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_named_ranges_change(tmp_path: Path, dtype: str, shards: int) -> None:
    base = make_checkpoint(tmp_path / "base", tensors_of(DTYPES[dtype]), shards=shards)
    checkpoint = open_checkpoint(base)
    edited = {n: -checkpoint.read(n) - 1 for n in ("a.weight", "c", "scalar", "void")}
    replace = {name: in_tiles(tensor) for name, tensor in edited.items()}
    written = write(checkpoint, tmp_path / "out", replace=replace)
    assert written.bytes_edited == sum(checkpoint.tensors[n].nbytes for n in edited)
    before, after = files_of(base), files_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for shard in checkpoint.shards:
        infos = [info for info in checkpoint.tensors.values() if info.shard == shard]
        header = infos[0].start
        assert before[shard][:header] == after[shard][:header]
        for info in infos:
            span = slice(info.start, info.stop)
            same = before[shard][span] == after[shard][span]
            assert same == (info.name not in edited or info.nbytes == 0), info.name
    again = open_checkpoint(tmp_path / "out")
    assert list(again.tensors.values()) == list(checkpoint.tensors.values())
    for name in checkpoint.tensors:
        expected = edited.get(name, checkpoint.read(name))
        assert torch.equal(again.read(name), expected)


def test_the_comparison_of_ranges_sees_a_stray_byte(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    checkpoint = open_checkpoint(base)
    info = checkpoint.tensors["a.weight"]
    write(
        checkpoint, tmp_path / "out", replace={"a.weight": in_tiles(-checkpoint.read("a.weight"))}
    )
    before = (base / info.shard).read_bytes()
    after = bytearray((tmp_path / "out" / info.shard).read_bytes())
    span = differences(before, bytes(after))
    assert span is not None and info.start <= span[0] and span[1] <= info.stop
    after[info.stop] ^= 1  # the control: one bit past the tensor
    span = differences(before, bytes(after))
    assert span is not None and span[1] == info.stop + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_new_tensors_of_a_single_file_make_two_shards(tmp_path: Path, dtype: str) -> None:
    base = make_checkpoint(tmp_path / "base", tensors_of(DTYPES[dtype]))
    added = {"z.bias": torch.randn(7).to(DTYPES[dtype]), "b.bias": torch.ones(3).to(DTYPES[dtype])}
    new = {n: NewTensor(dtype, (*t.shape,), in_tiles(t)) for n, t in added.items()}
    written = write(base, tmp_path / "out", new=new)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    out = files_of(tmp_path / "out")
    assert "model.safetensors" not in out  # transformers would prefer it to the index
    assert out[first] == (base / "model.safetensors").read_bytes()
    assert out[second] == save(added, {"format": "pt"})
    assert written.bytes_edited == sum(t.numel() * t.element_size() for t in added.values())
    everything = {**tensors_of(DTYPES[dtype]), **added}
    index = json.loads(out[INDEX])
    assert index["weight_map"] == {n: second if n in added else first for n in everything}
    size = sum(t.numel() * t.element_size() for t in everything.values())
    assert index["metadata"] == {"total_size": size}
    again = open_checkpoint(tmp_path / "out")
    assert {n: again.read(n).tolist() for n in added} == {n: t.tolist() for n, t in added.items()}


def test_new_tensors_of_a_sharded_model_make_one_shard_more(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", shards=2)
    index = json.loads((base / INDEX).read_text())
    index["metadata"] |= {"total_parameters": 100, "note": "kept"}
    index["other"] = ["kept"]
    (base / INDEX).write_text(json.dumps(index), encoding="utf-8")
    bias = torch.arange(6, dtype=torch.float32)
    new = {"a.bias": NewTensor("F32", (6,), in_tiles(bias))}
    write(base, tmp_path / "out", new=new)
    before, after = files_of(base), files_of(tmp_path / "out")
    extra = "model-bake-00001-of-00001.safetensors"
    assert after.keys() - before.keys() == {extra}
    assert [n for n in before if before[n] != after[n]] == [INDEX]
    found = json.loads(after[INDEX])
    size = index["metadata"]["total_size"] + 24
    assert found["metadata"] == {"total_size": size, "total_parameters": 106, "note": "kept"}
    assert found["other"] == ["kept"]
    assert found["weight_map"] == {**index["weight_map"], "a.bias": extra}
    # and once more: the base is itself an output, so its extra shard keeps its name
    write(
        tmp_path / "out", tmp_path / "twice", new={"b.bias": NewTensor("F32", (6,), in_tiles(bias))}
    )
    again = open_checkpoint(tmp_path / "twice")
    assert again.tensors["b.bias"].shard == "model-bake2-00001-of-00001.safetensors"
    assert torch.equal(again.read("a.bias"), bias)
    assert torch.equal(again.read("b.bias"), bias)


def test_new_tensors_of_several_types_lie_as_safetensors_lays_them(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    types = {"U64": torch.uint64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32}
    types |= {"BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8}
    added = {f"{n}é{i}": torch.full((i,), i).to(t) for n, t in types.items() for i in (3, 1)}
    new = {n: NewTensor(n[: n.index("é")], (*t.shape,), in_tiles(t)) for n, t in added.items()}
    write(base, tmp_path / "out", new=new)
    shard = tmp_path / "out" / "model-00002-of-00002.safetensors"
    assert shard.read_bytes() == save(added, {"format": "pt"})


def test_config_and_further_files_are_written_as_given(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", files={**SIDE_FILES, **LEFT_OUT})
    config = patch_config(CONFIG, {"mlp_bias": True})
    extra = {"bake.json": b"{}", "README.md": b"# new", "LICENSE": b"other", "plots/kl.svg": b"s"}
    write(base, tmp_path / "out", config_text=config, extra_files=extra)
    out = files_of(tmp_path / "out")
    assert out["config.json"] == config.encode()
    assert {name: out[name] for name in extra} == extra
    untouched = {n: d for n, d in SIDE_FILES.items() if n != "LICENSE"}
    assert {name: out[name] for name in untouched} == untouched
    expected = {"model.safetensors", "config.json", *SIDE_FILES, *extra}
    assert set(out) == expected  # so nothing of LEFT_OUT but the README that was given


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../b", "config.json", "model.safetensors", "", "a\\b", "a//b"]
)
def test_further_files_stay_in_the_folder_and_hide_nothing(tmp_path: Path, name: str) -> None:
    base = make_checkpoint(tmp_path / "base")
    with pytest.raises(UsageError, match="cannot be the name of a further file"):
        write(base, tmp_path / "out", extra_files={name: b"x"})
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replace": {"nope": in_tiles(torch.zeros(1))}}, "there is no tensor nope to replace"),
        ({"new": {"norm": NewTensor("F32", (1,), in_tiles(torch.zeros(1)))}}, "the base has it"),
        ({"new": {"n": NewTensor("F99", (1,), in_tiles(torch.zeros(1)))}}, "unknown dtype 'F99'"),
        ({"new": {"n": NewTensor("F4", (4,), in_tiles(torch.zeros(1)))}}, "type F4 cannot be read"),
        ({"new": {"n": NewTensor("F4", (3,), in_tiles(torch.zeros(1)))}}, "does not fill"),
        ({"new": {"n\0": NewTensor("F32", (1,), in_tiles(torch.zeros(1)))}}, "cannot be printed"),
        ({"new": {"n": NewTensor("F32", (-1,), in_tiles(torch.zeros(1)))}}, "sizes >= 0"),
        ({"config_text": "[]"}, "is not a JSON object"),
    ],
)
def test_a_request_that_cannot_succeed_writes_nothing(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    base = make_checkpoint(tmp_path / "base")
    with pytest.raises(CheckpointError, match=message):
        write(base, tmp_path / "deep" / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        ([torch.zeros(6, 6, dtype=torch.float64)], r"type torch\.float64 was produced for"),
        ([torch.zeros(6, 5)], r"shape \[6, 5\] is no part of shape \[6, 6\]"),
        ([torch.zeros(36)], r"shape \[36\] is no part"),
        ([torch.tensor(0.0)], r"shape \[\] is no part"),
        ([torch.zeros(4, 6)], "the producer gave 4 of 6 rows"),
        ([torch.zeros(4, 6), torch.zeros(3, 6)], "the producer gave more than 6 rows"),
        ([], "the producer gave 0 of 6 rows"),
    ],
)
def test_a_producer_that_yields_another_tensor_is_refused(
    tmp_path: Path, tiles: list[Tensor], message: str
) -> None:
    base = make_checkpoint(tmp_path / "base")
    with pytest.raises(CheckpointError, match=message):
        write(base, tmp_path / "out", replace={"a.weight": lambda: iter(tiles)})
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_tiles_may_share_a_buffer_and_be_strided(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    expected = torch.randn(10, 6)

    def reuse() -> Iterator[Tensor]:
        buffer = torch.empty(6, 1)
        for row in expected:
            buffer.copy_(row[:, None])
            yield buffer.T  # not contiguous, and overwritten by the next one

    written = write(base, tmp_path / "out", replace={"embed": reuse})
    again = open_checkpoint(tmp_path / "out")
    assert torch.equal(again.read("embed"), expected)
    # the hash is that of the file, not of a buffer that had moved on
    assert written.files["model.safetensors"] == sha256_of(again.file("model.safetensors"))


def test_tensors_with_gradients_are_written(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    weight = torch.ones(6, requires_grad=True)
    write(base, tmp_path / "out", replace={"norm": in_tiles(weight * 2)})
    assert torch.equal(open_checkpoint(tmp_path / "out").read("norm"), torch.full((6,), 2.0))


# --------------------------------------------------------------------- memory, clones, progress


def test_memory_is_bounded_and_an_edited_tensor_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, rows = 1024, 512
    tensors = {"big": torch.randn(rows, 64), "other": torch.randn(rows, 64)}
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "base", tensors, files={}))
    copied: list[tuple[int, int]] = []
    memory: list[int] = []
    copy, read_at, write_at = stream._copy, stream.read_at, stream.write_at

    def spy_copy(original: Any, start: int, file: Any, position: int, count: int) -> None:
        copied.append((start, start + count))
        copy(original, start, file, position, count)

    def spy_read(file: Any, position: int, buffer: memoryview) -> None:
        memory.append(len(buffer))
        read_at(file, position, buffer)

    def spy_write(file: Any, position: int, data: memoryview) -> None:
        memory.append(len(data))
        write_at(file, position, data)

    for module in (stream, workers):
        monkeypatch.setattr(module, "CHUNK", chunk)
        monkeypatch.setattr(module, "read_at", spy_read)
    monkeypatch.setattr(stream, "_copy", spy_copy)
    monkeypatch.setattr(stream, "write_at", spy_write)
    live = []

    def produce() -> Iterator[Tensor]:
        for start in range(0, rows, 4):
            tile = checkpoint.read_rows("big", start, start + 4).neg_()
            live.append(tile.numel() * tile.element_size())
            yield tile

    write(checkpoint, tmp_path / "out", replace={"big": produce})
    info = checkpoint.tensors["big"]
    assert info.nbytes > 100 * chunk and len(live) == rows // 4
    assert max(live) <= chunk and max(memory) <= chunk and len(memory) > info.nbytes // chunk
    assert all(stop <= info.start or start >= info.stop for start, stop in copied)
    # the control: without the replacement the same bytes are copied
    copied.clear()
    write(checkpoint, tmp_path / "copy")
    assert any(start < info.stop and stop > info.start for start, stop in copied)


# ----------------------------------------------------------------------------------- workers


def varied(rng: random.Random) -> Callable[[int], Iterator[Tensor]]:
    """Return what makes tensors of which some take long, so that workers overtake one another."""

    def produce(seed: int) -> Iterator[Tensor]:
        values = torch.randn(60, 8, generator=torch.Generator().manual_seed(seed))
        for tile in values.split(rng.randint(1, 60)):
            time.sleep(rng.choice([0, 0, 0.001]))
            yield tile

    return produce


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_workers_write_the_bytes_that_one_pass_would(
    tmp_path: Path, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(threading.enumerate())  # a progress bar or a client of an earlier test
    monkeypatch.setattr(workers, "_STEP", 1000)
    rng = random.Random(jobs)
    produce, raw = varied(rng), rng.randbytes(5000)
    (tmp_path / "origin").write_bytes(raw)
    drafts, whole = [], {}
    for number in range(4):
        pieces: list[stream.Piece] = [stream.Literal(b"head"), stream.Copy(4, 3700)]
        made = [b"head", raw[4:3700]]
        position = 3700
        for seed in range(number):
            nbytes = 60 * 8 * 4
            info = TensorInfo(f"{seed}", "F32", (60, 8), "x", position, position + nbytes)
            pieces.append(stream.Fill(info, partial(produce, seed)))
            tensor = torch.randn(60, 8, generator=torch.Generator().manual_seed(seed))
            made.append(tensor.numpy().tobytes())
            position += nbytes
        target = tmp_path / "out" / f"{number}"
        drafts.append(stream.Draft(target, pieces, tmp_path / "origin"))
        whole[target] = b"".join(made)
    drafts.append(stream.Draft(tmp_path / "empty", []))
    whole[tmp_path / "empty"] = b""
    hashes: dict[Path, str] = {}
    counts: list[int] = []
    with workers.at_most(jobs):
        workers.write_all(drafts, advance=counts.append, finish=hashes.__setitem__)
    assert {path: path.read_bytes() for path in whole} == whole
    assert hashes == {path: hashlib.sha256(data).hexdigest() for path, data in whole.items()}
    assert sum(counts) == sum(map(len, whole.values()))
    assert not set(threading.enumerate()) - others


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EIO])
def test_what_the_kernel_cannot_copy_passes_through_memory(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, asked = os.copy_file_range, []

    def refusing(source: int, target: int, count: int, *places: int) -> int:
        asked.append(count)
        if len(asked) > 1:
            raise OSError(code, "refused")
        return copy(source, target, min(count, 100), *places)  # less than it was asked for

    monkeypatch.setattr(os, "copy_file_range", refusing)
    base = make_checkpoint(tmp_path / "base")
    if code == errno.EIO:  # the control: another error is none of that kind
        with pytest.raises(InputError, match="refused"):
            write(base, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    write(base, tmp_path / "out")
    assert len(asked) > 1 and files_of(tmp_path / "out") == files_of(base)


def test_a_worker_that_fails_stops_the_others(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", shards=3)
    checkpoint, begun = open_checkpoint(base), threading.Event()
    others = set(threading.enumerate())
    later: list[int] = []

    def failing() -> Iterator[Tensor]:
        begun.wait(10)
        raise CheckpointError("of the first")
        yield

    def endless() -> Iterator[Tensor]:
        begun.set()
        while True:
            later.append(1)
            yield checkpoint.read_rows("a.weight", 0, 0)
            time.sleep(0.001)

    with workers.at_most(2), pytest.raises(CheckpointError, match="of the first"):
        write(base, tmp_path / "out", replace={"embed": failing, "a.weight": endless})
    assert later and not set(threading.enumerate()) - others
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("jobs", [1, 3, 20])
def test_files_that_wait_for_the_disk_do_not_use_up_the_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    (tmp_path / "origin").write_bytes(b"weights")
    pieces = [stream.Copy(0, 7)]
    drafts = [stream.Draft(tmp_path / str(n), pieces, tmp_path / "origin") for n in range(60)]
    held: list[int] = []
    fsync = os.fsync

    def open_files() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    def slow(handle: int) -> None:
        time.sleep(0.003)  # a disk that falls behind
        held.append(open_files())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", slow)
    before, done = open_files(), dict[Path, str]()
    with workers.at_most(jobs):
        workers.write_all(drafts, advance=lambda _: None, finish=done.__setitem__)
    assert set(done.values()) == {hashlib.sha256(b"weights").hexdigest()} and len(done) == 60
    # Two handles a file: of those that wait, and of those that a worker has made or hashes.
    assert 2 < max(held) - before <= 2 * (workers._AHEAD + 2 * jobs)


def test_bytes_are_counted_in_all_threads() -> None:
    class Source:
        def read_into(self, file: str, start: int, buffer: memoryview) -> None:
            """Read nothing."""

    class Buffer:
        def __len__(self) -> int:
            time.sleep(0)  # others have their turn amid the addition
            return 3

    counted = Counted(Source())  # type: ignore[arg-type]

    def read() -> None:
        for _ in range(200):
            counted.read_into("", 0, Buffer())  # type: ignore[arg-type]

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.count == 4 * 200 * 3


def test_a_clone_of_a_base_that_has_become_shorter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its new length would be made of zeros."""
    (tmp_path / "origin").write_bytes(b"weights")
    pieces = [stream.Literal(b"W"), stream.Copy(1, 8)]

    def fake_clone(origin: Any, target: Any) -> bool:
        target.write(origin.read())
        return True

    def written() -> str:
        target, origin = tmp_path / "out", tmp_path / "origin"
        return workers.write_file(target, pieces, origin=origin, advance=lambda _: None)

    monkeypatch.setattr(workers, "clone", fake_clone)
    with pytest.raises(CheckpointError, match=r"became shorter .* at byte 7") as caught:
        written()
    assert str(tmp_path / "origin") in str(caught.value)
    (tmp_path / "origin").write_bytes(b"weights, and more")  # the control
    assert written() == hashlib.sha256(b"Weights,").hexdigest()


def test_a_filesystem_with_clones_writes_the_edited_bytes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint(tmp_path / "base", shards=2)
    checkpoint = open_checkpoint(base)
    replace = {"a.weight": in_tiles(-checkpoint.read("a.weight"))}
    plain = write(checkpoint, tmp_path / "plain", replace=replace)
    written: list[int] = []
    write_at = stream.write_at

    def fake_clone(origin: Any, target: Any) -> bool:
        target.seek(0)
        target.write(Path(origin.name).read_bytes())
        return True

    def spy_write(file: Any, position: int, data: memoryview) -> None:
        if str(file.name).endswith(".safetensors"):
            written.append(len(data))
        write_at(file, position, data)

    monkeypatch.setattr(workers, "clone", fake_clone)
    monkeypatch.setattr(stream, "write_at", spy_write)
    cloned = write(checkpoint, tmp_path / "cloned", replace=replace)
    assert dict(cloned.files) == dict(plain.files)
    assert files_of(tmp_path / "cloned") == files_of(tmp_path / "plain")
    assert sum(written) == checkpoint.tensors["a.weight"].nbytes


def test_a_base_that_changes_behind_its_clone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is whole and its hash is its own; but other shards could be of the other base."""
    base = make_checkpoint(tmp_path / "base", files={})

    def clone_then_change(origin: Any, target: Any) -> bool:
        original = Path(origin.name)
        raw = original.read_bytes()
        target.write(raw)
        original.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))  # somebody else, meanwhile
        return True

    checkpoint = open_checkpoint(base)
    monkeypatch.setattr(workers, "clone", clone_then_change)
    monkeypatch.setattr(writer, "can_clone", lambda *_: True)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        write(checkpoint, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    copied = write(open_checkpoint(base), tmp_path / "out").files[
        "model.safetensors"
    ]  # the control
    assert copied == sha256_of(base / "model.safetensors")


def test_progress_counts_bytes_up_to_the_total(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", shards=3)
    seen: list[tuple[int, int]] = []
    new = {"n": NewTensor("F32", (6,), in_tiles(torch.zeros(6)))}
    write(base, tmp_path / "out", new=new, progress=lambda done, total: seen.append((done, total)))
    total = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert {t for _, t in seen} == {total}
    done = [d for d, _ in seen]
    assert done == sorted(done) and done[0] == 0 and done[-1] == total and len(set(done)) > 4


# --------------------------------------------------------------------------- resume, atomicity


def interrupt_in(shard: int, base: Path, kind: type[BaseException]) -> dict[str, Any]:
    """Return a replacement for a tensor of the given shard that is broken off after one tile."""
    checkpoint = open_checkpoint(base)
    name = next(
        i.name
        for i in checkpoint.tensors.values()
        if i.shard == checkpoint.shards[shard] and len(i.shape) == 2 and i.shape[0] > 2
    )

    def produce() -> Iterator[Tensor]:
        yield checkpoint.read_rows(name, 0, 1)
        raise kind

    return {name: produce}


def good(base: Path, names: tuple[str, ...], calls: list[str] | None = None) -> dict[str, Any]:
    checkpoint = open_checkpoint(base)

    def producer(name: str) -> Callable[[], Iterator[Tensor]]:
        def produce() -> Iterator[Tensor]:
            if calls is not None:
                calls.append(name)
            yield from checkpoint.read(name).neg().split(2)

        return produce

    return {name: producer(name) for name in names}


RESUMABLE = ("embed", "a.weight", "b.weight")  # one in each of three shards


def interrupted(tmp_path: Path, *, shard: int = 1) -> Path:
    base = make_checkpoint(tmp_path / "base", shards=3)
    broken = {**good(base, RESUMABLE), **interrupt_in(shard, base, KeyboardInterrupt)}
    with workers.at_most(1), pytest.raises(KeyboardInterrupt):
        write(base, tmp_path / "out", replace=broken)
    assert not (tmp_path / "out").exists()
    return base


def test_an_interrupted_run_is_taken_up(tmp_path: Path) -> None:
    base = interrupted(tmp_path)
    partial = tmp_path / ".out.bake-partial"
    assert (partial / "files" / "model-00001-of-00003.safetensors").exists()
    calls: list[str] = []
    seen: list[tuple[int, int]] = []
    write(
        base,
        tmp_path / "out",
        replace=good(base, RESUMABLE, calls),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert sorted(calls) == ["a.weight", "b.weight"]  # the first shard was finished
    assert seen[-1][0] == seen[-1][1] and [d for d, _ in seen] == sorted(d for d, _ in seen)
    write(base, tmp_path / "whole", replace=good(base, RESUMABLE))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not partial.exists()


def test_a_finished_shard_that_was_damaged_is_written_again(tmp_path: Path) -> None:
    base = interrupted(tmp_path)
    shard = tmp_path / ".out.bake-partial" / "files" / "model-00001-of-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    calls: list[str] = []
    write(base, tmp_path / "out", replace=good(base, RESUMABLE, calls))
    assert sorted(calls) == ["a.weight", "b.weight", "embed"]
    write(base, tmp_path / "whole", replace=good(base, RESUMABLE))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("change", ["digest", "base", "journal"])
def test_another_plan_or_base_starts_anew(tmp_path: Path, change: str) -> None:
    base = interrupted(tmp_path)
    partial = tmp_path / ".out.bake-partial"
    (partial / "files" / "stray.txt").write_bytes(b"x")
    if change == "base":
        os.utime(base / "model-00003-of-00003.safetensors", ns=(1, 1))
    if change == "journal":
        (partial / "journal").write_bytes(b'{"format": 1, "ident')  # torn by a kill
    calls: list[str] = []
    digest = "other" if change == "digest" else "d"
    write(base, tmp_path / "out", replace=good(base, RESUMABLE, calls), digest=digest)
    assert sorted(calls) == ["a.weight", "b.weight", "embed"]
    assert "stray.txt" not in files_of(tmp_path / "out")


def test_a_torn_last_line_of_the_journal_costs_only_its_shard(tmp_path: Path) -> None:
    base = interrupted(tmp_path, shard=2)
    journal = tmp_path / ".out.bake-partial" / "journal"
    raw = journal.read_bytes()
    assert raw.count(b"\n") == 3
    journal.write_bytes(raw[:-5])
    calls: list[str] = []
    write(base, tmp_path / "out", replace=good(base, RESUMABLE, calls))
    assert sorted(calls) == ["a.weight", "b.weight"]


def test_an_interruption_within_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    base = interrupted(tmp_path, shard=0)
    assert [p.name for p in tmp_path.iterdir()] == [base.name]


@pytest.mark.parametrize("kind", [ValueError, CheckpointError])
def test_an_error_leaves_nothing_even_after_a_finished_shard(
    tmp_path: Path, kind: type[Exception]
) -> None:
    base = make_checkpoint(tmp_path / "base", shards=3)
    error = type("Boom", (kind,), {"__init__": lambda self: Exception.__init__(self, "boom")})
    with pytest.raises(kind):
        write(base, tmp_path / "a" / "b" / "out", replace=interrupt_in(1, base, error))
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_killed_run_is_taken_up(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", shards=3)
    script = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from bake.checkpoints import open_checkpoint
        from bake.checkpoints.workers import at_most
        from exporting import write_new
        source = open_checkpoint(Path({str(base)!r}))
        journal = Path({str(tmp_path / ".out.bake-partial" / "journal")!r})

        def edited(name, fatal):
            def produce():
                for tile in source.read(name).neg().split(2):
                    yield tile
                    if fatal:
                        while b"-00001-" not in journal.read_bytes():
                            pass
                        os.kill(os.getpid(), signal.SIGKILL)
            return produce

        names = {RESUMABLE!r}
        replace = {{name: edited(name, name == "a.weight") for name in names}}
        with at_most(1):
            write_new(source, Path({str(tmp_path / "out")!r}), replace=replace)
    """
    run = programs.run(textwrap.dedent(script))
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    files = tmp_path / ".out.bake-partial" / "files"
    assert {p.name for p in files.iterdir()} == {
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    }
    calls: list[str] = []
    write(base, tmp_path / "out", replace=good(base, RESUMABLE, calls))
    assert sorted(calls) == ["a.weight", "b.weight"]
    write(base, tmp_path / "whole", replace=good(base, RESUMABLE))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_run_of_several_workers_is_taken_up_wherever_it_is_killed(tmp_path: Path) -> None:
    """At every ninth write, sync and note of a shard, of which others are under way."""
    base = make_checkpoint(tmp_path / "base", shards=4)
    script = f"""
        import os, signal, sys
        from itertools import count
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from bake.artifact.staged import Stage
        from bake.checkpoints import open_checkpoint, stream
        from bake.checkpoints.workers import at_most
        from exporting import write_new
        source, calls, last = open_checkpoint(Path({str(base)!r})), count(), 0

        def fatal(real):
            def call(*args):
                if next(calls) == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)
            return call

        def edited(name):
            return lambda: source.read(name).neg().split(1)

        def run(out):
            replace = {{name: edited(name) for name in {RESUMABLE!r}}}
            with at_most(3):
                write_new(source, Path({str(tmp_path)!r}) / out, replace=replace)

        stream.write_at, stream._copy = fatal(stream.write_at), fatal(stream._copy)
        os.fsync, Stage.record = fatal(os.fsync), fatal(Stage.record)
        for last in range(3, 50, 9):
            child = os.fork()
            if not child:
                run(f"out{{last}}")
                os._exit(0)
            print(last, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    ran = programs.run(textwrap.dedent(script))
    ends = dict(map(int, line.split()) for line in ran.stdout.splitlines())
    killed = [last for last, status in ends.items() if status == -signal.SIGKILL]
    assert len(killed) > 4 and set(ends.values()) <= {0, -signal.SIGKILL}
    write(base, tmp_path / "whole", replace=good(base, RESUMABLE))
    for last in killed:
        out = tmp_path / f"out{last}"
        assert not out.exists() and (tmp_path / f".{out.name}.bake-partial").exists()
        write(base, out, replace=good(base, RESUMABLE))
        assert files_of(out) == files_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_the_output_appears_at_the_end_only(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", shards=3)
    out = tmp_path / "out"
    states: list[bool] = []
    write(base, out, progress=lambda done, total: states.append(out.exists()))
    assert states and not any(states)
    assert out.is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_two_runs_at_one_output_do_not_meet(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", shards=2)

    def nested() -> Iterator[Tensor]:
        with pytest.raises(UsageError, match="another run of bake is writing"):
            write(base, tmp_path / "out")
        yield torch.zeros(10, 6)

    write(base, tmp_path / "out", replace={"embed": nested})
    assert not open_checkpoint(tmp_path / "out").read("embed").any()


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    write(base, tmp_path / "out", replace=good(base, ("norm",)))
    (tmp_path / "out" / "bake.json").write_bytes(b"{}")
    before = files_of(tmp_path / "out")
    with pytest.raises(UsageError, match="exists and is not empty"):
        write(base, tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    write(base, tmp_path / "out", force=True)
    assert files_of(tmp_path / "out") == files_of(base) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_force_keeps_the_old_output_until_the_new_one_is_complete(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", shards=3)
    out = tmp_path / "out"
    write(base, out)
    (out / "mine.txt").write_bytes(b"kept")
    (out / "bake.json").write_bytes(b"{}")
    before = files_of(out)
    with pytest.raises(ZeroDivisionError):
        write(base, out, replace=interrupt_in(1, base, ZeroDivisionError), force=True)
    assert files_of(out) == before
    states: list[bool] = []
    write(
        base, out, force=True, progress=lambda done, total: states.append(files_of(out) == before)
    )
    assert all(states)
    assert "mine.txt" not in files_of(out)


def test_the_old_output_comes_back_when_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint(tmp_path / "base")
    out = tmp_path / "out"
    write(base, out)
    (out / "mine.txt").write_bytes(b"kept")
    (out / "bake.json").write_bytes(b"{}")
    before = files_of(out)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "files":
            raise OSError(5, "no luck", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(InputError, match="files: cannot write the output: no luck"):
        write(base, out, force=True)
    assert files_of(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_a_kill_amid_the_last_renames_is_repaired_by_the_next_run(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    out = tmp_path / "out"
    write(base, out)
    (out / "bake.json").write_bytes(b"{}")
    before = files_of(out)
    (tmp_path / ".out.bake-partial" / "files").mkdir(parents=True)
    # As a kill between the two renames leaves it.
    out.rename(tmp_path / ".out.bake-partial" / "old")
    (tmp_path / ".out.bake-partial" / "journal").write_bytes(b"")
    with pytest.raises(UsageError, match="exists and is not empty"):
        write(base, out)
    assert files_of(out) == before
    write(base, out, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    (tmp_path / "out").mkdir()
    write(base, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(base)


def test_force_does_not_remove_what_is_no_checkpoint(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_bytes(b"x")
    with pytest.raises(
        UsageError, match=r"was not written by bake, so it is not replaced(.|\n)*--force"
    ):
        write(base, tmp_path / "out", force=True)
    assert files_of(tmp_path / "out") == {"thesis.tex": b"x"}


def test_a_foreign_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    (tmp_path / ".out.bake-partial").mkdir()
    (tmp_path / ".out.bake-partial" / "x").write_bytes(b"x")
    with pytest.raises(UsageError, match="is in the way and is not bake's"):
        write(base, tmp_path / "out")
    assert files_of(tmp_path / ".out.bake-partial") == {"x": b"x"}


@pytest.mark.parametrize("place", ["base", "base/out", ".", "base/../base/sub/out"])
def test_an_output_that_overlaps_the_base_is_refused(tmp_path: Path, place: str) -> None:
    base = make_checkpoint(tmp_path / "base")
    before = files_of(base)
    with pytest.raises(UsageError, match="overlap"):
        write(base, tmp_path / place, force=True)
    assert files_of(base) == before
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_an_output_that_is_a_file_or_a_link_is_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="exists and is no folder"):
        write(base, tmp_path / "file", force=True)
    with pytest.raises(UsageError, match="is a link"):
        write(base, tmp_path / "link", force=True)
    assert (tmp_path / "file").read_bytes() == b"x"


def test_the_disk_is_checked_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint(tmp_path / "base", shards=2)
    needed = sum(map(len, files_of(base).values())) + writer._SLACK
    free = [needed - 1]
    monkeypatch.setattr(
        writer.shutil, "disk_usage", lambda _: type("U", (), {"free": free[0]}), raising=True
    )
    calls: list[str] = []
    message = f"the disk is too small: needed {needed} bytes, free {needed - 1}"
    with pytest.raises(CheckpointError, match=message):
        write(base, tmp_path / "out", replace=good(base, ("embed",), calls))
    assert calls == [] and [p.name for p in tmp_path.iterdir()] == ["base"]
    free[0] = needed  # the control: one byte more is enough
    write(base, tmp_path / "out", replace=good(base, ("embed",), calls))
    assert calls == ["embed"]


def test_a_shard_that_changes_under_the_writer_is_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    checkpoint = open_checkpoint(base)
    with (base / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        write(checkpoint, tmp_path / "out")
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        checkpoint.read("norm")


def test_a_checkpoint_read_by_range_is_not_exported(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "base"))
    remote = dataclasses.replace(checkpoint, complete=False)
    with pytest.raises(UsageError, match="complete=True"):
        write(remote, tmp_path / "out")


def test_the_journal_is_read_strictly() -> None:
    head = json.dumps({"format": 2, "identity": "i"})
    entry = {"file": "a", "bytes": 1, "sha256": "x"}
    raw = f"{head}\n{json.dumps(entry)}\n[]\n{{\n{json.dumps({**entry, 'file': 'b'})}\n".encode()
    assert read_journal(raw, "i") == Journal({"a": Finished(1, "x")})
    assert read_journal(raw, "j") == Journal()
    assert read_journal(b"", "i") == Journal()


# ------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        ('{"a": 1}', {"a": 2}, '{"a": 2}'),
        ('{"a":1,"b":2}', {"c": None}, '{"a":1,"b":2,"c":null}'),
        ('{\n  "a": 1\n}\n', {"b": True}, '{\n  "a": 1,\n  "b": true\n}\n'),
        ("{}", {"a": 1}, '{"a": 1}'),
        ('{"a": 1, "b": 2, "c": 3}', {"a": DELETE}, '{"b": 2, "c": 3}'),
        ('{"a": 1, "b": 2, "c": 3}', {"b": DELETE}, '{"a": 1, "c": 3}'),
        ('{"a": 1, "b": 2, "c": 3}', {"c": DELETE}, '{"a": 1, "b": 2}'),
        ('{ "a": 1 }', {"a": DELETE}, "{}"),
        ('{"a":1.50, "b" :\t[1,  2] }', {"c": 3}, '{"a":1.50, "b" :\t[1,  2], "c" :\t3 }'),
        ('{\r\n\t"a": 1\r\n}', {"b": [1]}, '{\r\n\t"a": 1,\r\n\t"b": [\r\n\t\t1\r\n\t]\r\n}'),
        ('{\n  "z": 0\n}', {"y": {"k": []}}, '{\n  "z": 0,\n  "y": {\n    "k": []\n  }\n}'),
        ('{"a": "}\\"{", "b": {"a": 1}}', {"a": "{"}, '{"a": "{", "b": {"a": 1}}'),
        ('{"a": "\\u00e9 \u00e9", "b": 1e400}', {"b": 2}, '{"a": "\\u00e9 \u00e9", "b": 2}'),
        ('{"s": [0.0, Infinity], "a": 1}', {"a": 2}, '{"s": [0.0, Infinity], "a": 2}'),
        ('{"a.b": 1}', {"a.b": 2}, '{"a.b": 2}'),
        ('{"\\u0061": 1}', {"a": 2}, '{"\\u0061": 2}'),
        (' {"a": 1} ', {"a": 1, "b": "\n"}, ' {"a": 1,"b": "\\n"} '),
    ],
)
def test_a_config_is_patched_where_it_changes(
    text: str, changes: dict[Any, Any], expected: str
) -> None:
    assert patch_config(text, changes) == expected


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("[1]", {"a": 1}, "is not a JSON object"),
        ('{"a": 1', {"a": 1}, "is not valid JSON"),
        ('{"a": 1, "a": 2}', {"a": 1}, "names the key 'a' twice"),
        ('{"a": {"b": 1, "b": 1}}', {"c": 1}, "names the key 'b' twice"),
        ('{"a": 1}', {"b": DELETE}, "has no key 'b' that could be removed"),
        ('{"a": 1}', {"a": float("nan")}, "cannot write nan"),
        ('{"a": 1}', {"a": object()}, "cannot write <object"),
        ('{"a": 1}', {"b": {1: 2, "1": 3}}, "names the key '1' twice"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(
    text: str, changes: dict[Any, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        patch_config(text, changes)


KEYS = st.text(max_size=4)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
FINITE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
LAYOUTS = st.sampled_from(
    [
        {},
        {"indent": 2},
        {"indent": "\t"},
        {"indent": 0},
        {"separators": (",", ":")},
        {"separators": (" ,\r\n ", "\t: ")},
        {"indent": 3, "separators": (" , ", " :")},
        {"ensure_ascii": False},
    ]
)


@given(st.dictionaries(KEYS, VALUES, max_size=5), LAYOUTS, st.data())
def test_a_patched_config_reads_back_as_meant(
    config: dict[str, Any], layout: dict[str, Any], data: st.DataObject
) -> None:
    text = json.dumps(config, **layout)
    if any(0xD800 <= ord(sign) < 0xE000 for sign in text):
        return  # no UTF-8 file holds it
    key = data.draw(st.sampled_from([*config, "new"]) | KEYS)
    value = DELETE if key in config and data.draw(st.booleans()) else data.draw(FINITE)
    patched = patch_config(text, {key: value})
    if value is DELETE:
        del config[key]
    else:
        config[key] = value
    assert json.dumps(json.loads(patched)) == json.dumps(config)


def test_a_patch_touches_one_line_of_a_real_config(tiny_checkpoint: Callable[..., Path]) -> None:
    text = (tiny_checkpoint("llama") / "config.json").read_text(encoding="utf-8")
    patched = patch_config(text, {"hidden_act": "gelu"})
    pairs = list(zip(text.split("\n"), patched.split("\n"), strict=True))
    assert [b for a, b in pairs if a != b] == ['  "hidden_act": "gelu",']


# ------------------------------------------------------------------------------------- reload


LLAMA = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 32}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
WIDTHS = {"self_attn.q_proj": 24, "self_attn.k_proj": 12, "self_attn.v_proj": 12}
WIDTHS |= {"self_attn.o_proj": 24, "mlp.gate_proj": 40, "mlp.up_proj": 40, "mlp.down_proj": 24}


def make_llama(path: Path, *, sharded: bool) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model.save_pretrained(path, max_shard_size="10KB" if sharded else "1GB")
    assert (path / INDEX).exists() == sharded
    return path


def reload(path: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    return model, {key: set(value) for key, value in info.items() if value}


def biases(config: Checkpoint) -> dict[str, NewTensor]:
    return {
        f"model.layers.{layer}.{module}.bias": NewTensor(
            "F32", (width,), in_tiles(torch.full((width,), 0.5 + layer))
        )
        for layer in range(2)
        for module, width in WIDTHS.items()
    }


@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_loads_an_unedited_copy(tmp_path: Path, sharded: bool) -> None:
    base = make_llama(tmp_path / "base", sharded=sharded)
    write(base, tmp_path / "out")
    model, report = reload(tmp_path / "out")
    assert report == {}
    expected = reload(base)[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_loads_new_biases_and_the_flags_that_open_them(
    tmp_path: Path, sharded: bool
) -> None:
    base = open_checkpoint(make_llama(tmp_path / "base", sharded=sharded))
    new = biases(base)
    flags = patch_config(base.config_text, {"attention_bias": True, "mlp_bias": True})
    write(base, tmp_path / "out", new=new, config_text=flags)
    model, report = reload(tmp_path / "out")
    assert report == {}
    state = model.state_dict()
    assert all((state[n] == 0.5 + int(n.split(".")[2])).all() for n in new)
    # the control: without the flags the same biases are unexpected
    write(base, tmp_path / "flagless", new=new)
    assert reload(tmp_path / "flagless")[1] == {"unexpected_keys": set(new)}


def test_transformers_ignores_an_index_beside_model_safetensors(tmp_path: Path) -> None:
    """The reason why a model in one file becomes two numbered shards."""
    base = open_checkpoint(make_llama(tmp_path / "base", sharded=False))
    new = biases(base)
    flags = patch_config(base.config_text, {"attention_bias": True, "mlp_bias": True})
    write(base, tmp_path / "out", new=new, config_text=flags)
    out = tmp_path / "out"
    index = json.loads((out / INDEX).read_text(encoding="utf-8"))
    first = "model-00001-of-00002.safetensors"
    (out / first).rename(out / "model.safetensors")
    index["weight_map"] = {
        n: "model.safetensors" if f == first else f for n, f in index["weight_map"].items()
    }
    (out / INDEX).write_text(json.dumps(index), encoding="utf-8")
    assert reload(out)[1] == {"missing_keys": set(new)}


def test_closing_files_speak_of_all_others(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    seen: dict[str, str] = {}

    def closing(files: Mapping[str, str]) -> Mapping[str, bytes]:
        seen.update(files)
        return {"sums.txt": "\n".join(sorted(files)).encode()}

    written = write(base, tmp_path / "out", closing=closing)
    out = files_of(tmp_path / "out")
    on_disk = set(out)
    assert set(seen) == on_disk - {"sums.txt"}
    assert set(written.files) == on_disk
    assert written.bytes_written == sum(map(len, out.values()))
    with pytest.raises(UsageError, match=r"config\.json"):
        write(base, tmp_path / "again", closing=lambda _: {"config.json": b"{}"})
    assert not (tmp_path / "again").exists()
