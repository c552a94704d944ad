"""Measure what steering along the mood direction does to the model's stories, with forward hooks.

    python recipes/quickstart/measure.py

Three kinds of edit are tried with the directions of `mood.safetensors`: an offset at the output of
one block, the affine edit of the whole residual stream, and its ablation. Stories are decoded
greedily from prompts that say nothing of the mood, and their mood words are counted. The hooks are
written for this one model; `bake verify` has its own, so that the two can disagree.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bake.directions import Role, read_directions

sys.path.insert(0, str(Path(__file__).parent))
from fit import HELD_OUT_SEED, HERE, PROMPT_SEED, ClassMeans, Quickstart
from stories import MOODS, Story, mood_words, write_prompts, write_stories

PROMPTS = 64
HELD_OUT_STORIES = 200
NEW_TOKENS = 160
LAYER, ABLATED_LAYER = 2, 4
"""The block whose direction the offset and the affine edit use, and the one that is ablated."""
HAPPY, SAD = 2.0, -2.0
"""The alphas of the affine edit that set the mood."""
ALPHAS = (-2.0, -1.0, 0.0, 1.0, 1.5, 2.0)
OFFSETS = (0.25, 0.5, 1.0, -0.25, -0.5, -1.0)
EXAMPLES = 3

Edits = list[tuple[torch.nn.Module, Callable[[Tensor], Tensor]]]
"""Modules, and what becomes of what each of them returns."""


def read_means(path: Path) -> ClassMeans:
    """The class means in a file of directions: it holds the sad ones and the difference."""
    items = read_directions(path).items
    vectors, sad = (
        torch.stack([item.tensors[role] for item in items]).double()
        for role in (Role.VECTOR, Role.MEAN)
    )
    return ClassMeans(sad + vectors, sad)


def offset(quickstart: Quickstart, means: ClassMeans, layer: int, coefficient: float) -> Edits:
    """x + c v at the output of one block."""
    addend = (coefficient * means.vector[layer]).float()
    return [(quickstart.model.model.layers[layer], lambda x: x + addend)]


def affine(quickstart: Quickstart, means: ClassMeans, layer: int, alpha: float | None) -> Edits:
    """x − P (x − μ) + α v everywhere in the stream, μ the sad mean; without an alpha, x − P x.

    After the embedding the component along v has the wanted value, and it keeps it as long as no
    module writes along v. What attention and MLP write is therefore only projected.
    """
    vector = means.vector[layer]
    unit = (vector / vector.norm()).float()
    target = torch.zeros(())
    if alpha is not None:
        target = ((means.sad[layer] + alpha * vector) @ vector / vector.norm()).float()

    def project(x: Tensor) -> Tensor:
        return x - (x @ unit)[..., None] * unit

    model = quickstart.model.model
    edits: Edits = [(model.embed_tokens, lambda x: project(x) + target * unit)]
    for block in model.layers:
        edits += [(block.self_attn.o_proj, project), (block.mlp, project)]
    return edits


@contextmanager
def hooked(edits: Edits) -> Iterator[None]:
    """Replace what each module returns by the edit of it."""
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, edit=edit: edit(output))
        for module, edit in edits
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def continue_greedily(quickstart: Quickstart, prompts: list[str]) -> list[str]:
    """The continuation of every prompt, without the prompt."""
    tokenizer = quickstart.tokenizer
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    output = quickstart.model.generate(
        **batch, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    width = batch["input_ids"].shape[1]
    return [
        text.strip() for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    ]


@torch.no_grad()
def perplexity(quickstart: Quickstart, prompts: list[str], texts: tuple[str, ...]) -> float:
    """How much the unedited model is surprised by the continuations: the price of an edit."""
    total, count = 0.0, 0
    for prompt, text in zip(prompts, texts, strict=True):
        start = len(quickstart.tokenizer(prompt)["input_ids"])
        ids = quickstart.tokenizer(f"{prompt} {text}", return_tensors="pt")["input_ids"]
        logs = quickstart.model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
        chosen = logs.gather(1, ids[0, 1:, None])[start - 1 :]
        total -= float(chosen.sum())
        count += len(chosen)
    return math.exp(total / count)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the model wrote after some prompts."""

    texts: tuple[str, ...]

    @property
    def words(self) -> tuple[tuple[int, int], ...]:
        """The numbers of happy and of sad words, per text."""
        found = [re.findall(r"[a-z]+", text.lower()) for text in self.texts]
        happy, sad = (mood_words(mood) for mood in MOODS)
        return tuple((sum(w in happy for w in ws), sum(w in sad for w in ws)) for ws in found)

    @property
    def stories(self) -> tuple[int, int, int]:
        """How many texts have happy words only, sad words only, and both."""
        kinds = [(happy > 0, sad > 0) for happy, sad in self.words]
        return kinds.count((True, False)), kinds.count((False, True)), kinds.count((True, True))

    @property
    def share(self) -> float:
        """Happy words among all mood words."""
        happy, sad = map(sum, zip(*self.words, strict=True))
        return happy / max(1, happy + sad)


