"""Time and memory of an export and of a merge, beside a plain copy and the usual way of doing it.

    python benchmarks/export.py [--gigabytes 2.2] [--turns 5] [--threads N] [--folder DIR]

It makes a random Llama checkpoint in bfloat16 and a LoRA of rank 16 for every layer of it. Then

- ``cp`` is ``cp -r`` and a sync, the unit of all others; ``copy`` copies the checkpoint and hashes
  it, as every output of bake is hashed;
- ``ablate`` and ``offset`` export an ablation at every stream site (every writer and the embedding
  change) and a bias, ``lora`` the ablation as an adapter; ``by hand`` does the same ablation as
  most scripts do: load the model, change the parameters, ``save_pretrained``;
- ``merge`` is ``bake merge``, and ``peft`` is ``merge_and_unload`` with ``save_pretrained``.

Each job runs in a process of its own, so that its peak memory is its own, imports included. Time is
counted without imports, up to the moment when every file is on disk, and so is the time that the
processors spent on it, which is what to look at on a machine that has other work. The jobs take
turns, and the median of each counts. ``--threads`` are those of the ways by hand, and the workers
of bake: one on each processor, where it is not said.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HIDDEN, INNER, VOCAB = 2048, 5632, 32000
LAYER_VALUES = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER
RANK = 16
# Each job with what it is measured against.
JOBS = {
    "cp": None,
    "copy": None,
    "ablate": "by hand",
    "offset": "by hand",
    "lora": None,
    "by hand": None,
    "merge": "peft",
    "peft": None,
}


def main() -> None:
    """Make the checkpoint, run every job, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--job", choices=(*JOBS, "imports"))
    arguments = parser.parse_args()
    if arguments.job:
        run(arguments.job, arguments.folder, arguments.threads)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = Path(folder)
        size = make(root / "base", arguments.gigabytes)
        make_adapter(root / "base", root / "adapter")
        results = measured(__file__, JOBS, root, arguments.threads, arguments.turns)
    print(f"checkpoint: {size / 1e9:.2f} GB in bfloat16, {arguments.threads} thread(s)\n")
    print("| job | seconds | of cp | processor | of cp | peak memory | beside the usual way |")
    print("|---|---|---|---|---|---|---|")
    for job, found in results.items():
        seconds, peak, rival = found["seconds"], found["peak"], JOBS[job]
        beside = ""
        if rival is not None:
            other = results[rival]
            shares = (seconds / other["seconds"], found["work"] / other["work"])
            beside = "{:.2f} ×, processor {:.2f} ×".format(*shares)
            beside += f", memory {peak / other['peak']:.2f} × of {rival}"
        unit = results["cp"]
        print(
            f"| {job} | {seconds:.1f} | {seconds / unit['seconds']:.2f} × | {found['work']:.1f} | "
            f"{found['work'] / unit['work']:.2f} × | {peak / 2**20:.0f} MiB | {beside} |"
        )


