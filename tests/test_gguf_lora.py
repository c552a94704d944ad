"""A GGUF adapter, added to the base as llama.cpp adds it, is the hooked model.

What llama.cpp's converter does to each tensor and what its graph does with an adapter is stated
here by hand and shares nothing with the tables; the runtime tests run the real ones.
"""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from adapters import NO_BIAS
from exporting import written
from gguf_files import converted, metadata, stored, write
from harness import Base, base_at, edit, logits, plan_of, vector
from torch import Tensor
from transformers import PreTrainedModel

from bake import edits as make
from bake.affine import AffineMap
from bake.cards.commands import commands
from bake.cards.facts import read_facts
from bake.checkpoints.gguf.file import open_gguf
from bake.edits import Edit
from bake.errors import CheckpointError, UsageError
from bake.verify.stored.gguf import differing

Checkpoints = Callable[..., Path]
HEADS, KV_HEADS = 4, 2  # of every tiny model


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Mirror ``LlamaModel.permute`` of llama.cpp's conversion/llama.py."""
    shape = weight.shape
    halves = weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)


def unpermuted(weight: Tensor, heads: int) -> Tensor:
    shape = weight.shape
    pairs = weight.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    return pairs.swapaxes(1, 2).reshape(shape)


def bloom(weight: Tensor) -> Tensor:
    """Undo what conversion/gptneox.py does: q, k, v one after another become head by head."""
    size = weight.shape[0] // HEADS // 3
    return weight.reshape(3, HEADS, size, -1).swapaxes(0, 1).reshape(weight.shape)


