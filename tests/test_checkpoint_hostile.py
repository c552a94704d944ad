"""Checkpoints that are broken or poisoned: each is refused in words, and nothing is read astray."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from exporting import write_new
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from bake.checkpoints import open_checkpoint
from bake.checkpoints.header import MAX_HEADER, header_length, parse_header
from bake.errors import CheckpointError, UsageError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TWO = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4.0)}


def make(path: Path, *, sharded: bool = False) -> Path:
    path.mkdir()
    (path / "config.json").write_bytes(b'{"model_type": "llama"}')
    if not sharded:
        save_file(TWO, path / SINGLE, {"format": "pt"})
        return path
    names = {name: f"model-{i + 1}-of-2.safetensors" for i, name in enumerate(TWO)}
    for name, file in names.items():
        save_file({name: TWO[name]}, path / file, {"format": "pt"})
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    return path


def refuse(path: Path | str, message: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 4
    return caught.value


def shard(header: Any, data: bytes = b"", *, raw: bytes | None = None) -> bytes:
    text = json.dumps(header).encode() if raw is None else raw
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# ------------------------------------------------------------------------------------- headers

EIGHT = bytes(8)
HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", r"is truncated: expected at least 8 bytes, found 0"),
    "seven bytes": (b"1234567", r"is truncated: expected at least 8 bytes, found 7"),
    "header past the end": (
        struct.pack("<Q", 100) + b"{}",
        r"is truncated: its header alone ends at byte 108, found 10 bytes",
    ),
    "huge header": (
        struct.pack("<Q", MAX_HEADER + 1) + b"{}",
        r"announces a header of 100000001 bytes; the limit is 100000000",
    ),
    "huger header": (b"\xff" * 64, r"announces a header of 18446744073709551615 bytes"),
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        r"is a Git LFS pointer and not the weights(.|\n)*git lfs pull",
    ),
    "pickle": (b"\x80\x02}q\x00." + bytes(90), r"announces a header of"),
    "no JSON": (shard(None, raw=b"{nope}"), r"header of .*: is not valid JSON"),
    "not UTF-8": (shard(None, raw=b'{"\xff": 1}'), r"header of .*: is not UTF-8 text"),
    "an array": (shard(None, raw=b"[]"), r"has a header that does not begin with '\{'"),
    "leading space": (shard(None, raw=b" {}"), r"has a header that does not begin with '\{'"),
    "byte order mark": (shard(None, raw=b"\xef\xbb\xbf{}"), r"does not begin with '\{'"),
    "trailing newline": (shard(None, raw=b"{}\n"), r"has a header that does not end with '\}'"),
    "deep": (shard(None, raw=b'{"a":' * 10**5 + b"}" * 10**5), r"nests too deeply to be parsed"),
    "long number": (shard(None, raw=b'{"a":' + b"9" * 5000 + b"}"), r"is not valid JSON"),
    "same key twice": (
        shard(None, EIGHT, raw=b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
        r"names the key 'a' twice",
    ),
    "same key twice inside": (
        shard(None, raw=b'{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        r"names the key 'dtype' twice",
    ),
    "NaN": (shard({"a": entry(shape=(float("nan"),))}), r"holds NaN, which is not JSON"),
    "Infinity": (shard({"a": entry(end=float("inf"))}), r"holds Infinity, which is not JSON"),
    "metadata of numbers": (
        shard({"__metadata__": {"format": 1}}),
        r"__metadata__ is not an object of strings",
    ),
    "metadata is no object": (shard({"__metadata__": "pt"}), r"__metadata__ is not an object"),
    "entry is no object": (shard({"a": 1}), r"described by dtype, shape and data_offsets"),
    "entry without shape": (
        shard({"a": {"dtype": "F32", "data_offsets": [0, 0]}}),
        r"described by dtype, shape and data_offsets, and nothing else",
    ),
    "entry with more": (shard({"a": {**entry(), "x": 1}}, EIGHT), r"and nothing else"),
    "unknown dtype": (shard({"a": entry("F31")}, EIGHT), r"a: unknown dtype 'F31'"),
    "dtype is a list": (shard({"a": entry(["F32"])}, EIGHT), r"unknown dtype"),
    "dtype in small letters": (shard({"a": entry("f32")}, EIGHT), r"unknown dtype 'f32'"),
    "negative size": (
        shard({"a": entry(shape=(-2, -1))}, EIGHT),
        r"the shape \[-2, -1\] is not a list of at most 64 sizes >= 0",
    ),
    "size is a float": (shard({"a": entry(shape=(2.0,))}, EIGHT), r"the shape \[2\.0\] is not"),
    "size is a truth": (shard({"a": entry(shape=(2, True))}, EIGHT), r"\[2, True\] is not a list"),
    "size is text": (shard({"a": entry(shape=("2",))}, EIGHT), r"the shape \['2'\] is not"),
    "shape is a number": (shard({"a": entry(shape=2)}, EIGHT), r"the shape 'int' is not a list"),
    "65 axes": (shard({"a": entry(shape=[1] * 64 + [2])}, EIGHT), r"is not a list of at most 64"),
    "overflowing shape": (
        shard({"a": entry(shape=(2**32, 2**32, 2**32))}, EIGHT),
        r"F32 of shape .* does not fill the 8 bytes",
    ),
    "size beyond 63 bits": (shard({"a": entry(shape=(2**64 + 2,))}, EIGHT), r"is not a list"),
    "shape and bytes differ": (
        shard({"a": entry(shape=(3,))}, EIGHT),
        r"a: F32 of shape \[3\] does not fill the 8 bytes of its data_offsets",
    ),
    "half a byte": (shard({"a": entry("F4", (3,), 0, 1)}, b"x"), r"F4 of shape \[3\] does not"),
    "three offsets": (
        shard({"a": {**entry(), "data_offsets": [0, 8, 8]}}, EIGHT),
        r"data_offsets \[0, 8, 8\] is not a pair",
    ),
    "offsets reversed": (
        shard({"a": entry(begin=8, end=0)}, EIGHT),
        r"data_offsets \[8, 0\] is not a pair \[begin, end\] with begin <= end",
    ),
    "negative offset": (shard({"a": entry(begin=-8, end=0)}, EIGHT), r"is not a pair"),
    "overlap": (
        shard({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)),
        r"b: overlaps the tensor before it",
    ),
    "same bytes twice": (shard({"a": entry(), "b": entry()}, EIGHT), r"b: overlaps the tensor"),
    "gap between": (
        shard({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)),
        r"b: leaves a gap",
    ),
    "gap before": (shard({"a": entry(begin=8, end=16)}, bytes(16)), r"a: leaves a gap"),
    "one byte short": (
        shard({"a": entry()}, bytes(7)),
        r"model\.safetensors: is truncated: expected 7\d bytes, found \d\d\n",
    ),
    "one byte more": (
        shard({"a": entry()}, bytes(9)),
        r"has bytes after its last tensor: expected 7\d bytes, found 7\d",
    ),
    "a zip behind": (shard({"a": entry()}, EIGHT + b"PK\3\4"), r"could hide another format"),
    "name of a NUL": (shard({"a\0b": entry()}, EIGHT), r"tensor name 'a\\x00b' cannot be printed"),
    "name of a newline": (shard({"a\n": entry()}, EIGHT), r"cannot be printed"),
    "name of half a pair": (shard({"\ud800": entry()}, EIGHT), r"'\\ud800' cannot be printed"),
    "name turns the text": (shard({"a\u202eb": entry()}, EIGHT), r"cannot be printed"),
    "no name": (shard({"": entry()}, EIGHT), r"the tensor name '' cannot be printed"),
    "no tensors": (shard({"__metadata__": {"format": "pt"}}), r"holds no tensors"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_bad_header_is_refused(tmp_path: Path, case: str) -> None:
    raw, message = HEADERS[case]
    base = make(tmp_path / "base")
    open_checkpoint(base)  # the control: it is this file that is refused
    (base / SINGLE).write_bytes(raw)
    refuse(base, message)


def test_an_unusual_header_is_read(tmp_path: Path) -> None:
    """Names with paths, tensors out of order in the text, padding and no metadata are allowed."""
    header = {"../b c": entry(begin=8, end=16), "a": entry(), "void": entry(shape=(0,), end=0)}
    base = make(tmp_path / "base")
    (base / SINGLE).write_bytes(shard(None, bytes(16), raw=json.dumps(header).encode() + b"  "))
    assert list(open_checkpoint(base).tensors) == ["void", "a", "../b c"]


def test_a_type_without_a_torch_tensor_is_described_but_not_read(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    (base / SINGLE).write_bytes(shard({"a": entry("F4", (16,))}, EIGHT))
    checkpoint = open_checkpoint(base)
    assert checkpoint.tensors["a"].nbytes == 8
    with pytest.raises(CheckpointError, match="elements of type F4 cannot be read as a torch"):
        checkpoint.read("a")


VALID = [
    save(TWO, {"format": "pt"}),
    save({"x": torch.zeros(3, 2, dtype=torch.bfloat16), "y": torch.ones(5, dtype=torch.int8)}),
    shard({"a": entry("F64", (1,)), "b": entry("U8", (0,), 8, 8)}, EIGHT),
]
SPLICES = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"1e9", b"9" * 30, b"null", b" "]
SPLICES += [
    b"true",
    b'"a":',
    b"\\ud800",
    b"\x00",
    b"\xff",
    b"F64",
    b"BF16",
    b"data_offsets",
    b"NaN",
]


def parse(raw: bytes) -> None:
    length = header_length(raw[:64], shard="s", size=len(raw))
    parse_header(raw[8 : 8 + length], shard="s", size=len(raw))


def accepted(raw: bytes) -> bool:
    try:
        parse(raw)
    except CheckpointError:
        return False
    return True


EDIT = st.tuples(
    st.integers(0, 400), st.integers(0, 12), st.sampled_from(SPLICES) | st.binary(max_size=4)
)


@settings(max_examples=600)
@given(st.sampled_from(VALID), st.lists(EDIT, min_size=1, max_size=3), st.booleans())
def test_a_mutated_header_is_refused_in_words_or_valid(
    raw: bytes, edits: list[tuple[int, int, bytes]], fix_length: bool
) -> None:
    """Whatever is accepted, the reference parser accepts too; all else is a CheckpointError."""
    length = int.from_bytes(raw[:8], "little")
    text, data = raw[8 : 8 + length], raw[8 + length :]
    for position, cut, splice in edits:
        position %= len(text) + 1
        text = text[:position] + splice + text[position + cut :]
    mutated = struct.pack("<Q", len(text) if fix_length else length) + text + data
    if accepted(mutated):
        safetensors.deserialize(mutated)


@given(st.binary(max_size=200))
def test_noise_is_refused_in_words(raw: bytes) -> None:
    assert not accepted(raw) or safetensors.deserialize(raw) is not None


@pytest.mark.parametrize("raw", VALID)
def test_the_reference_parser_and_this_one_agree_on_valid_files(raw: bytes) -> None:
    length = int.from_bytes(raw[:8], "little")
    found = parse_header(raw[8 : 8 + length], shard="s", size=len(raw))
    expected = dict(safetensors.deserialize(raw))
    assert {i.name for i in found} == set(expected)
    for info in found:
        theirs = expected[info.name]
        assert (info.dtype, list(info.shape)) == (theirs["dtype"], theirs["shape"])
        assert raw[info.start : info.stop] == bytes(theirs["data"])


def test_random_bytes_in_place_of_a_length_never_allocate_them(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    raw = bytearray((base / SINGLE).read_bytes())
    for length in (2**63, 2**40, MAX_HEADER, len(raw), len(raw) - 7):
        raw[:8] = struct.pack("<Q", length)
        (base / SINGLE).write_bytes(raw)
        refuse(base, "announces a header|is truncated")


# -------------------------------------------------------------------------------------- index


def index_of(base: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((base / INDEX).read_text(encoding="utf-8"))
    return found


ESCAPES = [
    "../x.safetensors",
    "/etc/hostname",
    "..",
    ".",
    "",
    "a/b.safetensors",
    "a\\b.safetensors",
]
ESCAPES += ["a\0.safetensors", "x\n.safetensors", "../../.ssh/id_rsa", "C:\\x.safetensors"]
ESCAPES += ["x" * 300 + ".safetensors", "\ud800.safetensors"]


@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    base = make(tmp_path / "base", sharded=True)
    save_file(TWO, tmp_path / "x.safetensors")  # what the poisoned index is after
    index = index_of(base)
    index["weight_map"]["a"] = name
    (base / INDEX).write_text(json.dumps(index), encoding="utf-8")
    error = refuse(base, "the index names a file outside the folder")
    assert error.where == f"{INDEX}: a"


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].pop(key)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].update({key: value})


INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no weight_map": (lambda i: i.pop("weight_map"), "weight_map is not an object of file names"),
    "weight_map is a list": (
        lambda i: i.update(weight_map=["a"]),
        "weight_map is not an object of file names",
    ),
    "file is a number": (put("a", 1), "weight_map is not an object of file names"),
    "metadata is a list": (lambda i: i.update(metadata=[]), "metadata is not an object"),
    "a pickle": (put("a", "pytorch_model.bin"), "'pytorch_model.bin', which is no safetensors"),
    "no tensors": (lambda i: i["weight_map"].clear(), "names no tensor"),
    "a missing shard": (
        put("c", "model-3-of-3.safetensors"),
        r"1 of 3 shards are missing, first model-3-of-3\.safetensors",
    ),
    "a tensor that is in no shard": (
        put("c", "model-1-of-2.safetensors"),
        r"the index says that c is in model-1-of-2\.safetensors, which does not hold it",
    ),
    "a tensor that is in another shard": (
        put("a", "model-2-of-2.safetensors"),
        r"1 of 2|the index says that a is in model-2-of-2\.safetensors, which does not hold it",
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_bad_index_is_refused(tmp_path: Path, case: str) -> None:
    change, message = INDEXES[case]
    base = make(tmp_path / "base", sharded=True)
    index = index_of(base)
    open_checkpoint(base)
    change(index)
    (base / INDEX).write_text(json.dumps(index), encoding="utf-8")
    refuse(base, message)


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    base = make(tmp_path / "base", sharded=True)
    hidden = {"a": TWO["a"], "hidden": torch.zeros(2)}
    save_file(hidden, base / "model-1-of-2.safetensors")
    refuse(base, r"model-1-of-2\.safetensors holds hidden, which the index does not name")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    base = make(tmp_path / "base", sharded=True)
    save_file(TWO, base / "model-2-of-2.safetensors")
    refuse(base, r"a is in two files: model-1-of-2\.safetensors and model-2-of-2\.safetensors")


def test_an_index_that_is_no_object_or_repeats_itself_is_refused(tmp_path: Path) -> None:
    base = make(tmp_path / "base", sharded=True)
    (base / INDEX).write_bytes(b"[]")
    refuse(base, "is not a JSON object")
    (base / INDEX).write_bytes(b'{"weight_map": {"a": "x", "a": "y"}}')
    refuse(base, "names the key 'a' twice")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    base = make(tmp_path / "base", sharded=True)
    (base / "model-2-of-2.safetensors").unlink()
    refuse(base, r"1 of 2 shards are missing, first model-2-of-2\.safetensors")


def test_a_truncated_shard_is_named_with_both_lengths(tmp_path: Path) -> None:
    base = make(tmp_path / "base", sharded=True)
    file = base / "model-2-of-2.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    expected = f"is truncated: expected {len(whole)} bytes, found {len(whole) - 3}"
    error = refuse(base, expected)
    assert error.where == "model-2-of-2.safetensors"


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    base = make(tmp_path / "base", sharded=True)
    save_file(TWO, base / SINGLE)
    refuse(base, f"holds both {SINGLE} and an index that names other files")


def test_an_index_of_one_file_is_read(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    index = {"weight_map": dict.fromkeys(TWO, SINGLE)}
    (base / INDEX).write_text(json.dumps(index), encoding="utf-8")
    checkpoint = open_checkpoint(base)
    assert checkpoint.shards == (SINGLE,) and checkpoint.index_text is not None


# -------------------------------------------------------------------------- folder and config


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "nope", "does not exist; a checkpoint is a folder")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    refuse(base / SINGLE, "is a file; a checkpoint is a folder")


@pytest.mark.parametrize(
    "text",
    [
        *("name", "./owner/name", "/owner/name", "a/b/c", "owner/..", "owner/na me", "owner/name@"),
        *("owner/na--me", "owner/name.git", "owner/name@../x", "-o/name", "https://hf.co/o/n"),
    ],
)
def test_text_that_is_neither_a_folder_nor_a_hub_id_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(text, "is neither a folder here nor a Hub id")


@pytest.mark.parametrize("text", ["", "a\0b"])
def test_text_that_names_nothing_is_refused(text: str) -> None:
    refuse(text, "names no checkpoint")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    with pytest.raises(UsageError, match="is a folder and has no revision 'main'"):
        open_checkpoint(base, revision="main")


def test_a_folder_that_may_not_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make(tmp_path / "base")

    def denied(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)  # root, whom tests may run as, is never denied
    refuse(base, "base: cannot be read: Permission denied")


def test_a_name_that_no_file_can_have_is_refused() -> None:
    refuse("x" * 5000, "x: cannot be read: File name too long")


FILES: dict[str, tuple[dict[str, bytes], str]] = {
    "pickles only": (
        {"pytorch_model.bin": b"x"},
        r"has weights in another format only(.|\n)*from_pretrained\(.*save_pretrained",
    ),
    "GGUF only": ({"model.gguf": b"GGUF"}, "is a folder of GGUF files"),
    "shards without an index": (
        {"model-00001-of-00002.safetensors": b"x"},
        r"has safetensors files \(model-00001-of-00002\.safetensors\), but neither",
    ),
    "an adapter": ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "adapter"),
    "an adapter beside a model": ({"adapter_config.json": b"{}", SINGLE: b""}, "adapter first"),
    "nothing": ({}, f"has no {SINGLE} and no {INDEX}"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_folder_without_safetensors_says_what_to_do(tmp_path: Path, case: str) -> None:
    files, message = FILES[case]
    base = make(tmp_path / "base")
    (base / SINGLE).unlink()
    for name, data in files.items():
        (base / name).write_bytes(data)
    refuse(base, message)


CONFIGS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, r"has no config\.json"),
    "empty": (b"", r"config\.json: is not valid JSON"),
    "a list": (b"[]", r"config\.json: is not a JSON object"),
    "a key twice": (b'{"a": 1, "a": 2}', r"config\.json: names the key 'a' twice"),
    "not UTF-8": (b'{"a": "\xff"}', r"config\.json: is not UTF-8 text"),
    "byte order mark": (b"\xef\xbb\xbf{}", r"config\.json: is not valid JSON"),
    "another weight file": (
        b'{"transformers_weights": "other.safetensors"}',
        "names its own weight file under transformers_weights",
    ),
    **{
        f"{count} of {key}": (
            json.dumps(within).encode(),
            rf"config\.json: {key} = {count}, and the checkpoint holds 2 tensors",
        )
        for key, count, within in (
            ("num_hidden_layers", 2**31, {"num_hidden_layers": 2**31}),
            ("num_layers", 10**30, {"vision_config": {"num_layers": 10**30}}),
            ("num_experts", 2**40, {"text_config": {"moe": {"num_experts": 2**40}}}),
            ("depth", 2**31, {"towers": [{"depth": 2**31}]}),
        )
    },
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bad_config_is_refused(tmp_path: Path, case: str) -> None:
    raw, message = CONFIGS[case]
    base = make(tmp_path / "base")
    (base / "config.json").unlink()
    if raw is not None:
        (base / "config.json").write_bytes(raw)
    refuse(base, message)


def test_a_size_that_names_layers_is_no_count_of_them(tmp_path: Path) -> None:
    """Gemma 4 says how many tokens its table for every layer has."""
    base = make(tmp_path / "base")
    counts = {"vocab_size_per_layer_input": 262144, "num_hidden_layers": 2}
    (base / "config.json").write_text(json.dumps(counts))
    assert open_checkpoint(base).config == counts


def test_a_config_of_infinity_is_read_and_kept(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    text = '{"time_step_limit": [0.0, Infinity]}'
    (base / "config.json").write_text(text, encoding="utf-8")
    checkpoint = open_checkpoint(base)
    assert checkpoint.config["time_step_limit"] == [0.0, float("inf")]
    assert checkpoint.config_text == text


def test_a_config_without_end_is_not_read(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    with (base / "config.json").open("r+b") as file:
        file.truncate(10**12)  # sparse: it takes no space
    refuse(base, r"is 1000000000000 bytes long; the limit is 16000000")


# -------------------------------------------------------------------------------------- links

LINKED = ["tokenizer.json", SINGLE, "config.json", "additional_chat_templates/a.jinja"]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    base = make(tmp_path / "base")
    secret = tmp_path / "id_rsa"
    secret.write_bytes((base / name).read_bytes() if (base / name).exists() else b"secret")
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret)
    error = refuse(base, r"is a link out of the folder, to .*id_rsa")
    assert error.where == str(base.resolve() / name)


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    (base / SINGLE).rename(base / "weights.data")
    (base / SINGLE).symlink_to("weights.data")
    (base / "a.txt").write_bytes(b"a")
    (base / "b.txt").symlink_to(base / "a.txt")
    checkpoint = open_checkpoint(base)
    assert torch.equal(checkpoint.read("a"), TWO["a"])
    write_new(checkpoint, tmp_path / "out")
    for name in (SINGLE, "b.txt"):
        assert not (tmp_path / "out" / name).is_symlink()
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def cached(tmp_path: Path) -> Path:
    """Lay a checkpoint out as the Hugging Face cache does, and return the snapshot."""
    made = make(tmp_path / "made")
    snapshot = tmp_path / "models--o--n" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (made / "tokenizer.json").write_bytes(b"{}")
    for i, file in enumerate(sorted(made.iterdir())):
        file.rename(blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    return snapshot


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(cached(tmp_path))
    assert torch.equal(checkpoint.read("b"), TWO["b"])
    assert checkpoint.side_files == ("tokenizer.json",)


def test_a_cache_folder_is_no_licence_for_other_links(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    (tmp_path / "secret").write_bytes(b"x")
    (snapshot / "extra.txt").symlink_to("../../../secret")
    refuse(snapshot, "is a link out of the folder")
    (snapshot / "extra.txt").unlink()
    # a blob that is itself a link leads on to the secret
    (snapshot.parent.parent / "blobs" / "9").symlink_to(tmp_path / "secret")
    (snapshot / "extra.txt").symlink_to("../../blobs/9")
    refuse(snapshot, "is a link out of the folder")


def test_blobs_that_are_a_link_are_refused(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "home")
    blobs.symlink_to(tmp_path / "home")
    refuse(snapshot, "is a link out of the folder")


def test_a_linked_folder_of_templates_is_refused(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "x").write_bytes(b"x")
    (base / "additional_chat_templates").symlink_to(tmp_path / "private")
    refuse(base, "is a link out of the folder")


@pytest.mark.parametrize("target", ["nowhere", "tokenizer.json"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path, target: str) -> None:
    base = make(tmp_path / "base")
    (base / "tokenizer.json").symlink_to(target)
    refuse(base, "is a link that leads nowhere")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    os.mkfifo(base / "tokenizer.json")
    refuse(base, "is neither a file nor a link to one")
    (base / "tokenizer.json").unlink()
    (base / SINGLE).unlink()
    os.mkfifo(base / SINGLE)
    refuse(base, "is neither a file nor a link to one")


def test_a_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    (base / "sub").mkdir()
    (base / "vocab").symlink_to("sub")
    refuse(base, "which is no regular file")


def test_what_does_not_travel_is_not_looked_at(tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    (tmp_path / "secret").write_bytes(b"x")
    (base / ".env").symlink_to(tmp_path / "secret")
    (base / "weights.bin").symlink_to(tmp_path / "secret")
    assert set(open_checkpoint(base).left_out) == {".env", "weights.bin"}
