"""Time and memory of an export beside a plain copy of the same bytes, in one run.

    python benchmarks/export.py [--gigabytes 1] [--folder DIR]

It makes a random Llama checkpoint in bfloat16, copies it with hashing as the export hashes, exports
an ablation at every stream site (every writer and the embedding change) and a bias-only offset, and
prints ratios. Each job runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INNER, VOCAB = 2048, 5632, 32000
LAYER_VALUES = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER


def main() -> None:
    """Make the checkpoint, run every job, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--job", choices=("copy", "ablate", "offset"))
    arguments = parser.parse_args()
    if arguments.job:
        run(arguments.job, arguments.folder)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = Path(folder)
        size = make(root / "base", arguments.gigabytes)
        results = {job: measured(job, root) for job in ("copy", "ablate", "offset")}
    print(f"checkpoint: {size / 1e9:.2f} GB in bfloat16")
    print("job      seconds   of the copy   peak memory")
    for job, (seconds, peak) in results.items():
        ratio = seconds / results["copy"][0]
        print(f"{job:8} {seconds:7.1f}   {ratio:8.2f} ×   {peak / 2**20:8.0f} MiB")


def make(path: Path, gigabytes: float) -> int:
    """Write a random Llama checkpoint in four shards, or as many as make it up."""
    import torch
    from safetensors.torch import save_file

    layers = max(2, round((gigabytes * 1e9 / 2 - 2 * VOCAB * HIDDEN) / LAYER_VALUES))
    shapes = {
        "model.embed_tokens": (VOCAB, HIDDEN),
        "lm_head": (VOCAB, HIDDEN),
        "model.norm": (HIDDEN,),
    }
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"}
        shapes |= {f"{block}.mlp.{x}_proj": (INNER, HIDDEN) for x in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj"] = (HIDDEN, INNER)
        shapes |= {f"{block}.{x}_layernorm": (HIDDEN,) for x in ("input", "post_attention")}
    path.mkdir()
    names, index, count = list(shapes), {}, 4
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        mine = names[shard * len(names) // count : (shard + 1) * len(names) // count]
        tensors = {f"{n}.weight": torch.randn(shapes[n]).to(torch.bfloat16) for n in mine}
        save_file(tensors, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    total = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return total


def measured(job: str, root: Path) -> tuple[float, int]:
    """Run one job in a process of its own; return its seconds and its peak memory in bytes."""
    command = [sys.executable, __file__, "--job", job, "--folder", str(root)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak)


def run(job: str, root: Path) -> None:
    """Do one job and print seconds and peak memory; imports are not counted."""
    out = root / job
    if job == "copy":
        start = time.perf_counter()
        out.mkdir()
        for file in sorted((root / "base").iterdir()):
            copy_hashed(file, out / file.name)
    else:
        import torch

        from bake.checkpoints import open_checkpoint
        from bake.cli.request import layout_of
        from bake.edits import Edit, EditKind, ablate, offset
        from bake.outputs.checkpoint import export_checkpoint
        from bake.plan import compile_plan
        from bake.sites import expand

        start = time.perf_counter()
        checkpoint = open_checkpoint(root / "base")
        layout = layout_of(checkpoint, None)
        vector = torch.randn(HIDDEN, dtype=torch.float64)
        kind, map_, at = {
            "ablate": (EditKind.ABLATE, ablate(vector), "resid"),
            "offset": (EditKind.OFFSET, offset(vector), "resid_post.1"),
        }[job]
        sites = expand(at, layers=layout.layers, stream=layout.stream)
        plan = compile_plan(
            [Edit(kind, "c", sites, map_)],
            layout,
            gain=checkpoint.read,
            config=checkpoint.config,
        )
        export_checkpoint(plan, checkpoint, out, record={"base": {"model": "base"}})
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def copy_hashed(source: Path, target: Path) -> None:
    """Copy a file through a buffer and hash it: the floor of what an export does."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while chunk := read.read(8 << 20):
            digest.update(chunk)
            write.write(chunk)


if __name__ == "__main__":
    main()
