"""What storing an edit in a GGUF costs, for every type of the edited tensors: size against KL.

    python benchmarks/gguf_storage.py RECIPE --gguf FILE [--tokens 32]

The recipe names a chat model that transformers loads, FILE is a GGUF of it. Every choice of types
is what ``bake export`` would write, decoded and put into the model in float32: nothing but storage
is in the numbers. The chats' answers are those of the model with the exact edit. Printed are the
mean KL(exact ‖ stored) over mean KL(exact ‖ base), over all tokens and over the answers', how often
the most likely token is the same, and what ``bake plan --gguf`` reckons with, of whole tensors.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bake.checkpoints.gguf.codec import decode
from bake.checkpoints.gguf.file import Gguf
from bake.families.gguf import GgufPlace, gguf_places
from bake.jobs.request import compile_request
from bake.outputs.export import Export
from bake.outputs.gguf.edit import new_tensors

QUESTIONS = (
    "Tell me about your day.",
    "What is the capital of France?",
    "Describe the sea in two sentences.",
    "How do I bake bread?",
    "Write a short diary entry about winter.",
    "What do you feel about moving to a new town?",
    "Explain photosynthesis to a child.",
    "Give me three tips for a job interview.",
    "Write a letter to an old friend.",
    "What is 17 times 3?",
    "Tell me a short story about a fox.",
    "Why is the sky blue?",
)
CHOICES: tuple[tuple[str | Mapping[str, str], str], ...] = (
    ("keep", "nearest"),
    ("keep", "feedback"),
    ("Q5_0", "nearest"),
    ("Q5_1", "nearest"),
    ("Q5_1", "feedback"),
    ({"embed": "Q8_0", "writers": "Q5_1"}, "nearest"),
    ({"embed": "Q8_0", "writers": "keep"}, "feedback"),
    ({"embed": "Q8_0", "writers": "Q6_K"}, "nearest"),
    ("Q8_0", "nearest"),
    ("Q8_0", "feedback"),
    ("F16", "nearest"),
    ("auto", "feedback"),
)


@dataclass(frozen=True)
class Chat:
    """A prompt with its answer."""

    tokens: Tensor
    prompt: int


class Subject:
    """The model, whose weights are exchanged, and the places of its tensors in the file."""

    def __init__(self, export: Export, model: Gguf, tokens: int) -> None:
        self.model, self.places = model, gguf_places(export.plan.layout)
        self.layout, path = export.plan.layout, export.checkpoint.path
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.net: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        head = self.net.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())  # an edit may part them
        self.tokens = tokens

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Put values, named and ordered as in the file, into the model."""
        for name, place in self.places.items():
            if place.name in values:
                self._parameter(name).data.copy_(_ours(values[place.name], place))

    def _parameter(self, name: str) -> Tensor:
        if name == self.layout.unembed.weight:
            return self.net.get_output_embeddings().weight
        return dict(self.net.named_parameters())[name]

    def chats(self) -> list[Chat]:
        """Return the questions, each with the answer of the model as it is."""
        found = []
        for question in QUESTIONS:
            asked = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            answer = self.net.generate(**asked, max_new_tokens=self.tokens, do_sample=False)
            found.append(Chat(answer, asked["input_ids"].shape[1]))
        return found

    @torch.no_grad()
    def predictions(self, chats: list[Chat]) -> list[Tensor]:
        """Return log-probabilities, [tokens, vocabulary] for each chat."""
        return [self.net(c.tokens).logits[0].double().log_softmax(-1) for c in chats]


def main() -> None:
    """Measure every choice, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    request = compile_request(given.recipe, to=["gguf"], target=["llama.cpp"])
    export = request.export(Path("unused"), gguf=given.gguf)
    model = export.model()
    assert model is not None
    subject = Subject(export, model, given.tokens)
    base = {n: _decoded(model, n) for n in model.tensors}
    if (head := subject.places[subject.layout.unembed.weight].name) not in base:
        base[head] = base[subject.places[subject.layout.embed].name]
    new, _ = new_tensors(replace(export, gguf_type="F16"), model)
    exact = {n: torch.cat(list(t.exact())) for n, t in new.items() if t.exact is not None}
    subject.put(base)
    subject.put(exact)
    chats = subject.chats()
    meant = subject.predictions(chats)
    subject.put({name: base[name] for name in exact})
    before = subject.predictions(chats)
    effects = [_kl(meant, before, chats, answers=answers) for answers in (False, True)]
    print(f"effect {effects[0]:.3f} nats, {effects[1]:.3f} of the answers")
    print("edited tensors | file | KL lost | of the answers | same top | reckoned")
    for types, rounding in CHOICES:
        what = replace(export, gguf_type=types, rounding=rounding)
        stored, choice = new_tensors(what, model)
        values = {n: _written(t.produce(), t.kind, n) for n, t in stored.items() if n in exact}
        subject.put(values)
        found = subject.predictions(chats)
        lost = [
            _kl(meant, found, chats, answers=answers) / effects[answers]
            for answers in (False, True)
        ]
        size = sum(t.nbytes for n, t in model.tensors.items() if n not in stored)
        size += sum(tensor.nbytes for tensor in stored.values())
        same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in zip(meant, found, strict=True)])
        print(
            f"{types}, {rounding} | {size / 1e6:.1f} MB | {lost[0]:.2%} | {lost[1]:.2%} | "
            f"{float(same.double().mean()):.1%} | {choice.lost:.1%}",
            flush=True,
        )


def _decoded(model: Gguf, name: str) -> Tensor:
    info = model.tensors[name]
    rows = info.shape[-2] if len(info.shape) > 1 else 1
    values = decode(model.read_rows(name, 0, rows), info.kind, name)
    return values if len(info.shape) > 1 else values[0]


def _written(tiles: Iterator[Tensor], kind: Any, name: str) -> Tensor:
    return torch.cat([decode(tile, kind, name) for tile in tiles])


def _ours(values: Tensor, place: GgufPlace) -> Tensor:
    """Return a tensor of the file as the checkpoint has it."""
    values = values - place.addend
    if place.rows is not None:
        values = torch.empty_like(values).index_copy(0, torch.tensor(place.rows), values)
    return values.T if place.transposed else values


def _kl(p: list[Tensor], q: list[Tensor], chats: list[Chat], *, answers: bool) -> float:
    """Return the mean KL(p ‖ q), over all tokens or those that predict an answer's."""
    parts = []
    for ours, other, chat in zip(p, q, chats, strict=True):
        start = chat.prompt - 1 if answers else 0
        parts.append((ours.exp() * (ours - other)).sum(-1)[start:])
    return float(torch.cat(parts).mean())


if __name__ == "__main__":
    main()