def make(path: Path, gigabytes: float) -> int:
    """Write a random Llama checkpoint in four shards and return the bytes of its weights."""
    import torch
    from safetensors.torch import save_file

    layers = max(2, round((gigabytes * 1e9 / 2 - 2 * VOCAB * HIDDEN) / LAYER_VALUES))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCAB, HIDDEN),
        "lm_head": (VOCAB, HIDDEN),
        "model.norm": (HIDDEN,),
    }
    for layer in range(layers):
        shapes |= {f"{name}": shape for name, shape in linears(layer).items()}
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.{x}_layernorm": (HIDDEN,) for x in ("input", "post_attention")}
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    names, count = list(shapes), 4
    index: dict[str, str] = {}
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        mine = names[shard * len(names) // count : (shard + 1) * len(names) // count]
        tensors = {
            f"{n}.weight": (0.02 * torch.randn(shapes[n], generator=generator)).bfloat16()
            for n in mine
        }
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
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return total


def linears(layer: int) -> dict[str, tuple[int, int]]:
    """Return the linear layers of one block with their shapes."""
    block = f"model.layers.{layer}"
    return {
        **{f"{block}.self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"},
        **{f"{block}.mlp.{x}_proj": (INNER, HIDDEN) for x in ("gate", "up")},
        f"{block}.mlp.down_proj": (HIDDEN, INNER),
    }


def make_adapter(base: Path, path: Path) -> None:
    """Write a random LoRA for every linear layer, as PEFT writes one."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((base / "config.json").read_text())
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (outer, inner) in linears(layer).items():
            for side, shape in (("A", (RANK, inner)), ("B", (outer, RANK))):
                factor = 0.02 * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = factor
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({name.rpartition(".")[2] for name in linears(0)})
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
    adapter |= {"target_modules": modules, "base_model_name_or_path": str(base)}
    (path / "adapter_config.json").write_text(json.dumps(adapter))


def measured(
    script: str, jobs: Iterable[str], root: Path, threads: int, turns: int, *, steady: bool = False
) -> dict[str, dict[str, float]]:
    """Run every job in a process of its own, by turns, and return what each printed.

    Of the turns, the median counts, of time and of memory alike. ``steady`` keeps glibc from moving
    its threshold for mmap as blocks are freed, so that the peak does not depend on their order; it
    costs time.
    """
    fixed = {"OMP_NUM_THREADS": str(threads)}
    if steady:
        fixed["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(turns):
        for job in jobs:
            command = [sys.executable, script, "--job", job, "--folder", str(root)]
            command += ["--threads", str(threads)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env={**os.environ, **fixed}
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            results.setdefault(job, []).append(found)
    return {
        job: {key: median(turn[key] for turn in found) for key in found[0]}
        for job, found in results.items()
    }


def run(job: str, root: Path, threads: int) -> None:
    """Do one job and print seconds and peak memory; imports are not counted."""
    import torch

    torch.set_num_threads(threads)
    out = root / "out"
    if job == "imports":  # what the process of a merge holds before it does anything
        merged(root, out)
        print(json.dumps({"peak": peak_memory()}))
        return
    work = {
        "cp": copied_by_cp,
        "copy": copied,
        "by hand": by_hand,
        "merge": merged,
        "peft": by_peft,
    }.get(job)
    timed = work(root, out) if work is not None else exported(job, root, out)
    start, before = time.perf_counter(), os.times()
    timed()
    for path in out.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    seconds, after = time.perf_counter() - start, os.times()
    shutil.rmtree(out)
    # User and system time, of this process and of those that it waited for.
    spent = sum(after[:4]) - sum(before[:4])
    print(json.dumps({"seconds": seconds, "work": spent, "peak": peak_memory()}))


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes.

    Not getrusage: its peak counts what the parent held before it started this process.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def exported(job: str, root: Path, out: Path) -> Callable[[], None]:
    """Return the export of an ablation, as a checkpoint or as an adapter, or of an offset."""
    import torch

    from bake.checkpoints import open_checkpoint
    from bake.checkpoints.workers import at_most
    from bake.edits import Edit, EditKind, ablate, offset
    from bake.families.fit import layout_of
    from bake.outputs.export import Export
    from bake.outputs.write import export
    from bake.plan import compile_plan
    from bake.sites import expand

    def work() -> None:
        checkpoint = open_checkpoint(root / "base")
        layout = layout_of(checkpoint)
        vector = direction().to(torch.float64)
        kind, map_, at = {
            "ablate": (EditKind.ABLATE, ablate(vector), "resid"),
            "lora": (EditKind.ABLATE, ablate(vector), "resid"),
            "offset": (EditKind.OFFSET, offset(vector), "resid_post.1"),
        }[job]
        sites = expand(at, layers=layout.layers, stream=layout.stream)
        plan = compile_plan(
            [Edit(kind, "c", sites, map_)],
            layout,
            gain=checkpoint.read,
            config=checkpoint.config,
        )
        with at_most(torch.get_num_threads()):
            export(Export(plan, checkpoint), ["lora" if job == "lora" else "checkpoint"], out)

    return work


def direction() -> "torch.Tensor":
    """Return the direction of all edits."""
    import torch

    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(2))


def copied_by_cp(root: Path, out: Path) -> Callable[[], None]:
    """Return ``cp -r``; every job is synced."""

    def work() -> None:
        subprocess.run(["cp", "-r", root / "base", out], check=True)

    return work


def copied(root: Path, out: Path) -> Callable[[], None]:
    """Return a copy of the base through a buffer, hashed: the floor of what an export does."""

    def work() -> None:
        out.mkdir()
        for source in sorted((root / "base").iterdir()):
            digest = hashlib.sha256()
            with source.open("rb") as read, (out / source.name).open("wb") as write:
                while chunk := read.read(8 << 20):
                    digest.update(chunk)
                    write.write(chunk)

    return work


def by_hand(root: Path, out: Path) -> Callable[[], None]:
    """Return the ablation as most scripts do it: on the parameters of a loaded model."""
    import torch
    from transformers import AutoModelForCausalLM

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
        d = direction() / direction().norm()
        with torch.no_grad():
            embed = model.model.embed_tokens.weight
            wide = embed.float()
            embed.copy_(wide - torch.outer(wide @ d, d))
            for block in model.model.layers:
                for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                    wide = weight.float()
                    weight.copy_(wide - torch.outer(d, d @ wide))
        model.save_pretrained(out)

    return work


def merged(root: Path, out: Path) -> Callable[[], None]:
    """Return ``bake merge``."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from bake.checkpoints import open_checkpoint
    from bake.merge.merge import merge_adapter

    def work() -> None:
        merge_adapter(root / "adapter", open_checkpoint(root / "base"), out)

    return work


def by_peft(root: Path, out: Path) -> Callable[[], None]:
    """Return PEFT's own merge."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
        wrapped = PeftModel.from_pretrained(model, str(root / "adapter"))
        wrapped.merge_and_unload().save_pretrained(out)

    return work


if __name__ == "__main__":
    main()