BLOCK = {
    "attn_q": ("self_attn.q_proj", None),
    "attn_k": ("self_attn.k_proj", None),
    "attn_v": ("self_attn.v_proj", None),
    "attn_output": ("self_attn.o_proj", None),
    "ffn_gate": ("mlp.gate_proj", None),
    "ffn_up": ("mlp.up_proj", None),
    "ffn_down": ("mlp.down_proj", None),
}
LLAMA = {
    **BLOCK,
    "attn_q": ("self_attn.q_proj", lambda w: unpermuted(w, HEADS)),
    "attn_k": ("self_attn.k_proj", lambda w: unpermuted(w, KV_HEADS)),
}
NAMES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": {**LLAMA, "ffn_gate_inp": ("mlp.gate", None)},
    "qwen2": BLOCK,
    "qwen3": BLOCK,
    "gemma2": BLOCK,
    "gemma3": BLOCK,
    "phi3": {
        "attn_qkv": ("self_attn.qkv_proj", None),
        "attn_output": ("self_attn.o_proj", None),
        "ffn_up": ("mlp.gate_up_proj", None),
        "ffn_down": ("mlp.down_proj", None),
    },
    "gpt2": {
        "attn_qkv": ("attn.c_attn", lambda w: w.T),
        "attn_output": ("attn.c_proj", lambda w: w.T),
        "ffn_up": ("mlp.c_fc", lambda w: w.T),
        "ffn_down": ("mlp.c_proj", lambda w: w.T),
    },
    "gpt_neox": {
        "attn_qkv": ("attention.query_key_value", bloom),
        "attn_output": ("attention.dense", None),
        "ffn_up": ("mlp.dense_h_to_4h", None),
        "ffn_down": ("mlp.dense_4h_to_h", None),
    },
}
PATH = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def pairs_of(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of every tensor that the adapter is for."""
    found = {t.name: torch.from_numpy(np.array(t.data)) for t in gguf.GGUFReader(file).tensors}
    names = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in found}
    assert len(found) == 2 * len(names)
    return {name: (found[f"{name}.lora_a"], found[f"{name}.lora_b"]) for name in names}


@torch.no_grad()
def served(
    base: Base, family: str, file: Path, *, order: bool = True, apart: bool = False
) -> PreTrainedModel:
    """Return the base with every pair of the adapter added to its weight, scale 1.

    With ``apart`` a tied head is a tensor of its own first.
    """
    model = tiny.load(base.path)
    if apart:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for name, (a, b) in pairs_of(file).items():
        a, b = a.double(), b.double()
        if name == "token_embd.weight":
            model.get_input_embeddings().weight.add_(a @ b.T)
        elif name == "output.weight":
            model.get_output_embeddings().weight.add_(b @ a)
        else:
            _, layer, what, _ = name.split(".")
            stem = f"{PATH.get(family, 'model.layers')}.{layer}"
            if what.endswith("_exps"):
                add_to_experts(model.get_submodule(f"{stem}.mlp.experts"), what, b @ a)
                continue
            module, restore = NAMES[family][what]
            delta = b @ a
            if restore is not None and order:
                delta = restore(delta)
            model.get_submodule(f"{stem}.{module}").weight.add_(delta)
    return model


def add_to_experts(experts: torch.nn.Module, what: str, delta: Tensor) -> None:
    """Add to the fused parameters, [expert, out, in], where gate and up share one."""
    if what == "ffn_down_exps":
        experts.get_parameter("down_proj").add_(delta)
        return
    fused = experts.get_parameter("gate_up_proj")
    half = fused.shape[1] // 2
    part = slice(0, half) if what == "ffn_gate_exps" else slice(half, None)
    fused[:, part].add_(delta)


def ablate(n: int, seed: int = 0) -> AffineMap:
    return make.ablate(vector(n, seed))


def cases(base: Base, family: str) -> dict[str, list[Edit]]:
    n, size = base.layout.hidden, base.layout.dims["head_dim"]
    affine = make.affine(vector(n), mean=vector(n, 1), alpha=0.7)
    heads = [
        edit(base, "ablate", ablate(size), "q.1.h1"),
        edit(base, "ablate", ablate(size, 1), "k.2.h1"),
    ]
    readers = [edit(base, "ablate", ablate(n), ["ln1_out.1", "ln2_out.2"])]
    return {
        "stream": [edit(base, "affine", affine, "resid")],
        "writers": [edit(base, "ablate", ablate(n), ["attn_out.1", "mlp_out.2"])],
        "readers": readers,
        "heads": heads,
        "head": [edit(base, "ablate", ablate(n), "ln_final_out")],
    }


CASES = [
    *[("llama", NO_BIAS, case) for case in ("stream", "writers", "readers", "heads", "head")],
    ("mistral", {}, "heads"),
    ("qwen2", {}, "stream"),
    ("qwen3", {"attention_bias": False}, "stream"),
    ("gemma2", {"attention_bias": False}, "writers"),
    ("gemma3", {"attention_bias": False}, "writers"),
    ("gemma3", {"attention_bias": False}, "readers"),
    ("phi3", {}, "heads"),
    ("phi3", {}, "stream"),
    ("gpt2", {}, "readers"),
    ("gpt_neox", {}, "readers"),
    ("mixtral", {}, "stream"),
    ("mixtral", {}, "readers"),
    ("mixtral", {}, "heads"),
]


@pytest.mark.parametrize(("family", "options", "case"), CASES)
def test_adapter_equals_hooks(
    family: str,
    options: dict[str, object],
    case: str,
    tiny_checkpoint: Checkpoints,
    tmp_path: Path,
) -> None:
    base = base_at(tiny_checkpoint(family, **options))
    edits = cases(base, family)[case]
    plan = plan_of(base, edits)
    out = written("gguf-lora", plan, base.checkpoint, tmp_path / "out").path
    hooked, plain = logits(base.model, base, edits), logits(base.model, base)
    effect = float((hooked - plain).abs().max())
    assert effect > 1e-2
    # The factors are in float32: each product errs by its epsilon, layer after layer.
    bound = torch.finfo(torch.float32).eps * 2 * base.layout.layers * 56
    error = float((logits(served(base, family, out / "lora.gguf"), base) - hooked).abs().max())
    assert error <= bound * max(effect, float(hooked.abs().max()))
    if case == "heads" and family != "phi3":
        # The control: B in the order of the checkpoint's rows is another function.
        wrong = logits(served(base, family, out / "lora.gguf", order=False), base)
        assert float((wrong - hooked).abs().max()) > 1e-3 * effect


def test_metadata(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("mixtral"))
    plan = plan_of(base, [edit(base, "ablate", ablate(24), "resid")])
    record = {"base": {"model": "owner/name", "revision": "0123abcd"}}
    done: list[tuple[int, int]] = []
    artifact = written(
        "gguf-lora",
        plan,
        base.checkpoint,
        tmp_path / "out",
        record=record,
        progress=lambda part, whole: done.append((part, whole)),
    )
    reader = gguf.GGUFReader(artifact.path / "lora.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    # Zero: the scale is the user's, at any rank, so no converter's alpha can go wrong.
    assert fields["adapter.lora.alpha"] == 0.0
    assert fields["general.base_model.0.name"] == "owner/name"
    assert fields["general.base_model.0.version"] == "0123abcd"
    found = json.loads((artifact.path / "bake.json").read_text())
    assert (found["kind"], found["plan"]["exactness"]) == ("gguf-lora", "exact")
    assert done[-1][0] == done[-1][1] == sum(t.n_bytes for t in reader.tensors)
    # No norm: llama.cpp would take it and leave it out without a word.
    names = [tensor.name for tensor in reader.tensors]
    assert not any("norm" in name for name in names)
    assert {t.tensor_type for t in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    # All three projections of the experts, stacked; those that no edit changes hold zeros.
    pairs = pairs_of(artifact.path / "lora.gguf")
    for what, zero in (("gate", True), ("up", True), ("down", False)):
        a, b = pairs[f"blk.1.ffn_{what}_exps.weight"]
        assert a.shape[0] == b.shape[0] == 3 and a.dim() == b.dim() == 3
        assert bool((b @ a).any()) is not zero
    a, b = pairs["token_embd.weight"]
    assert (a.shape, b.shape) == ((56, 1), (24, 1))


TIED = {**NO_BIAS, "tied": True, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.mark.parametrize("at", ["resid", "ln_final_out"])
def test_a_tied_head_needs_the_base_in_gguf(
    at: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """llama.cpp uses one tensor for both and aborts the process at the first token."""
    base = base_at(tiny_checkpoint("llama", **TIED))
    plan = plan_of(base, [edit(base, "ablate", ablate(64), at)])
    with pytest.raises(UsageError, match="goes over a GGUF in which the head is a tensor") as error:
        written("gguf-lora", plan, base.checkpoint, tmp_path / "out")
    assert "aborts" in str(error.value.why) and "--gguf" in str(error.value.fix)
    split = write(tmp_path / "split.gguf", base.path, split_max_tensors=20)
    (first, *others) = sorted(split.parent.glob("split-*.gguf"))
    with pytest.raises(UsageError, match="the head of a split GGUF is tied"):
        written("gguf-lora", plan, base.checkpoint, tmp_path / "out", gguf=first)
    assert others and sorted(tmp_path.iterdir()) == [first, *others]
    inner = plan_of(base, [edit(base, "ablate", ablate(64), "mlp_out.1")])
    out = written("gguf-lora", inner, base.checkpoint, tmp_path / "out").path
    assert not (out / "base.gguf").exists()


@pytest.mark.parametrize("at", ["resid", "ln_final_out"])
def test_a_tied_head_gets_a_tensor_of_its_own(
    at: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", **TIED))
    edits = [edit(base, "ablate", ablate(64), at)]
    own = write(tmp_path / "model.gguf", base.path)
    plan = plan_of(base, edits)
    done: list[tuple[int, int]] = []
    out = written(
        "gguf-lora",
        plan,
        base.checkpoint,
        tmp_path / "out",
        gguf=own,
        progress=lambda part, whole: done.append((part, whole)),
    ).path
    assert done[-1][0] == done[-1][1] > (out / "base.gguf").stat().st_size
    # The base's file, byte for byte, and its embedding once more.
    before, after = stored(own), stored(out / "base.gguf")
    assert after == {**before, "output.weight": before["token_embd.weight"]}
    assert metadata(out / "base.gguf") == metadata(own)
    assert (out / "Modelfile").read_text() == "FROM ./base.gguf\nADAPTER ./lora.gguf\n"
    assert {"base.gguf", "lora.gguf"} <= json.loads((out / "bake.json").read_text())["files"].keys()
    shown = [code for _, code in commands(read_facts(out), None)]
    assert shown[0] == "llama-server -m ./base.gguf --lora ./lora.gguf\n"
    assert "FROM ././base.gguf\\nADAPTER ././lora.gguf" in shown[1]
    pairs = pairs_of(out / "lora.gguf")
    assert ("token_embd.weight" in pairs) == (at == "resid")
    assert ("output.weight" in pairs) == (at == "ln_final_out")
    # What a loader of both files computes: a head of its own, and each pair on its own tensor.
    model = served(base, "llama", out / "lora.gguf", apart=True)
    hooked, plain = logits(base.model, base, edits), logits(base.model, base)
    effect = float((hooked - plain).abs().max())
    assert effect > 1e-2
    bound = torch.finfo(torch.float32).eps * 2 * base.layout.layers * 56
    error = float((logits(model, base) - hooked).abs().max())
    assert error <= bound * max(effect, float(hooked.abs().max()))
    # The control: with one tensor for both it is another function.
    tied = logits(served(base, "llama", out / "lora.gguf"), base)
    assert float((tied - hooked).abs().max()) > 1e-3 * effect


def test_a_copy_that_is_not_the_base_is_told(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama", **TIED))
    plan = plan_of(base, [edit(base, "ablate", ablate(64), "resid")])
    own = write(tmp_path / "model.gguf", base.path)
    out = written("gguf-lora", plan, base.checkpoint, tmp_path / "out", gguf=own).path
    copy, added = out / "base.gguf", {"output.weight": "token_embd.weight"}
    assert list(differing(open_gguf(own), open_gguf(copy), added)) == []
    sound = copy.read_bytes()
    for name in ("output.weight", "token_embd.weight", "blk.1.ffn_down.weight"):
        where = open_gguf(copy).tensors[name].start
        copy.write_bytes(sound[:where] + bytes([sound[where] ^ 1]) + sound[where + 1 :])
        assert list(differing(open_gguf(own), open_gguf(copy), added)) == [name]
    copy.write_bytes(sound)
    # The other way round: a tensor that is missing.
    assert list(differing(open_gguf(copy), open_gguf(own), {})) == ["output.weight"]


def test_a_file_with_a_head_of_its_own_is_the_base(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Some converters store a tied head a second time: the adapter goes over that file."""
    base = base_at(tiny_checkpoint("llama", **TIED))
    plan = plan_of(base, [edit(base, "ablate", ablate(64), "resid")])
    embedding = converted(base.path)[1]["token_embd.weight"]
    own = write(tmp_path / "model.gguf", base.path, extra={"output.weight": embedding})
    out = written("gguf-lora", plan, base.checkpoint, tmp_path / "out", gguf=own).path
    assert not (out / "base.gguf").exists() and (out / "lora.gguf").exists()
    assert (out / "Modelfile").read_text() == "FROM ../model.gguf\nADAPTER ./lora.gguf\n"


def quantised(base: Base, path: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """Write the base's q_proj and down_proj as a GGUF whose values are quantised."""
    writer = gguf.GGUFWriter(path, "llama")
    for layer in range(base.layout.layers):
        stem = f"model.layers.{layer}"
        down = base.checkpoint.read(f"{stem}.mlp.down_proj.weight").float()
        query = permuted(base.checkpoint.read(f"{stem}.self_attn.q_proj.weight").float(), HEADS)
        for name, weight in (("ffn_down", down), ("attn_q", query)):
            codes = gguf.quants.quantize(weight.contiguous().numpy(), kind)
            writer.add_tensor(f"blk.{layer}.{name}.weight", codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantised(path: Path, name: str) -> Tensor:
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).double()


WIDE = {**NO_BIAS, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def test_factors_of_a_quantised_base_are_made_from_what_is_served(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", **WIDE))
    direction, inner = ablate(64), ablate(16, 2)
    edits = [edit(base, "ablate", direction, "mlp_out.*"), edit(base, "ablate", inner, "q.1.h2")]
    plan = plan_of(base, edits)
    path = quantised(base, tmp_path / "base.gguf", gguf.GGMLQuantizationType.Q4_0)
    files = {}
    for name, model in (("plain", None), ("served", path)):
        out = written("gguf-lora", plan, base.checkpoint, tmp_path / name, gguf=model)
        files[name] = out.path / "lora.gguf"

    def left(file: Path) -> tuple[float, float]:
        """How much of the directions is left in the served weights."""
        name = "blk.1.ffn_down.weight"
        a, b = (t.double() for t in pairs_of(file)[name])
        unit = vector(64) / vector(64).norm()
        down = float((unit @ (dequantised(path, name) + b @ a)).abs().max())
        name = "blk.1.attn_q.weight"
        a, b = (t.double() for t in pairs_of(file)[name])
        head = unpermuted(dequantised(path, name) + b @ a, HEADS)[32:48]
        unit = vector(16, 2) / vector(16, 2).norm()
        return down, float((unit @ head).abs().max())

    epsilon = torch.finfo(torch.float32).eps
    assert max(left(files["served"])) <= 16 * epsilon
    # The control: Q4_0 leaves percents of a direction when the factors are the checkpoint's.
    assert min(left(files["plain"])) > 1e-3


def test_a_gguf_of_another_model_is_refused(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama", **WIDE))
    path = quantised(base, tmp_path / "base.gguf", gguf.GGMLQuantizationType.Q8_0)
    model = open_gguf(path)
    missing = plan_of(base, [edit(base, "ablate", ablate(64), "attn_out.1")])
    with pytest.raises(CheckpointError, match=r"has no tensor blk\.1\.attn_output\.weight"):
        written("gguf-lora", missing, base.checkpoint, tmp_path / "out", gguf=model.path)
    small = base_at(tiny_checkpoint("llama", **NO_BIAS))
    other = plan_of(small, [edit(small, "ablate", ablate(24), "mlp_out.1")])
    with pytest.raises(CheckpointError, match=r"a \[64, 96\] tensor blk\.1\.ffn_down\.weight"):
        written("gguf-lora", other, small.checkpoint, tmp_path / "out", gguf=model.path)
    qwen = base_at(tiny_checkpoint("qwen2"))
    foreign = plan_of(qwen, [edit(qwen, "ablate", ablate(24), "mlp_out.1")])
    with pytest.raises(CheckpointError, match="of architecture 'llama', and the model is 'qwen2'"):
        written("gguf-lora", foreign, qwen.checkpoint, tmp_path / "out", gguf=model.path)
    # Other weights of the same shapes, which by itself would be edited without a word.
    finetune = base_at(tiny_checkpoint("llama", **WIDE, seed=1))
    same = plan_of(finetune, [edit(finetune, "ablate", ablate(64), "mlp_out.1")])
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down\.weight does not resemble"):
        written("gguf-lora", same, finetune.checkpoint, tmp_path / "out", gguf=model.path)
    assert [p.name for p in tmp_path.iterdir()] == ["base.gguf"]
