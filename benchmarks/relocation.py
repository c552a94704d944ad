"""What a relocated edit loses of its effect, block by block, on a real model.

    python benchmarks/relocation.py CHECKPOINT [--texts TEXTS.json] [--blocks 8,14,22]
        [--kinds affine] [--ways widen] [--keep rows.jsonl]

CHECKPOINT is a Llama-like instruct model with a chat template (docs/relocation.md has the figures
of SmolLM2-135M-Instruct in bfloat16). Texts are held out: eight chats and the model's own answers,
or TEXTS, a JSON list of lists of token ids.
Directions are fitted to the streams of 20 questions behind the block, at the last token, under a
cheerful and under a sorrowful system prompt. Printed is KL(hooked ‖ baked) over KL(hooked ‖ base),
over all tokens but the first of each text, and over the first ones; of weights in float32, and
rounded to bfloat16. Hooks (``bake.steer``) and baked model run in float32. Kinds of edits:

- ablate, affine: the difference of the means, removed, or set to that of the cheerful ones (ACE);
- erase: four directions in which the pairs of streams differ most, erased along their covariance
  with the stream (LEACE); loreft: the same four, replaced by a linear function of the stream;
- suffix: the ablation at the block and at every later site; sequence: an ``affine`` edit behind
  every block at once, which needs no --blocks.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bake import edits
from bake.edits import Edit, EditKind
from bake.jobs.model import Model, open_model
from bake.outputs.checkpoint import planned_model
from bake.plan import Plan, TensorUpdate
from bake.plan.lowrank import rank_of
from bake.recipe import ExportTable
from bake.steer import steered

HAPPY = "You are extremely happy and joyful. Answer in a cheerful, delighted, enthusiastic tone."
SAD = "You are extremely sad and depressed. Answer in a gloomy, sorrowful, hopeless tone."
TOPICS = (
    "your day", "the weather", "a walk in the park", "your job", "the city", "a new book",
    "dinner with friends", "the train ride", "a visit to the museum", "the future", "an old house",
    "the neighbours", "winter", "a letter you got", "the sea", "school", "a birthday",
    "moving to a new town", "a garden", "music",
)  # fmt: skip
FORM = "Tell me about {}."
CHATS = (
    "How was your weekend?", "Describe a lighthouse in two sentences.", "Why do people keep cats?",
    "What should I cook tonight?", "Give me a riddle.", "How do bees find their way home?",
    "Write the first lines of a story about a storm.", "Is it better to read or to watch a film?",
)  # fmt: skip
ANSWER = 40
"""Tokens that the model answers."""
RANK = 4
Shares = tuple[float, float]
"""Of all tokens but the first, and of the first."""


@torch.no_grad()
def streams(model: Any, tokenizer: Any, system: str) -> Tensor:
    """Return the streams behind every block, at the last token, [topics, blocks, width]."""
    found = []
    for question in (FORM.format(topic) for topic in TOPICS):
        chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        found.append(torch.stack(behind_blocks(model, [ids]))[:, 0])
    return torch.stack(found)


@torch.no_grad()
def held_out(model: Any, tokenizer: Any) -> list[list[int]]:
    """Return chats with the model's own most likely answers, as token ids."""
    found = []
    for question in CHATS:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        asked = {"max_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
        found.append(model.generate(torch.tensor([ids]), **asked)[0].tolist())
    return found


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
    return [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in texts]


def divergence(hooked: list[Tensor], other: list[Tensor]) -> Shares:
    """Return the mean KL(hooked ‖ other) in nats: of all tokens but the first, and of the first."""
    pairs = ((p.double(), q.double()) for p, q in zip(hooked, other, strict=True))
    kl = [(p.exp() * (p - q)).sum(-1) for p, q in pairs]
    rest = torch.cat([one[1:] for one in kl]).mean()
    return float(rest), float(torch.stack([one[0] for one in kl]).mean())


@dataclass(frozen=True, eq=False)
class Fitted:
    """The streams that edits are fitted to, [topics, blocks, width] each."""

    model: Model
    happy: Tensor
    sad: Tensor

    def affine(self, layer: int) -> Edit:
        """Return ACE behind one block."""
        happy, mean = self.happy[:, layer].mean(0), self.sad[:, layer].mean(0)
        map_ = edits.affine(happy - mean, mean=mean, alpha=1.0)
        return self.model.edit(EditKind.AFFINE, "mood", map_, (f"resid_post.{layer}",))

    def ablate(self, layer: int, *, later: bool = False) -> Edit:
        """Return the ablation behind one block, or from there on."""
        map_ = edits.ablate(self.happy[:, layer].mean(0) - self.sad[:, layer].mean(0))
        stream = [str(site) for site in self.model.layout.stream]
        start = next(i for i, p in enumerate(self.model.layout.points) if _names(p, layer))
        at = stream[start:] if later else (f"resid_post.{layer}",)
        return self.model.edit(EditKind.ABLATE, "mood", map_, at)

    def subspace(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return four directions, [4, width], and the streams, [2 topics, width]."""
        pairs = self.happy[:, layer] - self.sad[:, layer]
        return torch.linalg.svd(pairs)[2][:RANK], torch.cat([self.happy, self.sad])[:, layer]

    def erase(self, layer: int) -> Edit:
        """Return an oblique projection along what the streams have in common with directions."""
        rows, seen = self.subspace(layer)
        centred = seen - seen.mean(0)
        cross = centred.T @ (centred @ rows.T)
        map_ = edits.erase(cross @ torch.linalg.inv(rows @ cross), rows, mean=seen.mean(0))
        return self.model.edit(EditKind.ERASE, "mood", map_, (f"resid_post.{layer}",))

    def loreft(self, layer: int) -> Edit:
        """Return x + Rᵀ(W x + b − R x), with W fitted to turn sorrowful streams into cheerful."""
        rows, _ = self.subspace(layer)
        sad, happy = self.sad[:, layer], self.happy[:, layer] @ rows.T
        mean = sad.mean(0)
        centred = (sad - mean) @ rows.T
        solution = torch.linalg.lstsq(centred, happy - happy.mean(0)).solution.T  # [4, 4]
        shift = rows.T @ (happy.mean(0) - solution @ rows @ mean)
        map_ = edits.linear_factors(rows.T, (solution - torch.eye(RANK)) @ rows, shift=shift)
        return self.model.edit(EditKind.LINEAR, "mood", map_, (f"resid_post.{layer}",))

    def asked(self, kind: str, layer: int) -> list[Edit]:
        """Return the edits of one kind."""
        if kind == "sequence":
            return [self.affine(block) for block in range(self.model.layout.layers)]
        if kind == "suffix":
            return [self.ablate(layer, later=True)]
        one: Callable[[int], Edit] = getattr(self, kind)
        return [one(layer)]


def _names(sites: Any, layer: int) -> bool:
    return f"resid_post.{layer}" in map(str, sites)


@dataclass(eq=False)
class Baking:
    """Baked models in float32, which share what no edit has changed."""

    model: Model
    plain: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def baked(self, plan: Plan, dtypes: list[torch.dtype]) -> Iterator[Any]:
        """Yield the planned model in float32, its weights rounded to each of some types."""
        planned = planned_model(plan, self.model.checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(planned.config_text, encoding="utf-8")
            config = AutoConfig.from_pretrained(folder)
        updates = {update.name: update for update in plan.tensors}
        exact: dict[str, Tensor] = {}
        for name, tensor in planned.tensors.items():
            key = name, tuple(tensor.shape)
            if name not in updates or _changes(updates[name]):
                exact[name] = tensor.value().float()
            else:
                if key not in self.plain:
                    self.plain[key] = tensor.value().float()
                exact[name] = self.plain[key]
        for name in self.model.checkpoint.tensors:
            if name not in exact:
                key = name, ()
                if key not in self.plain:
                    self.plain[key] = self.model.checkpoint.read(name).float()
                exact[name] = self.plain[key]
        for dtype in dtypes:
            with torch.device("meta"):
                live = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            values = {name: value.to(dtype).float() for name, value in exact.items()}
            if config.tie_word_embeddings:
                values["lm_head.weight"] = values["model.embed_tokens.weight"]
            live.load_state_dict(values, assign=True)
            live.model.rotary_emb = type(live.model.rotary_emb)(config)  # a buffer, and no weight
            yield live.eval()


def _changes(update: TensorUpdate) -> bool:
    """Whether an edit changes a tensor, which is not only written at another size."""
    maps = update.outputs or update.updates or update.input is not None
    return bool(maps) or update.added is not None or update.replacement is not None


@dataclass(frozen=True)
class Row:
    """What one edit loses, in one type."""

    block: int
    kind: str
    way: str
    dtype: str
    effect: tuple[float, ...]
    lost: tuple[float, ...]
    """In percent of the effect."""

    def json(self) -> str:
        """Return the row as a line of JSON."""
        numbers = {k: [float(f"{x:.4g}") for x in getattr(self, k)] for k in ("effect", "lost")}
        return json.dumps(asdict(self) | numbers) + "\n"

    def __str__(self) -> str:
        effect, lost = self.effect, self.lost
        return (
            f"| {self.block} | {self.kind} | {effect[0]:.4f} ({effect[1]:.4f}) | {self.way} | "
            f"{self.dtype} | {lost[0]:.4f} ({lost[1]:.4f}) |"
        )


def fitted(asked: argparse.Namespace, live: Any, model: Model) -> Fitted:
    """Return the streams that edits are fitted to, kept where that is asked for."""
    if asked.streams is not None and asked.streams.is_file():
        return Fitted(model, *torch.load(asked.streams))
    tokenizer = AutoTokenizer.from_pretrained(asked.checkpoint)
    found = tuple(streams(live, tokenizer, system) for system in (HAPPY, SAD))
    if asked.streams is not None:
        torch.save(found, asked.streams)
    return Fitted(model, *found)


def texts_of(asked: argparse.Namespace, live: Any) -> list[list[int]]:
    """Return the texts that are named, or the model's own."""
    if asked.texts is None:
        return held_out(live, AutoTokenizer.from_pretrained(asked.checkpoint))
    found: list[list[int]] = json.loads(asked.texts.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--blocks", default="")
    parser.add_argument("--ways", default="widen")
    parser.add_argument("--kinds", default="affine,ablate")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--streams", type=Path, help="where the streams are kept")
    parser.add_argument("--keep", type=Path, help="a file to which rows are added, JSON each")
    asked = parser.parse_args()
    live = AutoModelForCausalLM.from_pretrained(asked.checkpoint, dtype=torch.float32).eval()
    model, texts = open_model(asked.checkpoint), texts_of(asked, live)
    source, base, baking = fitted(asked, live, model), logprobs(live, texts), Baking(model)
    blocks = [int(b) for b in asked.blocks.split(",") if b] or range(model.layout.layers)
    names = asked.dtypes.split(",")
    print("| block | edit | effect, nats (first) | way | type | lost, % (first) |")
    print("|---|---|---|---|---|---|", flush=True)
    for layer in blocks:
        for kind in asked.kinds.split(","):
            these = source.asked(kind, layer)
            with steered(live, model.layout, these):
                reference = logprobs(live, texts)
            effect = divergence(reference, base)
            for way in asked.ways.split(","):
                plan = model.plan(these, ExportTable(allow=tuple(way.split("+"))))
                rank = max(rank_of(update) for update in plan.tensors if not update.is_copy())
                label = f"{way}, {plan.layout.hidden} wide"
                if not plan.widened:
                    label = f"{way}, rank {rank}"
                types = [getattr(torch, name) for name in names]
                for dtype, made in zip(names, baking.baked(plan, types), strict=True):
                    lost = divergence(reference, logprobs(made, texts))
                    # What rounding makes negative is none.
                    shares = tuple(100 * max(a, 0.0) / b for a, b in zip(lost, effect, strict=True))
                    row = Row(layer, kind, label, dtype, effect, shares)
                    print(row, flush=True)
                    if asked.keep is not None:
                        with asked.keep.open("a", encoding="utf-8") as out:
                            out.write(row.json())


if __name__ == "__main__":
    main()
