"""Whether an edited model expresses its concept as much as the hooked one does, on a real model.

    python benchmarks/concept.py CHECKPOINT [--block 14] [--kind affine] [--texts 300]

The model, its edit and the baked model in bfloat16 are those of ``benchmarks/relocation.py``. Each
of some prompts is answered by the base, by the hooked and by the baked model: sampled, at
temperature 1, with the same random numbers for all three. What an answer scores is how far its
tokens' streams reach along the direction in the base, which reads it: the mean over tokens of r · x
behind the block.

Printed are the means, how far baked and hooked are apart, and the sampling error: what the mean of
as many answers of another seed would differ by. A difference below it is none that sampling shows.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from relocation import TOPICS, Baking, first, fitted
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bake.jobs.model import open_model
from bake.recipe import ExportTable
from bake.steer import steered

FORMS = (
    "Tell me about {}.", "What do you think of {}?", "Write two sentences about {}.",
    "Describe {} to a friend.", "How would you begin a story about {}?", "What is {} like?",
    "Give me a line of a poem about {}.", "What should I know about {}?", "Talk to me about {}.",
    "What comes to your mind with {}?", "Say something about {}.", "Write a note about {}.",
    "What would you say of {} today?", "How do you feel about {}?", "Why does {} matter?",
)  # fmt: skip
BATCH = 20
ANSWER = 32
"""Tokens of an answer."""


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Return chats, as token ids."""
    asked = (form.format(topic) for form, topic in itertools.product(FORMS, TOPICS))
    chats = ([{"role": "user", "content": text}] for text in itertools.islice(asked, count))
    return [
        tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"] for c in chats
    ]


def batches(texts: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids, padded on the left, with their mask."""
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(text)) + text for text in part])
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in part])
        yield ids, mask


@torch.no_grad()
def answers(model: Any, texts: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    """Return prompts with what a model goes on with, [texts, tokens], and the prompts' masks."""
    found = []
    for number, (ids, mask) in enumerate(batches(texts)):
        torch.manual_seed(number)
        asked = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        length = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "pad_token_id": 0}
        found.append((model.generate(ids, attention_mask=mask, **asked, **length), mask))
    return found


@torch.no_grad()
def scores(base: Any, said: list[tuple[Tensor, Tensor]], block: int, unit: Tensor) -> Tensor:
    """Return the score of every answer, [texts]."""
    found, seen = [], list[Tensor]()

    def keep(_module: Any, _args: Any, out: Any) -> None:
        seen.append(first(out)[:, -ANSWER:].double() @ unit)

    handle = base.model.layers[block].register_forward_hook(keep)
    for ids, mask in said:
        whole = torch.cat([mask, mask.new_ones(len(mask), ANSWER)], dim=1)
        base.model(ids, attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp(min=0))
        found.append(seen.pop().mean(1))
    handle.remove()
    return torch.cat(found)


def main() -> None:
    """Print means, difference and sampling error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--block", type=int, default=14)
    parser.add_argument("--kind", default="affine")
    parser.add_argument("--way", default="widen")
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--streams", type=Path, help="where the streams are kept")
    asked = parser.parse_args()
    live = AutoModelForCausalLM.from_pretrained(asked.checkpoint, dtype=torch.float32).eval()
    model = open_model(asked.checkpoint)
    source = fitted(asked, live, model)
    edits = source.asked(asked.kind, asked.block)
    plan = model.plan(edits, ExportTable(allow=tuple(asked.way.split("+"))))
    (baked,) = Baking(model).baked(plan, [torch.bfloat16])
    direction = (source.happy - source.sad)[:, asked.block].mean(0)
    unit = direction / direction.norm()
    texts = prompts(AutoTokenizer.from_pretrained(asked.checkpoint), asked.texts)
    found, said = {}, {}
    for name in ("base", "hooked", "baked"):
        hooks = steered(live, model.layout, edits) if name == "hooked" else nullcontext()
        with hooks:
            said[name] = answers(baked if name == "baked" else live, texts)
        found[name] = scores(live, said[name], asked.block, unit)
        error = float(found[name].std()) / math.sqrt(len(texts))
        print(f"{name}: {float(found[name].mean()):.3f} ± {error:.3f}", flush=True)
    apart = found["baked"] - found["hooked"]
    error = math.sqrt(sum(float(found[n].var()) for n in ("hooked", "baked")) / len(texts))
    same = [(a[0] == b[0]).all(1) for a, b in zip(said["hooked"], said["baked"], strict=True)]
    print(
        f"{len(texts)} answers: baked less hooked {float(apart.mean()):+.4f}, sampling error "
        f"{error:.4f}; {int(torch.cat(same).sum())} texts the same"
    )


if __name__ == "__main__":
    main()
