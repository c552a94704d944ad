"""A baked GGUF goes back to the file that it was made of, bit for bit."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import gguf_files
import pytest
from exporting import written
from folders import files_of, flip
from harness import base_at, edit, plan_of, vector
from published import rewrite
from reverting import refused, revert, reverted

from bake import edits as make
from bake.checkpoints.gguf.file import open_gguf

Tiny = Callable[..., Path]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # whole blocks of 32 values


def baked_from(path: Path, file: Path, out: Path, kind: str, at: object) -> Path:
    """Bake a GGUF of a checkpoint; its record is an earlier one, without the hash of the base."""
    base = base_at(path)
    map_ = {"ablate": make.ablate, "offset": make.offset}[kind](vector(64))
    plan = plan_of(base, [edit(base, kind, map_, at)])  # type: ignore[arg-type]
    record = {"base": {"model": "owner/name", "revision": None, "path": None}}
    allow = frozenset({"approximate"})
    written("gguf", plan, base.checkpoint, out, gguf=file, record=record, allow=allow)
    rewrite(out / "bake.json", lambda record: record.pop("export") and None)
    return out


CASES = {
    "F32": ({}, {}, "ablate", ["attn_out.*"]),
    "Q8_0": ({}, {}, "ablate", ["attn_out.0", "mlp_out.1"]),
    "F16": ({"mlp_bias": False}, {}, "offset", "resid_post.1"),  # a new bias
    "BF16": ({"tied": True}, {}, "ablate", "resid"),  # a new head
    "Q4_0": ({}, {"split_max_tensors": 11}, "ablate", ["attn_out.*"]),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_file_comes_back_bit_for_bit(kind: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    options, split, what, at = CASES[kind]
    path = tiny_checkpoint("llama", **WIDE, **options)
    folder = tmp_path / "base"
    folder.mkdir()
    gguf_files.write(folder / "base.gguf", path, kind, **split)
    file = sorted(folder.iterdir())[0]
    out = baked_from(path, file, tmp_path / "out", what, at)
    assert files_of(out)[file.name] != file.read_bytes()  # the effect

    said = reverted(out, tmp_path / "back", "--base", file)
    assert files_of(tmp_path / "back") == files_of(folder)
    assert said["bit_for_bit"] and set(said["compared"]) == set(files_of(folder))
    assert "bake.json" in said["left"] and bool(said["edited"]) == (kind != "F16")
    assert bool(said["removed"]) == (kind in ("F16", "BF16"))
    assert "the record has no hash of the base's file" in said["notes"][0]


@pytest.fixture
def pair(tiny_checkpoint: Tiny, tmp_path: Path) -> tuple[Path, Path]:
    path = tiny_checkpoint("llama", **WIDE)
    file = gguf_files.write(tmp_path / "base.gguf", path, "Q8_0")
    return file, baked_from(path, file, tmp_path / "out", "ablate", ["attn_out.*"])


def test_another_file_is_refused(
    pair: tuple[Path, Path], tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    file, out = pair
    back = tmp_path / "back"
    longer = gguf_files.write(tmp_path / "longer.gguf", tiny_checkpoint("llama", **WIDE), "F16")
    assert "this is not the GGUF" in refused(out, back, "--base", longer)

    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes())
    flip(other, -1)  # a bit of an untouched tensor
    assert "the result would not be other.gguf" in refused(out, back, "--base", other)
    assert "does not exist" in refused(out, back, "--base", tmp_path / "none.gguf")
    flip(other, -1)  # the control
    assert reverted(out, back, "--base", other)["bit_for_bit"]


def test_the_recorded_hash_of_the_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The record that ``bake export`` writes has it: then an edited tensor cannot differ either."""
    file, out = pair
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    rows = [{"name": file.name, "sha256": digest}]
    rewrite(out / "bake.json", lambda record: {**record, "export": {"gguf": rows}})
    assert reverted(out, tmp_path / "back", "--base", file)["notes"] == []
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes())
    edited = json.loads((out / "bake.json").read_text())["gguf"]["tensors"][0]["name"]
    flip(other, open_gguf(file).tensors[edited].start)
    assert "it has another sha256" in refused(out, tmp_path / "none", "--base", other)
    rewrite(out / "bake.json", lambda record: {k: v for k, v in record.items() if k != "export"})
    said = reverted(out, tmp_path / "second", "--base", other)  # the control: nothing tells
    assert said["bit_for_bit"] and "no hash" in said["notes"][0]


def test_a_changed_artifact_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    file, out = pair
    flip(out / "base.gguf", -1)
    assert "would not be base.gguf" in refused(out, tmp_path / "back", "--base", file)
    flip(out / "base.gguf", -1)
    kept = (out / "bake.json").read_text()

    def hide(record: dict[str, dict[str, list[object]]]) -> None:
        record["gguf"]["tensors"].pop()

    rewrite(out / "bake.json", hide)
    assert "would not be base.gguf" in refused(out, tmp_path / "back", "--base", file)
    (out / "bake.json").write_text(kept)

    def out_of_it(record: dict[str, dict[str, list[dict[str, object]]]]) -> None:
        record["gguf"]["base"][0]["name"] = "../base.gguf"

    rewrite(out / "bake.json", out_of_it)
    assert "the record is malformed" in refused(out, tmp_path / "back", "--base", file)


def test_what_a_gguf_needs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    file, out = pair
    back = tmp_path / "back"
    assert "name it with --base FILE.gguf" in refused(out, back, code=2)
    assert "has no revision" in refused(out, back, "--base", file, "--revision", "main", code=2)
    assert revert(out, out / "back", "--base", file).exit_code == 2
    said_dry = reverted(out, back, "--base", file, "--dry-run")
    assert said_dry["bytes_from_base"] > 0 and not back.exists()
    record = json.loads((out / "bake.json").read_text())
    del record["gguf"]
    (out / "bake.json").write_text(json.dumps(record))
    assert "convert the base checkpoint" in refused(out, back, "--base", file)
