"""What storing an edit in a GGUF costs, for every type of the edited tensors: size against KL.

    python benchmarks/gguf_storage.py RECIPE --gguf FILE [--tokens 32] [--chats 12]

The recipe names a chat model that transformers loads, FILE is a GGUF of it. The base is what FILE
decodes to, and the exact edit is of these weights. Every choice of types is what ``bake export``
would write, decoded and put into the model in float32: nothing but storage is in the numbers. The
last row is the adapter of ``bake export --to gguf-lora``, its product added to the decoded weights.
The chats' answers are those of the model with the exact edit. Printed are the mean KL(exact ‖
stored) over mean KL(exact ‖ base), over all tokens and over the answers', how often the most likely
token is the same, and what ``bake plan --gguf`` reckons with. Behind the table: how far the same
edit of the checkpoint lies, which a verification is against.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bake.checkpoints.gguf.codec import decode
from bake.checkpoints.gguf.file import Gguf, open_gguf
from bake.errors import BakeError
from bake.families.gguf import GgufPlace, gguf_places
from bake.jobs.request import Request, compile_request
from bake.outputs.checkpoint import planned_model
from bake.outputs.export import Export
from bake.outputs.gguf.edit import new_tensors
from bake.outputs.gguf.lora import FILE
from bake.outputs.gguf.write import NewBytes
from bake.outputs.write import export as write

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

    def put_checkpoint(self, values: Mapping[str, Tensor]) -> None:
        """Put values, named and ordered as in the checkpoint, into the model."""
        for name, value in values.items():
            self._parameter(name).data.copy_(value)

    def chats(self, count: int) -> list[Chat]:
        """Return some questions, each with the answer of the model as it is."""
        found = []
        for question in QUESTIONS[:count]:
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


@dataclass(frozen=True)
class Bench:
    """What every row is held against."""

    subject: Subject
    chats: list[Chat]
    meant: list[Tensor]
    """Log-probabilities of the exact edit."""
    effects: tuple[float, float]
    """Mean KL(exact ‖ base): over all tokens, and over the answers'."""

    def row(self, name: str, size: int, reckoned: str) -> None:
        """Print what the weights lose that are in the model."""
        found = self.subject.predictions(self.chats)
        lost = self.lost(found)
        pairs = zip(self.meant, found, strict=True)
        same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in pairs])
        print(
            f"{name} | {size / 1e6:.1f} MB | {lost[0]:.2%} | {lost[1]:.2%} | "
            f"{float(same.double().mean()):.1%} | {reckoned}",
            flush=True,
        )

    def lost(self, found: list[Tensor]) -> tuple[float, float]:
        """Return which share of the effect some log-probabilities miss."""
        over, answers = (
            _kl(self.meant, found, self.chats, answers=answers) for answers in (False, True)
        )
        return over / self.effects[0], answers / self.effects[1]


def main() -> None:
    """Measure every choice, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--chats", type=int, default=len(QUESTIONS))
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
    exact = {n: torch.cat(list(t.exact())).reshape(t.shape) for n, t in new.items()}
    subject.put(base | exact)
    chats = subject.chats(given.chats)
    meant = subject.predictions(chats)
    subject.put({name: base[name] for name in exact})
    before = subject.predictions(chats)
    both = [_kl(meant, before, chats, answers=answers) for answers in (False, True)]
    bench = Bench(subject, chats, meant, (both[0], both[1]))
    print(f"effect {both[0]:.3f} nats, {both[1]:.3f} of the answers")
    print("edited tensors | file | KL lost | of the answers | same top | reckoned")
    for types, rounding in CHOICES:
        what = replace(export, gguf_type=types, rounding=rounding)
        try:
            stored, choice = new_tensors(what, model)
        except BakeError as error:  # blocks that rows are no multiple of, or that nothing encodes
            print(f"{types}, {rounding} | refused: {error}")
            continue
        values = {n: _written(t) for n, t in stored.items() if n in exact}
        subject.put(values)
        size = sum(t.nbytes for n, t in model.tensors.items() if n not in stored)
        size += sum(tensor.nbytes for tensor in stored.values())
        bench.row(f"{types}, {rounding}", size, f"{choice.lost:.1%}")
    changes, size = _adapter(request, given.gguf, subject)
    subject.put({n: base[n] + changes[n] if n in changes else base[n] for n in exact})
    bench.row("as they are, with an adapter", size, "")
    _checkpoint(bench, export)


def _adapter(request: Request, gguf: Path, subject: Subject) -> tuple[dict[str, Tensor], int]:
    """Return what a GGUF LoRA adds to each tensor of the file, and the bytes of both files."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        write(request.export(out, gguf=gguf), ["gguf-lora"], out)
        adapter = open_gguf(out / FILE)
        whole = [path for path in out.glob("*.gguf") if path.name != FILE] or [gguf]
        size = sum(path.stat().st_size for path in (*whole, out / FILE))
        table, found = subject.places[subject.layout.embed].name, {}
        for name in {key.rpartition(".")[0] for key in adapter.tensors}:
            a, b = (_decoded(adapter, f"{name}.{part}") for part in ("lora_a", "lora_b"))
            # llama.cpp's src/llama-graph.cpp: of the embedding A is looked up, and is [tokens, r].
            found[name] = a @ b.mT if name == table else b @ a
    return found, size


def _checkpoint(bench: Bench, export: Export) -> None:
    """Print how far the same edit of the checkpoint lies from that of the file's own weights."""
    base, subject = export.checkpoint, bench.subject
    planned = planned_model(export.plan, base).tensors
    places = [name for name in subject.places if name in base.tensors]
    subject.put_checkpoint({n: base.read(n) for n in places if n not in planned})
    subject.put_checkpoint({n: tensor.value() for n, tensor in planned.items()})
    lost = bench.lost(subject.predictions(bench.chats))
    print(f"the checkpoint with the exact edit: {lost[0]:.2%}, {lost[1]:.2%} of the answers")


def _decoded(model: Gguf, name: str) -> Tensor:
    info = model.tensors[name]
    rows = info.shape[-2] if len(info.shape) > 1 else 1
    values = decode(model.read_rows(name, 0, rows), info.kind, name)
    return values if len(info.shape) > 1 else values[0]


def _written(tensor: NewBytes) -> Tensor:
    """Return what a tensor's bytes stand for."""
    tiles = (decode(tile, tensor.kind, tensor.name) for tile in tensor.produce())
    return torch.cat(list(tiles)).reshape(tensor.shape)


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
