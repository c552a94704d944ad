"""Fit the mood direction on the trained model's activations.

    python recipes/quickstart/fit.py

The direction of block L is a difference of class means: the mean activation at the output of the
block over every position of happy stories, minus the same over sad ones. The stories are other ones
than those that the model was trained on. The means of the sad stories are kept too, as the
reference of the affine edit. The prompts and the held-out text beside the directions are written
by the same generator, each from a seed of its own.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bake.directions import Direction, Directions, Role, write_directions

sys.path.insert(0, str(Path(__file__).parent))
from stories import MOODS, Story, write_prompts, write_stories

HERE = Path(__file__).parent
FIT_SEED, HELD_OUT_SEED, PROMPT_SEED = 3, 4, 5
FIT_STORIES, EVALUATION_STORIES, PROMPTS = 400, 64, 8


class Quickstart:
    """The trained model with its tokenizer."""

    def __init__(self, folder: Path = HERE / "model") -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        # Padding is masked, and the model has no piece of its own for it.
        self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.no_grad()
    def block_outputs(self, text: str) -> Tensor:
        """The residual stream after every block, `[layer, position, d]` in float64.

        The position of `<s>` is left out: its activation is the same in every text, and large.
        """
        seen: list[Tensor] = []
        handles = [
            block.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
            for block in self.model.model.layers
        ]
        try:
            self.model(**self.tokenizer(text, return_tensors="pt"))
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(seen).double()[:, 1:]


@dataclass(frozen=True, slots=True, eq=False)
class ClassMeans:
    """Mean activation of each mood at each block output, `[layer, d]` in float64."""

    happy: Tensor
    sad: Tensor

    @property
    def vector(self) -> Tensor:
        """The direction from sad to happy, `[layer, d]`."""
        return self.happy - self.sad


def class_means(quickstart: Quickstart, stories: list[Story]) -> ClassMeans:
    """The means over all positions of all stories of each mood."""
    means = []
    for mood in MOODS:
        outputs = [quickstart.block_outputs(story.text) for story in stories if story.mood == mood]
        means.append(torch.cat(outputs, dim=1).mean(dim=1))
    return ClassMeans(*means)


def write(quickstart: Quickstart, path: Path) -> None:
    """Fit on the fitting stories and write the directions, with the sad means as reference."""
    means = class_means(quickstart, write_stories(FIT_SEED, FIT_STORIES))
    items = tuple(
        Direction(
            {Role.VECTOR: vector.float(), Role.MEAN: mean.float()}, layer, f"resid_post.{layer}"
        )
        for layer, (vector, mean) in enumerate(zip(means.vector, means.sad, strict=True))
    )
    metadata = {
        "description": "mean of happy stories minus mean of sad stories, every position after <s>",
        "mean": "the mean of the sad stories, the reference class",
        "model": "recipes/quickstart/model",
        "source": "recipes/quickstart/fit.py",
    }
    write_directions(Directions("mood", "bake", path.name, "", items, metadata), path)


def main() -> None:
    """Write the directions, the prompts and the held-out text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write(Quickstart(arguments.model), arguments.out / "mood.safetensors")
    texts = [story.text for story in write_stories(HELD_OUT_SEED, EVALUATION_STORIES)]
    for name, lines in (
        ("prompts.txt", write_prompts(PROMPT_SEED, PROMPTS)),
        ("eval.txt", texts),
    ):
        (arguments.out / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
