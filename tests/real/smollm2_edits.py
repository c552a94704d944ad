"""Edits of the real model: their recipes, their hooks, and what both do to its answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from by_hand import EVERYWHERE, Map, hooked, logprobs, mean_kl
from safetensors.torch import load_file
from smollm2 import LAYER, SmolLM2
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

RECIPE = """
[base]
model = "{model}"
[directions.mood]
file = "{directions}"
layer = {layer}
[[edits]]
direction = "mood"
kind = "{kind}"
at = "{at}"
{strength}
[export]
target = ["transformers", "vllm", "llama.cpp"]
"""

# kind, at, the edit's strength, and where the hooks are.
EDITS = {
    "ablation": ("ablate", "resid", "", EVERYWHERE),
    "affine": ("affine", "resid", "alpha = {alpha}", EVERYWHERE),
    "offset": ("offset", f"resid_post.{LAYER}", "coefficient = 3.0", LAYER),
    "one site": ("affine", f"resid_post.{LAYER}", "alpha = {alpha}", LAYER),
}


@dataclass(frozen=True, eq=False)
class Subject:
    """The base model in float32, and what it and its hooked selves say of the texts."""

    files: SmolLM2
    model: PreTrainedModel
    base: Tensor
    """[tokens, vocab], as all log-probabilities here."""
    folder: Path

    def map_of(self, name: str) -> Map:
        """Return an edit as a function of the stream, as the papers have it."""
        vector, mean, unit, alpha = self.fitted
        if name == "ablation":
            return lambda x: x - (x @ unit)[..., None] * unit
        if name == "offset":
            return lambda x: x + 3.0 * vector
        return lambda x: x - ((x - mean) @ unit)[..., None] * unit + alpha * vector

    @property
    def fitted(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return the direction, the mean, the direction's unit vector, and the affine edit's alpha.

        Alpha sets the component to 0.5 everywhere: that of a class's mean is several times what
        the stream holds in the first blocks, and no text is left of it.
        """
        stored = load_file(self.files.directions)
        vector, mean = stored[f"vector.{LAYER}"], stored[f"mean.{LAYER}"]
        length = vector.double().norm()
        unit = vector.double() / length
        alpha = (0.5 - mean.double() @ unit) / length
        return vector, mean, unit.float(), float(alpha)

    def hooked(self, name: str) -> Tensor:
        """Return what the model says under an edit's hooks."""
        path = self.folder / f"{name}.pt"
        if not path.is_file():
            with hooked(self.model, self.map_of(name), EDITS[name][3]):
                torch.save(logprobs(self.model, self.files.texts), path)
        return torch.load(path)

    def effect(self, name: str) -> float:
        """Return the edit's effect: mean KL(hooked ‖ base)."""
        return mean_kl(self.hooked(name), self.base)

    def recipe(self, name: str) -> Path:
        """Write an edit's recipe."""
        kind, at, strength, _ = EDITS[name]
        path = self.folder / f"{name}.toml"
        text = RECIPE.format(
            model=self.files.checkpoint,
            directions=self.files.directions,
            layer=LAYER,
            kind=kind,
            at=at,
            strength=strength.format(alpha=self.fitted[-1]),
        )
        path.write_text(text, encoding="utf-8")
        return path


def loaded(folder: Path) -> PreTrainedModel:
    """Return a checkpoint as any user loads it, for arithmetic in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens_of(texts: Sequence[Sequence[int]]) -> int:
    return sum(map(len, texts))
