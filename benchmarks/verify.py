"""What a verification costs: memory of a streamed one, and time beside the forward passes.

    python benchmarks/verify.py [--gigabytes 2] [--hidden 1024] [--folder DIR]

It writes a random Llama checkpoint in bfloat16, bakes an ablation into it, and verifies it with one
block in memory at a time, in a process of its own whose peak memory is printed. A second, smaller
model is verified in memory, and the time is printed beside that of the forward passes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from bake import edits as make
from bake.checkpoints import open_checkpoint
from bake.edits import Edit, EditKind
from bake.outputs.export import Export
from bake.outputs.write import export
from bake.plan import compile_plan
from bake.verify.models import layout_of

VOCAB, HEAD = 8000, 64

CHILD = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[4]))
from bake.verify.compare import compare
from bake.verify.verification import Verification
prompts = [list(range(10, 10 + length)) for length in json.loads(sys.argv[5])]
start = time.perf_counter()
report = compare(Verification(
    Path(sys.argv[1]), base=sys.argv[2], prompts=prompts, streamed=sys.argv[3] == "streamed",
    generate=0,
))
# Not getrusage: its peak counts what the parent held before it started this process.
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({
    "passed": report.passed,
    "seconds": time.perf_counter() - start,
    "forward": report.timing["forward"],
    "peak_bytes": peak,
    "failed": [row.name for row in report.rows if row.passed is False],
}))
"""


def write_checkpoint(folder: Path, *, hidden: int, layers: int) -> int:
    """Write a random Llama in bfloat16, one file a block, and return its bytes."""
    folder.mkdir(parents=True)
    inner, generator = 4 * hidden, torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    def gain() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(hidden, generator=generator)).bfloat16()

    index: dict[str, str] = {}
    total = 0

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())

    for layer in range(layers):
        path = f"model.layers.{layer}."
        square = {f"self_attn.{n}_proj": (hidden, hidden) for n in "qkvo"}
        wide = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
        shapes = {**square, **wide, "mlp.down_proj": (hidden, inner)}
        tensors = {f"{path}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        save(
            f"model-{layer + 1:05}-of-{layers + 1:05}.safetensors",
            {**tensors, **{f"{path}{name}.weight": gain() for name in norms}},
        )
    save(
        f"model-{layers + 1:05}-of-{layers + 1:05}.safetensors",
        {
            "model.embed_tokens.weight": matrix(VOCAB, hidden) * hidden**0.5,
            "lm_head.weight": matrix(VOCAB, hidden),
            "model.norm.weight": gain(),
        },
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD,
        "head_dim": HEAD,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shards = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards), encoding="utf-8")
    return total


def bake(base: Path, out: Path) -> None:
    """Ablate a random subspace from the whole stream: one direction of 1024 would move too little.

    Random weights spread over all directions alike, and bfloat16 rounds more than one is worth.
    """
    checkpoint = open_checkpoint(base)
    layout = layout_of(checkpoint)
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(layout.hidden // 4, layout.hidden, generator=generator)
    edits = [Edit(EditKind.ABLATE, "random", layout.stream, make.ablate(directions))]
    plan = compile_plan(
        edits,
        layout,
        gain=lambda name: checkpoint.read(name).to(torch.float64),
        config=checkpoint.config,
        targets=("transformers",),
    )
    export(Export(plan, checkpoint), ["checkpoint"], out)


def verify(out: Path, base: Path, how: str, lengths: list[int], threads: int) -> dict[str, float]:
    """Verify in a process of its own and return what it measured."""
    arguments = [str(out), str(base), how, str(threads), json.dumps(lengths)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Run both measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    block = 16 * options.hidden**2 * 2  # bytes
    layers = max(1, round(options.gigabytes * 1e9 / block))
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for name, count, how, lengths in (
            ("streamed", layers, "streamed", [8, 8]),
            ("in memory", min(layers, 8), "whole", [32] * 8),
        ):
            base, out = Path(scratch) / f"{name} base", Path(scratch) / f"{name} out"
            size = write_checkpoint(base, hidden=options.hidden, layers=count)
            bake(base, out)
            found = verify(out, base, how, lengths, options.threads)
            print(
                f"{name}: {size / 1e9:.2f} GB in bfloat16, {count} blocks; "
                f"peak memory {found['peak_bytes'] / 1e9:.2f} GB; {found['seconds']:.0f} s, "
                f"of which {found['forward']:.0f} s in forward passes "
                f"({found['seconds'] / found['forward']:.2f}×); "
                f"{'passed' if found['passed'] else 'FAILED ' + str(found['failed'])}"
            )


if __name__ == "__main__":
    main()
