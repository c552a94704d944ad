"""Train the quickstart's tokenizer and model on stories of the grammar.

    python recipes/quickstart/train.py --out recipes/quickstart/model

Everything is drawn from one seed and computed on the CPU with deterministic kernels and a fixed
number of threads, so two runs on one machine write the same bytes. Another processor or another
version of torch may sum in another order, and then gives a model as good as this one, but not the
same one.
"""

import argparse
import io
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

sys.path.insert(0, str(Path(__file__).parent))
from stories import write_stories

SEED = 20260
TRAINING_SEED = 1
HELD_OUT_SEED = 2
STORIES = 36_000
TOKENIZER_STORIES = 20_000
BATCH = 8
THREADS = 1
VOCABULARY = 1280
UNK, BOS, EOS = 0, 1, 2
PEAK_RATE = 2.5e-3
WARM_UP = 100
WEIGHT_DECAY = 0.6
ROPE_THETA = 10000.0
EMBEDDING_STD = 0.25
SHARD = "4MB"


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> bytes:
    """A SentencePiece model as Llama's: BPE, byte fallback, no normalisation, no padding piece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def build_model(vocabulary: int = VOCABULARY, seed: int = SEED) -> LlamaForCausalLM:
    """A fresh Llama of 1.3 million float32 parameters: no biases, grouped queries, a tied head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        initializer_range=0.04,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=None,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    # The stream starts with rows of norm about 3 and grows slowly, so that one constant (which an
    # affine edit puts into the embedding) weighs about the same in the first block as in the last.
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=EMBEDDING_STD)
        for block in model.model.layers:
            for writer in (block.self_attn.o_proj, block.mlp.down_proj):
                writer.weight.div_(math.sqrt(2 * config.num_hidden_layers))
    return model


def pad_batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and labels [batch, position], filled up on the right with positions that do not count.

    Attention is causal, so what stands to the right of a story changes nothing in it.
    """
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), EOS)
    labels = torch.full((len(rows), width), -100)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        labels[index, : len(row)] = torch.tensor(row)
    return ids, labels


def batches(rows: list[list[int]], size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All rows once, in batches of similar length, the batches in random order."""
    rng = random.Random(seed)
    order = list(range(len(rows)))
    rng.shuffle(order)
    groups: list[list[int]] = []
    for start in range(0, len(order), size * 64):
        bucket = sorted(order[start : start + size * 64], key=lambda index: len(rows[index]))
        parts = [bucket[i : i + size] for i in range(0, len(bucket), size)]
        rng.shuffle(parts)
        groups.extend(parts)
    for group in groups:
        yield pad_batch([rows[index] for index in group])


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    warm_up = min(WARM_UP, steps // 2)
    if step < warm_up:
        return PEAK_RATE * (step + 1) / warm_up
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: list[list[int]]) -> float:
    """Mean negative log-likelihood per token, in nats."""
    total, count = 0.0, 0
    for ids, labels in batches(rows, BATCH, seed=0):
        predicted = int((labels[:, 1:] != -100).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * predicted
        count += predicted
    return total / count


def train(model: LlamaForCausalLM, rows: list[list[int]], seed: int = SEED) -> None:
    """One pass of AdamW over the rows, in place."""
    steps = math.ceil(len(rows) / BATCH)
    inner = [p for block in model.model.layers for p in block.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if not any(p is q for q in inner)]
    groups = [
        {"params": inner, "weight_decay": WEIGHT_DECAY},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    model.train()
    began = time.monotonic()
    for step, (ids, labels) in enumerate(batches(rows, BATCH, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 300 == 0 or step == steps - 1:
            seconds = time.monotonic() - began
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)
    model.eval()


def write_json(path: Path, value: object) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tokenizer(pieces: bytes, out: Path) -> None:
    """tokenizer.model, and the same vocabulary and merges as transformers' tokenizer files."""
    (out / "tokenizer.model").write_bytes(pieces)
    LlamaTokenizer.from_pretrained(out, add_bos_token=True).save_pretrained(out)
    # Of the configuration only what says something is kept, and nothing of where it was made.
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": 512,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    write_json(out / "tokenizer_config.json", settings)


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """The checkpoint in shards below 4 MB, with a config that every runtime reads alike."""
    model.generation_config.max_length = None
    model.save_pretrained(out, max_shard_size=SHARD)
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes rope_parameters alone; other runtimes read the older key or take 10000.
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["tie_word_embeddings"] = True
    write_json(path, dict(sorted(config.items())))


def main() -> None:
    """Train and write everything to one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("model"))
    parser.add_argument("--stories", type=int, default=STORIES)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)

    texts = [story.text for story in write_stories(TRAINING_SEED, arguments.stories)]
    held_out = [story.text for story in write_stories(HELD_OUT_SEED, 500)]
    pieces = train_tokenizer(texts[:TOKENIZER_STORIES])
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)

    def encode(text: str) -> list[int]:
        return [BOS, *processor.encode(text), EOS]

    model = build_model()
    train(model, [encode(text) for text in texts])
    loss = held_out_loss(model, [encode(text) for text in held_out])
    print(f"held-out loss {loss:.4f} nats per token, perplexity {math.exp(loss):.3f}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(pieces, arguments.out)
    save_model(model, arguments.out)


if __name__ == "__main__":
    main()
