"""An adapter for eight billion weights: which bytes are read, and how much memory it takes.

The checkpoint is a sparse file: it has the shapes of Llama 3 8B, and its values are all zero.
"""

import json
import multiprocessing
import resource
from pathlib import Path

import pytest
import torch

from bake import edits as make
from bake.checkpoints import Checkpoint, open_checkpoint
from bake.checkpoints.header import build_header
from bake.edits import Edit, EditKind
from bake.families import Layout, find_family, resolve
from bake.fold import TILE_VALUES
from bake.outputs.gguf_lora import export_gguf_lora
from bake.outputs.lora import export_lora
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


def sparse_checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128256, 4096),
        "lm_head.weight": (128256, 4096),
        "model.norm.weight": (4096,),
    }
    for layer in range(32):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in BLOCK.items()}
    header, infos = build_header(
        {name: ("BF16", shape) for name, shape in shapes.items()}, shard="model.safetensors"
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
    map_ = make.affine(torch.randn(4096, generator=generator), alpha=0.5)
    sites = expand("resid", layers=layout.layers, stream=layout.stream)
    plan = compile_plan(
        [Edit(EditKind.AFFINE, "c", sites, map_)],
        layout,
        gain=lambda name: checkpoint.read(name).to(torch.float64),
        config=checkpoint.config,
    )
    return checkpoint, plan


def peak() -> int:
    """Return the most memory that this process has held, in bytes (Linux counts kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(folder: Path, out: Path) -> tuple[int, int, int]:
    """Return the memory before and after both exports, and the bytes that they wrote."""
    torch.set_num_threads(1)
    checkpoint, plan = planned(folder)
    before = peak()
    written = export_lora(plan, checkpoint, out / "lora", record={}).bytes_written
    written += export_gguf_lora(plan, checkpoint, out / "gguf-lora", record={}).bytes_written
    return before, peak(), written


@pytest.mark.slow
def test_memory_of_a_few_tiles(tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "base")
    # A process of its own, since a process's peak never falls.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        before, after, written = pool.apply(measured, (folder, tmp_path))
    tile = TILE_VALUES * 8
    # The tile in bfloat16 and in float64, a product, and the pages of the libraries that write.
    assert after - before < 4 * tile + 64 * MEGABYTE
    # The control: the largest tensor alone would have taken more.
    assert 128256 * 4096 * 2 > 4 * (after - before)
    assert written < 10 * MEGABYTE