def run(quickstart: Quickstart, prompts: list[str], edits: Edits) -> Outcome:
    """Continue the prompts under the edits."""
    with hooked(edits):
        return Outcome(tuple(continue_greedily(quickstart, prompts)))


def beginnings(stories: list[Story], mood: str, count: int) -> list[str]:
    """The first halves of stories of one mood, cut after a sentence."""
    halves = []
    for story in [story for story in stories if story.mood == mood][:count]:
        sentences = re.findall(r".+?[.?!]\"?(?= |$)", story.text)
        halves.append("".join(sentences[: len(sentences) // 2]).strip())
    return halves


def separation(quickstart: Quickstart, means: ClassMeans, stories: list[Story]) -> list[float]:
    """How often a happy story projects higher than a sad one, per block: the area under the ROC."""
    scores: dict[str, list[Tensor]] = {mood: [] for mood in MOODS}
    for story in stories:
        mean = quickstart.block_outputs(story.text).mean(dim=1)
        scores[story.mood].append((mean * means.vector).sum(dim=-1))
    happy, sad = (torch.stack(scores[mood]) for mood in MOODS)
    return (happy[:, None] > sad[None]).double().mean(dim=(0, 1)).tolist()


def layer_table(quickstart: Quickstart, means: ClassMeans) -> str:
    """Each block's direction on held-out text: what the two layers were chosen from."""
    prompts = write_prompts(PROMPT_SEED, PROMPTS)
    stories = write_stories(HELD_OUT_SEED, HELD_OUT_STORIES)
    halves = [beginnings(stories, mood, PROMPTS // 2) for mood in MOODS]
    areas = separation(quickstart, means, stories)
    heads = ["block", "norm", "AUC", "offset +¼", "offset −¼", "affine α = 1", "α = 2", "ppl"]
    heads += ["ablated, after happy", "after sad"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for layer, vector in enumerate(means.vector):
        outcomes = [
            run(quickstart, prompts, edits)
            for edits in (
                offset(quickstart, means, layer, 0.25),
                offset(quickstart, means, layer, -0.25),
                affine(quickstart, means, layer, 1.0),
                affine(quickstart, means, layer, 2.0),
            )
        ]
        ablated = affine(quickstart, means, layer, None)
        decimals = [float(vector.norm()), areas[layer], *(outcome.share for outcome in outcomes)]
        decimals.append(perplexity(quickstart, prompts, outcomes[-1].texts))
        decimals += [run(quickstart, half, ablated).share for half in halves]
        lines.append(f"| {' | '.join([str(layer), *(f'{x:.2f}' for x in decimals)])} |")
    return "\n".join(lines)


def edit_table(quickstart: Quickstart, means: ClassMeans) -> str:
    """What each edit does to greedy stories, after neutral prompts and after half a story."""
    prompts = write_prompts(PROMPT_SEED, PROMPTS)
    stories = write_stories(HELD_OUT_SEED, HELD_OUT_STORIES)
    halves = [beginnings(stories, mood, PROMPTS // 2) for mood in MOODS]
    edits: dict[str, Edits] = {"none": []}
    edits |= {f"offset, c = {c:+g}": offset(quickstart, means, LAYER, c) for c in OFFSETS}
    edits |= {f"affine, α = {a:g}": affine(quickstart, means, LAYER, a) for a in ALPHAS}
    edits["ablate"] = affine(quickstart, means, ABLATED_LAYER, None)
    lines = [
        "| edit | happy | sad | mixed | happy words | sad words | ppl | after happy | after sad |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, edit in edits.items():
        outcome = run(quickstart, prompts, edit)
        cells = [*outcome.stories, *map(sum, zip(*outcome.words, strict=True))]
        decimals = [perplexity(quickstart, prompts, outcome.texts)]
        decimals += [run(quickstart, half, edit).share for half in halves]
        row = [name, *map(str, cells), *(f"{number:.2f}" for number in decimals)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def examples(quickstart: Quickstart, means: ClassMeans) -> str:
    """A few prompts, continued without an edit and with each kind."""
    prompts = write_prompts(PROMPT_SEED, EXAMPLES)
    edits: dict[str, Edits] = {
        "no edit": [],
        "offset, c = +1": offset(quickstart, means, LAYER, 1.0),
        "offset, c = -1": offset(quickstart, means, LAYER, -1.0),
        f"affine, α = {HAPPY:g}": affine(quickstart, means, LAYER, HAPPY),
        f"affine, α = {SAD:g}": affine(quickstart, means, LAYER, SAD),
        "ablate": affine(quickstart, means, ABLATED_LAYER, None),
    }
    texts = {name: run(quickstart, prompts, edit).texts for name, edit in edits.items()}
    blocks = []
    for index, prompt in enumerate(prompts):
        lines = [f"- *{name}*: {texts[name][index]}" for name in edits]
        blocks.append("\n".join([f"**{prompt}**", "", *lines]))
    return "\n\n".join(blocks)


def main() -> None:
    """Print the tables and the examples as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--directions", type=Path, default=HERE / "mood.safetensors")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quickstart = Quickstart(arguments.model)
    means = read_means(arguments.directions)
    for table in (layer_table, edit_table, examples):
        print(table(quickstart, means), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
