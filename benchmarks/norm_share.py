"""What of a widened edit's loss is the norms', before and behind it, for every α at once.

    python benchmarks/norm_share.py CHECKPOINT TEXTS.json [--blocks 2,8] [--count 5]

The model and the direction are those of relocation.py, the texts lists of token ids. A widened
model is the hooked one whose norms see another length (docs/relocation.md): before the edit it
lacks 1 − α² of the edited component's energy, behind it it has α² too much. Both are put into the
hooked model by hand, each by itself, and what they do to the logits is added up in the first order,
so that five passes over the texts give every α: the hooked model, either share, and either share
with the gain of every norm times the mean of what its input is too long. That mean is taken on
other texts than the loss. Printed is KL(hooked ‖ that) over KL(hooked ‖ base) in percent, of all
tokens but the first of each text (and of the first).
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from relocation import HAPPY, SAD, divergence, first, logprobs, streams
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ALPHAS = (0.0, 0.25, 0.375, 0.5, 0.7, 1.0)
SMALL = 0.25
"""α² at which the share behind is taken: small enough for the first order."""

Mean = Mapping[int, float]
"""The component's mean share of the energy at every norm, by its place."""


@dataclass(eq=False)
class Shares:
    """A hooked model whose norms see other lengths; norm 2 l + i is the i-th of block l."""

    unit: Tensor
    """[d], what is edited."""
    constant: float
    """What the component becomes."""
    layer: int
    before: float = 1.0
    """α² before the edit: 1 leaves those norms as they are."""
    behind: float = 0.0
    mean: Mean | None = None
    """Where gains make up for the mean."""
    seen: dict[int, Tensor] = field(default_factory=dict)
    """The component's share of the energy at every norm, [texts, tokens]."""
    passenger: Tensor | None = None

    def norm(self, place: int) -> Any:
        """Return the hook of one norm."""
        early = place < 2 * self.layer + 2

        def seeing(module: Any, args: Any, out: Tensor) -> Tensor:
            stream = args[0]
            energy = stream.pow(2).sum(-1, keepdim=True) + module.variance_epsilon * len(self.unit)
            size = (stream @ self.unit)[..., None] if early else self.passenger
            assert size is not None
            share = size.pow(2) / energy
            self.seen[place] = share[..., 0]
            more = self.before - 1 if early else self.behind
            gain = 1.0 if self.mean is None else (1 + more * self.mean[place]) ** 0.5
            return out * gain / (1 + more * share).sqrt()

        return seeing

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Hook a model."""
        blocks = model.model.layers
        norms = [n for b in blocks for n in (b.input_layernorm, b.post_attention_layernorm)]

        def middle(_module: Any, args: Any) -> None:
            self.passenger = (args[0] @ self.unit)[..., None]

        def edit(_module: Any, _args: Any, out: Any) -> Any:
            x = first(out)
            y = x + (self.constant - x @ self.unit)[..., None] * self.unit
            return y if isinstance(out, Tensor) else (y, *out[1:])

        with ExitStack() as stack:
            mlp = blocks[self.layer].post_attention_layernorm
            handles = [mlp.register_forward_pre_hook(middle)]
            handles.append(blocks[self.layer].register_forward_hook(edit))
            for place, module in enumerate((*norms, model.model.norm)):
                handles.append(module.register_forward_hook(self.norm(place)))
            for handle in handles:
                stack.callback(handle.remove)
            yield


def run(model: Any, texts: list[list[int]], shares: Shares, skip: int) -> list[Tensor]:
    """Return what the model says under some shares."""
    with shares.on(model):
        return kept(logprobs(model, texts), skip)


def kept(found: list[Tensor], skip: int) -> list[Tensor]:
    """Return the rows of the first tokens, and those behind what is skipped."""
    return [torch.cat([one[:1], one[skip:]]) for one in found]


@torch.no_grad()
def means(model: Any, texts: list[list[int]], shares: Shares, skip: int) -> Mean:
    """Return the mean share at every norm, of the tokens behind what is skipped."""
    total: dict[int, list[Tensor]] = {}
    for ids in texts:
        with shares.on(model):
            model.model(torch.tensor([ids]))
        for place, share in shares.seen.items():
            total.setdefault(place, []).append(share[0, skip:])
    return {place: float(torch.cat(found).mean()) for place, found in total.items()}


def moved(hooked: list[Tensor], *by: tuple[float, list[Tensor]]) -> list[Tensor]:
    """Return log-probabilities that lie off the hooked ones by multiples of some differences."""
    return [
        (p + sum(factor * (other[i] - p) for factor, other in by)).log_softmax(-1)
        for i, p in enumerate(hooked)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--blocks", default="")
    parser.add_argument("--kinds", default="affine,ablate")
    parser.add_argument("--count", type=int, default=5, help="texts; as many others for the means")
    parser.add_argument("--skip", type=int, default=1, help="tokens of a system prompt, left out")
    parser.add_argument("--streams", type=Path, help="where the mean streams are kept")
    asked = parser.parse_args()
    live = AutoModelForCausalLM.from_pretrained(asked.checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(asked.checkpoint)
    given = json.loads(asked.texts.read_text(encoding="utf-8"))
    texts, others = given[: asked.count], given[asked.count : 2 * asked.count]
    if asked.streams is not None and asked.streams.is_file():
        happy, sad = torch.load(asked.streams)
    else:
        happy, sad = (streams(live, tokenizer, system) for system in (HAPPY, SAD))
    skip = asked.skip
    base = kept(logprobs(live, texts), skip)
    blocks = [int(b) for b in asked.blocks.split(",") if b] or range(len(live.model.layers))
    for layer in blocks:
        vector = happy[layer] - sad[layer]
        unit = (vector / vector.norm()).float()
        for kind in asked.kinds.split(","):
            constant = 0.0
            if kind == "affine":
                constant = float(sad[layer].float() @ unit + vector.norm())
            hooked = Shares(unit, constant, layer)
            mean = means(live, others, hooked, skip)
            reference = run(live, texts, hooked, skip)
            effect = divergence(reference, base)
            print(f"block {layer}, {kind}: effect {effect[0]:.4f} ({effect[1]:.4f}) nats")
            for name, gains in (("as it is", None), ("with gains", mean)):
                lacking = Shares(unit, constant, layer, 0.0, mean=gains)
                over = Shares(unit, constant, layer, 1.0, SMALL, mean=gains)
                early, behind = (run(live, texts, x, skip) for x in (lacking, over))
                for alpha in ALPHAS:
                    parts = (1 - alpha**2, early), (alpha**2 / SMALL, behind)
                    lost = divergence(reference, moved(reference, *parts))
                    shares = [100 * a / b for a, b in zip(lost, effect, strict=True)]
                    print(f"  {name:10s} α = {alpha:5.3f}  {shares[0]:.3f} ({shares[1]:.3f})")


if __name__ == "__main__":
    main()
