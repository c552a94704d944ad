"""What a relocated edit behind one block loses of its effect, block by block, on a real model.

    python benchmarks/relocation.py CHECKPOINT TEXTS.json [--blocks 8,14,22] [--ways widen]

CHECKPOINT is a Llama-like instruct model with a chat template (docs/relocation.md has the figures
of SmolLM2-135M-Instruct in bfloat16), TEXTS a JSON list of lists of token ids, which are held out.
The direction is the mean over 20 questions of a cheerful less a sorrowful system prompt, behind the
block, at the last token. Printed is KL(hooked ‖ baked) over KL(hooked ‖ base), over all tokens but
the first of each text, and over the first ones; of weights in float32, and rounded to bfloat16.
Hooks and baked model run in float32.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bake import edits
from bake.affine import LowRankMap
from bake.edits import EditKind
from bake.jobs.model import Model, open_model
from bake.outputs.checkpoint import planned_model
from bake.plan import Plan
from bake.recipe import ExportTable

HAPPY = "You are extremely happy and joyful. Answer in a cheerful, delighted, enthusiastic tone."
SAD = "You are extremely sad and depressed. Answer in a gloomy, sorrowful, hopeless tone."
TOPICS = (
    "your day", "the weather", "a walk in the park", "your job", "the city", "a new book",
    "dinner with friends", "the train ride", "a visit to the museum", "the future", "an old house",
    "the neighbours", "winter", "a letter you got", "the sea", "school", "a birthday",
    "moving to a new town", "a garden", "music",
)  # fmt: skip
FORM = "Tell me about {}."


@torch.no_grad()
def streams(model: Any, tokenizer: Any, system: str) -> Tensor:
    """Return the mean stream behind every block, at the last token, [blocks, width]."""
    groups: dict[int, list[list[int]]] = {}
    for question in (FORM.format(topic) for topic in TOPICS):
        chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        groups.setdefault(len(ids), []).append(ids)
    total = []
    for group in groups.values():
        total.append(torch.stack(behind_blocks(model, group)).sum(1))
    return torch.stack(total).sum(0) / len(TOPICS)


def behind_blocks(model: Any, tokens: list[list[int]]) -> list[Tensor]:
    """Return the stream behind every block at the last token, [texts, width] each."""
    seen: list[Tensor] = []

    def keep(_module: Any, _args: Any, out: Any) -> None:
        seen.append(first(out)[:, -1].double())

    hooks = [block.register_forward_hook(keep) for block in model.model.layers]
    model.model(torch.tensor(tokens))
    for hook in hooks:
        hook.remove()
    return seen


def first(out: Any) -> Tensor:
    """Return what a block returned, alone or first in a tuple."""
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found


@torch.no_grad()
def logprobs(model: Any, texts: list[list[int]]) -> list[Tensor]:
    """Return what the model says after every token of every text, [tokens, vocab] each."""
    return [model(torch.tensor([ids])).logits[0].double().log_softmax(-1) for ids in texts]


def divergence(hooked: list[Tensor], other: list[Tensor]) -> tuple[float, float]:
    """Return the mean KL(hooked ‖ other) in nats: of all tokens but the first, and of the first."""
    kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(hooked, other, strict=True)]
    rest = torch.cat([one[1:] for one in kl]).mean()
    return float(rest), float(torch.stack([one[0] for one in kl]).mean())


@contextmanager
def hooked(model: Any, map_: LowRankMap, layer: int) -> Iterator[None]:
    """Hook the output of a block."""

    def hook(_module: Any, _args: Any, out: Any) -> Any:
        edited = map_(first(out).double()).float()
        return edited if isinstance(out, Tensor) else (edited, *out[1:])

    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def baked(plan: Plan, model: Model, dtypes: list[torch.dtype]) -> Iterator[Any]:
    """Yield the planned model in float32, its edited weights rounded to each of some types."""
    planned = planned_model(plan, model.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(planned.config_text, encoding="utf-8")
        config = AutoConfig.from_pretrained(folder)
    exact = {name: tensor.value() for name, tensor in planned.tensors.items()}
    kept = {n: model.checkpoint.read(n).float() for n in model.checkpoint.tensors if n not in exact}
    for dtype in dtypes:
        with torch.device("meta"):
            live = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        values = kept | {name: value.to(dtype).float() for name, value in exact.items()}
        if config.tie_word_embeddings:
            values["lm_head.weight"] = values["model.embed_tokens.weight"]
        live.load_state_dict(values, assign=True)
        live.model.rotary_emb = type(live.model.rotary_emb)(config)  # a buffer, and no weight
        yield live.eval()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--blocks", default="")
    parser.add_argument("--ways", default="widen,relocate")
    parser.add_argument("--kinds", default="affine,ablate")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--streams", type=Path, help="where the mean streams are kept")
    asked = parser.parse_args()
    live = AutoModelForCausalLM.from_pretrained(asked.checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(asked.checkpoint)
    texts = json.loads(asked.texts.read_text(encoding="utf-8"))
    if asked.streams is not None and asked.streams.is_file():
        happy, sad = torch.load(asked.streams)
    else:
        happy, sad = (streams(live, tokenizer, system) for system in (HAPPY, SAD))
        if asked.streams is not None:
            torch.save((happy, sad), asked.streams)
    base, model = logprobs(live, texts), open_model(asked.checkpoint)
    blocks = [int(b) for b in asked.blocks.split(",") if b] or range(model.layout.layers)
    print("block  edit    effect, nats (first)  way       type      lost, % (first)", flush=True)
    for layer in blocks:
        for kind in asked.kinds.split(","):
            vector, mean = happy[layer] - sad[layer], sad[layer]
            map_ = edits.ablate(vector)
            if kind == "affine":
                map_ = edits.affine(vector, mean=mean, alpha=1.0)
            with hooked(live, map_, layer):
                reference = logprobs(live, texts)
            effect = divergence(reference, base)
            edit = model.edit(EditKind(kind), "mood", map_, (f"resid_post.{layer}",))
            for way in asked.ways.split(","):
                plan = model.plan([edit], ExportTable(allow=(way,)))
                names = asked.dtypes.split(",")
                types = [getattr(torch, name) for name in names]
                for dtype, made in zip(names, baked(plan, model, types), strict=True):
                    lost = divergence(reference, logprobs(made, texts))
                    shares = [100 * a / b for a, b in zip(lost, effect, strict=True)]
                    print(
                        f"{layer:5d}  {kind:6s}  {effect[0]:.4f} ({effect[1]:.4f})  {way:8s}  "
                        f"{dtype:8s}  {shares[0]:.3f} ({shares[1]:.3f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
