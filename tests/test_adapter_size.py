"""An adapter for eight billion weights: which bytes are read, and how much memory it takes.

The checkpoint is a sparse file: it has the shapes of Llama 3 8B, and its values are all zero.
"""

import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from exporting import written

from bake import edits as make
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.checkpoints.header import build_header
from bake.edits import Edit, EditKind
from bake.families import Layout, find_family, resolve
from bake.plan import Plan, compile_plan
from bake.sites import expand

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
BLOCK = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
    "input_layernorm": (4096,),
    "post_attention_layernorm": (4096,),
}
MEGABYTE = 1 << 20


def sparse_checkpoint(folder: Path, *, smaller: int = 1) -> Path:
    """Write a file with the shapes of Llama 3 8B, or with every size a fraction of them."""
    sizes = ("hidden_size", "intermediate_size", "head_dim", "vocab_size")
    folder.mkdir()
    config = {key: value // smaller if key in sizes else value for key, value in CONFIG.items()}
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128256, 4096),
        "lm_head.weight": (128256, 4096),
        "model.norm.weight": (4096,),
    }
    for layer in range(32):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in BLOCK.items()}
    header, infos = build_header(
        {name: ("BF16", tuple(n // smaller for n in shape)) for name, shape in shapes.items()},
        shard="model.safetensors",
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(infos[-1].stop)
    return folder


def planned(folder: Path) -> tuple[Checkpoint, Plan]:
    checkpoint = open_checkpoint(folder)
    tensors = checkpoint.tensors
    layout: Layout = resolve(
        find_family(checkpoint.config),
        checkpoint.config,
        {name: info.shape for name, info in tensors.items()},
        {name: info.dtype for name, info in tensors.items()},
    )
    generator = torch.Generator().manual_seed(0)
    map_ = make.affine(torch.randn(layout.hidden, generator=generator), alpha=0.5)
    sites = expand("resid", layers=layout.layers, stream=layout.stream)
    plan = compile_plan(
        [Edit(EditKind.AFFINE, "c", sites, map_)],
        layout,
        gain=lambda name: checkpoint.read(name).to(torch.float64),
        config=checkpoint.config,
    )
    return checkpoint, plan


def resident(key: str) -> int:
    """Return a line of /proc/self/status in bytes: VmRSS is held now, VmHWM was at most (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0]) * 1024


def bytes_read() -> int:
    """Return how many bytes this process has asked of files so far (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@dataclass(frozen=True)
class Measured:
    """What both exports took, in bytes."""

    edited: int
    """Of the tensors that the plan names."""
    read: dict[str, int]
    memory: int
    written: int


def measured(folder: Path, out: Path) -> Measured:
    """Write both adapters, and say what it took."""
    torch.set_num_threads(1)
    # A small model first, so that what is measured is no module being imported.
    checkpoint, plan = planned(sparse_checkpoint(out / "small", smaller=64))
    written("lora", plan, checkpoint, out / "small-lora")
    written("gguf-lora", plan, checkpoint, out / "small-gguf-lora")
    checkpoint, plan = planned(folder)
    edited = sum(checkpoint.tensors[update.name].nbytes for update in plan.tensors)
    # subtle: getrusage's peak would be that of the process which this one was forked from.
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, size, read = resident("VmRSS"), 0, {}
    for carrier in ("lora", "gguf-lora"):
        start = bytes_read()
        size += written(carrier, plan, checkpoint, out / carrier).bytes_written
        read[carrier] = bytes_read() - start
    return Measured(edited, read, resident("VmHWM") - before, size)


@pytest.mark.slow
def test_only_edited_tensors_are_read_with_the_memory_of_a_tile(tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "base")
    # A process of its own, whose memory holds nothing of other tests.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(measured, (folder, tmp_path))
    print(found)
    # The embedding and the two writers of every block, each byte of them once; the rest is what
    # Python and its libraries read for themselves.
    assert found.edited == 2 * 4096 * (128256 + 32 * (4096 + 14336))
    for read in found.read.values():
        assert found.edited <= read < found.edited + 64 * MEGABYTE
    # The control: the model is nearly three times as large as what was read of it.
    assert (folder / "model.safetensors").stat().st_size > 2.5 * found.edited
    # A tile in bfloat16 and in float64, a product, the buffers of writing and hashing, and what the
    # allocator keeps of them; the 65 edited matrices are 34 to 1051 MB in bfloat16.
    assert found.memory < 128 * MEGABYTE
    # The control: the largest tensor alone would have taken more.
    assert 128256 * 4096 * 2 > 4 * found.memory
    assert found.written < 10 * MEGABYTE
