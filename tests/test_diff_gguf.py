"""``bake diff`` on pairs of GGUF files."""

import json
import re
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from directions_artifacts import gguf as one_gguf
from directions_artifacts import string_value as text_value
from exporting import written
from harness import base_at, edit, plan_of, vector

from bake import edits as make
from bake.checkpoints.gguf.file import CONTROL_VECTORS
from bake.cli import main
from bake.diff import diff
from bake.diff.sources import open_model
from bake.errors import CheckpointError, UsageError

SIZES = {"hidden_size": 128, "intermediate_size": 160, "vocab_size": 96}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model"
    model = tiny.make_model("llama", dtype=torch.float32, tied=False, head_dim=32, **SIZES)
    tiny.write_checkpoint(model, path)
    return path


def baked(base: Path, source: Path, out: Path, **options: Any) -> Path:
    opened = base_at(base)
    ablation = edit(opened, "ablate", make.ablate(vector(128)), "resid")
    plan = plan_of(opened, [ablation], targets=("llama.cpp",))
    record = {"base": {"model": str(base)}}
    asked = {"allow": frozenset({"approximate"}), "gguf_type": "keep", **options}
    written("gguf", plan, opened.checkpoint, out, gguf=source, record=record, **asked)
    return out / source.name


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0"])
def test_a_baked_gguf_is_what_its_record_says(base: Path, tmp_path: Path, kind: str) -> None:
    source = gguf_files.write(tmp_path / "base.gguf", base, kind)
    out = baked(base, source, tmp_path / "out")
    found = diff(str(out), str(source), given={"mine": vector(128)[None]})
    assert found.violations == (), found.violations
    assert found.family is not None and "llama" in found.family
    (space,) = found.subspaces
    assert (space.side, space.shared, space.dimension) == ("written", True, 1)
    # In four bits a step is larger than what the edit changes of most values.
    least = 0.9 if kind == "Q4_0" else 0.99
    assert dict(space.cosines)["mine"] > least and dict(space.cosines)["edit c"] > least
    matrices = [c for c in found.changes if c.matrix[1] > 1]
    assert {c.tensor for c in matrices} == {
        "token_embd.weight",
        *(f"blk.{i}.{n}.weight" for i in range(3) for n in ("attn_output", "ffn_down")),
    }
    assert all(c.spectrum is not None and c.spectrum.rank == 1 for c in matrices)
    assert {key.key for key in found.metadata} == {"bake.version", "bake.plan_digest"}
    assert found.fetched == 0 and not found.untouched_writers


def test_a_foreign_change_of_a_gguf_is_found(base: Path, tmp_path: Path) -> None:
    source = gguf_files.write(tmp_path / "base.gguf", base, "Q8_0")
    out = baked(base, source, tmp_path / "out")
    from bake.checkpoints.gguf.file import open_gguf

    info = open_gguf(out).tensors["blk.1.ffn_up.weight"]
    raw = bytearray(out.read_bytes())
    raw[info.start + 7] ^= 3
    out.write_bytes(raw)
    (line,) = diff(str(out), str(source)).violations or ()
    assert line == "blk.1.ffn_up.weight differs in 1 value, and the plan does not edit it"


def test_a_type_that_cannot_be_gridded_has_no_rank(base: Path, tmp_path: Path) -> None:
    """The steps of an MXFP4 block are uneven: norms are told, and no rank is made up."""
    one = gguf_files.write(tmp_path / "one.gguf", base, "MXFP4")
    other = gguf_files.write(tmp_path / "other.gguf", moved(base, tmp_path), "MXFP4")
    found = diff(str(other), str(one))
    change = next(c for c in found.changes if c.dtypes[0] == "MXFP4")
    assert change.norm and change.spectrum is not None
    assert change.spectrum.rank is None and change.spectrum.threshold is None
    text = json.dumps(found.to_json(), allow_nan=False)
    assert '"rank_above": null' in text


def moved(base: Path, tmp_path: Path) -> Path:
    """Return a model that differs from the base in one matrix."""
    from safetensors.torch import save_file

    out = tmp_path / "moved"
    out.mkdir()
    tensors = tiny.tensors_of(base)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1.5
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((base / "config.json").read_text())
    return out


def test_types_and_metadata_that_differ_are_told(base: Path, tmp_path: Path) -> None:
    one = gguf_files.write(tmp_path / "one.gguf", base, "F16")
    kinds = {"blk.0.ffn_down.weight": "Q8_0"}
    two = gguf_files.write(tmp_path / "two.gguf", base, "F16", kinds=kinds, drop=("output.weight",))
    found = diff(str(two), str(one))
    assert found.retyped == ("blk.0.ffn_down.weight",) and found.missing == ("output.weight",)
    (change,) = found.changes
    assert change.dtypes == ("F16", "Q8_0")
    assert change.spectrum is not None and change.spectrum.rank == 0  # requantised, not edited
    assert found.violations is None


def test_experts_are_told_apart(tmp_path: Path) -> None:
    model = tiny.make_model("mixtral", dtype=torch.float32)
    tiny.write_checkpoint(model, tmp_path / "a")
    one = gguf_files.write(tmp_path / "one.gguf", tmp_path / "a", "F32")
    _, tensors = gguf_files.converted(tmp_path / "a")
    name = next(n for n in tensors if re.fullmatch(r"blk\.1\.ffn_down_exps\.weight", n))
    stack = tensors[name].copy()
    stack[2] += np.outer(np.arange(stack.shape[1]), np.ones(stack.shape[2]))
    two = gguf_files.write(tmp_path / "two.gguf", tmp_path / "a", "F32", extra={name: stack})
    (change,) = diff(str(two), str(one)).changes
    assert change.name == f"{name}[2]"
    assert change.spectrum is not None and change.spectrum.rank == 1


def test_wrong_pairs_are_refused(base: Path, tmp_path: Path) -> None:
    source = gguf_files.write(tmp_path / "base.gguf", base, "F32")
    with pytest.raises(UsageError, match="a checkpoint and a GGUF file cannot be compared"):
        diff(str(source), str(base))
    with pytest.raises(UsageError, match="is a folder of GGUF files") as caught:
        diff(str(tmp_path), str(source))
    assert str(source) in str(caught.value)
    (tmp_path / "no.gguf").write_bytes(b"GGUX" + bytes(40))
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        diff(str(tmp_path / "no.gguf"), str(source))


def test_the_command_line_takes_gguf_files(base: Path, tmp_path: Path) -> None:
    source = gguf_files.write(tmp_path / "base.gguf", base, "Q8_0")
    out = baked(base, source, tmp_path / "out")
    done = CliRunner(env={"COLUMNS": "120"}).invoke(main, ["diff", str(source), str(out)])
    assert done.exit_code == 0, done.output
    assert "nothing differs but what the plan names" in done.stdout
    assert "Metadata" in done.stdout


@pytest.mark.parametrize("arch", [*CONTROL_VECTORS, "llama"])
def test_a_control_vector_is_no_model_to_compare(tmp_path: Path, arch: str) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(
        one_gguf([("direction.1", (4,), 0, bytes(16))], {"general.architecture": text_value(arch)})
    )
    if arch == "llama":  # the control
        assert open_model(str(path), tmp_path).gguf is not None
        return
    with pytest.raises(UsageError, match="is a control vector and no model"):
        open_model(str(path), tmp_path)
