"""What relocated edits lose on small trained models without biases or with norms behind writers.

    python benchmarks/offsets.py MODEL [--blocks 2,3] [--declared mistral]

MODEL is a folder of benchmarks/trained.py, or recipes/quickstart/model: that is a Llama, which has
biases, and ``--declared mistral`` has it as the Mistral that computes the same and has none. The
direction is the mean of the stream behind the block over happy stories less that over sad ones.
Printed is KL(hooked ‖ baked) over KL(hooked ‖ base) on other stories, first tokens left out; all in
float32. An offset is the direction itself, added; ``offset 4`` four times as much.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from relocation import divergence, first, logprobs
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bake import edits
from bake.edits import EditKind
from bake.jobs.model import Model, open_model
from bake.outputs.checkpoint import planned_model
from bake.plan import Plan
from bake.recipe import ExportTable
from bake.steer import steered

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "quickstart"))
from stories import write_stories

FITTED, HELD_OUT = 3, 4  # seeds, as in recipes/quickstart/fit.py


def declared(folder: Path, name: str, out: Path) -> Path:
    """Copy a Llama and declare it as another family that computes the same."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": [f"{name.title()}ForCausalLM"], "model_type": name}
    config |= {"sliding_window": None}
    llamas = ("attention_bias", "mlp_bias", "pretraining_tp")
    own = {key: value for key, value in config.items() if key not in llamas}
    (out / "config.json").write_text(json.dumps(own), encoding="utf-8")
    return out


@torch.no_grad()
def mean_stream(model: Any, texts: list[list[int]], layer: int) -> Tensor:
    """Return the mean of the stream behind a block, first tokens left out."""
    seen: list[Tensor] = []
    block = model.model.layers[layer]
    handle = block.register_forward_hook(lambda _m, _a, out: seen.append(first(out)[0, 1:]))
    for ids in texts:
        model(torch.tensor([ids]))
    handle.remove()
    return torch.cat(seen).double().mean(0)


def baked(plan: Plan, model: Model, folder: Path) -> Any:
    """Return the planned model in float32, loaded by its class."""
    from safetensors.torch import save_file

    planned = planned_model(plan, model.checkpoint)
    values = {n: model.checkpoint.read(n) for n in model.checkpoint.tensors}
    values |= {n: tensor.value() for n, tensor in planned.tensors.items()}
    folder.mkdir()
    (folder / "config.json").write_text(planned.config_text, encoding="utf-8")
    kept = {name: value.float().contiguous() for name, value in values.items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return load(folder)


def load(folder: Path) -> Any:
    """Return a model in float32."""
    eager = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **eager).eval()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--blocks", default="2,3")
    parser.add_argument("--declared")
    parser.add_argument("--kinds", default="offset,offset 4,ablation,affine")
    parser.add_argument("--stories", type=int, default=12)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = asked.model
        if asked.declared:
            folder = declared(asked.model, asked.declared, scratch / "declared")
        live, model = load(folder), open_model(folder)
        tokenizer = AutoTokenizer.from_pretrained(asked.model)
        moods: dict[str, list[list[int]]] = {"happy": [], "sad": []}
        for story in write_stories(FITTED, 4 * asked.stories):
            moods[story.mood].append(tokenizer(story.text)["input_ids"])
        held = write_stories(HELD_OUT, asked.stories)
        texts = [tokenizer(story.text)["input_ids"] for story in held]
        base = logprobs(live, texts)
        print("block  edit      effect, nats  direction / stream  width  lost, %")
        for layer in map(int, asked.blocks.split(",")):
            happy, sad = (mean_stream(live, moods[mood], layer) for mood in ("happy", "sad"))
            vector, mean = happy - sad, sad
            made = {
                "offset": edits.offset(vector),
                "offset 4": edits.offset(4 * vector),
                "ablation": edits.ablate(vector),
                "affine": edits.affine(vector, mean=mean, alpha=1.0),
            }
            for kind in asked.kinds.split(","):
                verb = {"ablation": "ablate"}.get(kind, kind.split()[0])
                edit = model.edit(EditKind(verb), "mood", made[kind], (f"resid_post.{layer}",))
                with steered(live, model.layout, [edit]):
                    reference = logprobs(live, texts)
                effect, _ = divergence(reference, base)
                plan = model.plan([edit], ExportTable(allow=("widen",)))
                wide = baked(plan, model, scratch / f"{layer}{kind}")
                lost, _ = divergence(reference, logprobs(wide, texts))
                size = float(vector.norm() / mean.norm())
                print(
                    f"{layer:5d}  {kind:8s}  {effect:.4f}        {size:.3f}               "
                    f"{wide.config.hidden_size:5d}  {100 * lost / effect:.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
