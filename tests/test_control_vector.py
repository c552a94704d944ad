"""Offsets as a control vector: the file, what llama.cpp makes of it, and what is no control vector.

llama.cpp's arithmetic (``src/llama-adapter.cpp: llama_adapter_cvec``) is stated here by hand on the
live model; the runtime tests run the real one.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from exporting import written
from harness import RELATIVE, Base, base_at, edit, logits, plan_of, vector
from torch import Tensor

from bake import edits as make
from bake.directions import Role, read_directions
from bake.edits import Edit
from bake.errors import InexactPlan, InputError, UsageError
from bake.outputs.control_vector import write_vectors

Checkpoints = Callable[..., Path]


def vectors_of(path: Path) -> dict[int, Tensor]:
    """Read a file as llama.cpp's loader does: the number behind the last dot, float32 values."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        word, _, number = tensor.name.rpartition(".")
        assert word == "direction" and int(number) > 0
        assert tensor.data.dtype == np.float32 and tensor.data.ndim == 1
        found[int(number)] = torch.from_numpy(np.array(tensor.data))
    return found


@contextmanager
def served(base: Base, vectors: dict[int, Tensor]) -> Iterator[None]:
    """Add ``direction.N`` to the output of block N, for N from 1 to the last block."""
    path = base.layout.block_live
    handles = []
    for layer, added in vectors.items():
        block = base.model.get_submodule(path.replace("{layer}", str(layer)))

        def hook(_module: object, _args: object, output: object, added: Tensor = added) -> object:
            if isinstance(output, tuple):
                return (output[0] + added.to(output[0]), *output[1:])
            assert isinstance(output, Tensor)
            return output + added.to(output)

        handles.append(block.register_forward_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def single(n: int, seed: int = 0) -> Tensor:
    """Return a vector that float32 holds, as fitted ones are."""
    return vector(n, seed).to(torch.float32).to(torch.float64)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_served_family_takes_offsets(
    family: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Also those without a bias slot, for which no checkpoint is exact."""
    base = base_at(tiny_checkpoint(family))
    hidden = base.layout.hidden
    edits = [
        edit(base, "offset", make.offset(single(hidden)), "resid_post.1-2", "a"),
        # The input of block 2 is the output of block 1.
        edit(base, "offset", make.offset(single(hidden, 1), coefficient=-2.0), "resid_pre.2", "b"),
    ]
    out = written("control-vector", plan_of(base, edits), base.checkpoint, tmp_path / "out")
    vectors = vectors_of(out.path / "control-vector.gguf")
    assert sorted(vectors) == [1, 2]
    hooked, plain = logits(base.model, base, edits), logits(base.model, base)
    effect = float((hooked - plain).abs().max())
    assert effect > 1e-2
    with served(base, vectors):
        # The file is in float32, which here holds the vectors but not every sum of two of them.
        error = float((logits(base.model, base) - hooked).abs().max())
    assert error <= 1e-6 * effect
    with served(base, {1: vectors[2], 2: vectors[1]}):
        assert float((logits(base.model, base) - hooked).abs().max()) > 1e-3 * effect


def test_round_trip_with_the_reader_of_directions(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    hidden = base.layout.hidden
    edits = [
        edit(base, "offset", make.offset(single(hidden, layer)), f"resid_post.{layer}", str(layer))
        for layer in (2, 1)
    ]
    out = written("control-vector", plan_of(base, edits), base.checkpoint, tmp_path / "out").path
    file = out / "control-vector.gguf"
    read = read_directions(file)
    assert [item.site for item in read.items] == ["resid_post.1", "resid_post.2"]
    back = {item.layer: item.tensors[Role.VECTOR] for item in read.items}
    for layer, values in back.items():
        assert layer is not None
        assert torch.equal(values.to(torch.float64), single(hidden, layer))
    again = tmp_path / "again.gguf"
    write_vectors(again, {layer: values for layer, values in back.items() if layer}, "llama")
    assert again.read_bytes() == file.read_bytes()
    # And what was read is the same edit again.
    rebuilt = [
        edit(base, "offset", make.offset(values), f"resid_post.{layer}")
        for layer, values in back.items()
    ]
    hooked = logits(base.model, base, edits)
    assert float((logits(base.model, base, rebuilt) - hooked).abs().max()) <= RELATIVE


def test_metadata(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("qwen2"))
    plan = plan_of(base, [edit(base, "offset", make.offset(single(24)), "resid_post.1")])
    artifact = written(
        "control-vector", plan, base.checkpoint, tmp_path / "out", record={"base": {"model": "m"}}
    )
    fields = gguf.GGUFReader(artifact.path / "control-vector.gguf").fields
    assert fields["general.architecture"].contents() == "controlvector"
    assert fields["controlvector.model_hint"].contents() == "qwen2"
    assert fields["controlvector.layer_count"].contents() == 1
    record = json.loads((artifact.path / "bake.json").read_text())
    assert (record["kind"], record["base"]["model"]) == ("control-vector", "m")
    # The checkpoint of this plan is impossible, the control vector exact, and the record says so.
    assert record["plan"]["exactness"] == "exact"
    assert record["plan"]["findings"][0]["reason"] == "added behind block 1"
    assert sorted(artifact.files) == ["bake.json", "bake/edits.safetensors", "control-vector.gguf"]


def cases(base: Base) -> dict[str, tuple[Edit, str]]:
    n = base.layout.hidden
    offset = make.offset(vector(n))
    behind = "llama.cpp adds a control vector behind block 1 and later, and"
    return {
        "block 0": (edit(base, "offset", offset, "resid_post.0"), f"{behind} resid_post.0 comes"),
        "input of block 1": (edit(base, "offset", offset, "resid_pre.1"), f"{behind} resid_pre.1"),
        "input": (edit(base, "offset", offset, "resid_pre.0"), f"{behind} resid_pre.0 comes"),
        "embedding": (edit(base, "offset", offset, "embed"), f"{behind} embed comes before"),
        "mid block": (edit(base, "offset", offset, "resid_mid.1"), "and resid_mid.1 is elsewhere"),
        "module": (edit(base, "offset", offset, "mlp_out.1"), "and mlp_out.1 is elsewhere"),
        "last norm": (edit(base, "offset", offset, "ln_final_out"), "ln_final_out is elsewhere"),
        "no constant": (
            edit(base, "ablate", make.ablate(vector(n)), "resid_post.1"),
            "a control vector adds a constant, and ablate does more than that",
        ),
        "an update": (
            edit(base, "update", make.update(vector(n), vector(32)), "attn_out.1"),
            "a control vector adds a constant, and update does more than that",
        ),
    }


def test_refused(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama"))
    for bad, words in cases(base).values():
        good = edit(base, "offset", make.offset(vector(24, 5)), "resid_post.2", "fine")
        with pytest.raises(InexactPlan, match="as control-vector: impossible") as error:
            written("control-vector", plan_of(base, [good, bad]), base.checkpoint, tmp_path / "out")
        assert error.value.why is not None and words in error.value.why
        assert "'c'" in error.value.what
        assert list(tmp_path.iterdir()) == []


def test_offsets_that_cancel(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama"))
    edits = [
        edit(base, "offset", make.offset(single(24), coefficient=c), "resid_post.1")
        for c in (1.0, -1.0)
    ]
    with pytest.raises(UsageError, match="every offset is zero"):
        written("control-vector", plan_of(base, edits), base.checkpoint, tmp_path / "out")
    other = edit(base, "offset", make.offset(single(24)), "resid_post.2")
    out = written(
        "control-vector", plan_of(base, [*edits, other]), base.checkpoint, tmp_path / "out"
    )
    assert sorted(vectors_of(out.path / "control-vector.gguf")) == [2]


def test_a_value_that_float32_cannot_hold(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama"))
    huge = make.offset(single(24), coefficient=1e38)
    plan = plan_of(base, [edit(base, "offset", huge, at) for at in ("resid_post.1", "resid_pre.2")])
    with pytest.raises(InputError, match=r"direction\.1 does not fit its dtype"):
        written("control-vector", plan, base.checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
