"""Train a small model of another family on the quickstart's stories, with its tokenizer.

    python benchmarks/trained.py gemma2|qwen3 --out DIR [--stories 36000]

The same corpus, optimiser and sizes as the quickstart's Llama (recipes/quickstart/train.py): six
blocks of width 128. What docs/relocation.md measures on a Gemma 2 and a Qwen3 is measured on these.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
sys.path.insert(0, str(QUICKSTART))
import train  # noqa: E402
from stories import write_stories  # noqa: E402

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.04,
    "tie_word_embeddings": True,
    "bos_token_id": train.BOS,
    "eos_token_id": train.EOS,
    "pad_token_id": None,
    "dtype": "float32",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 64, "attn_implementation": "eager"},
    "qwen3": {},
}


def build(family: str, vocabulary: int) -> Any:
    """Return a fresh model in float32."""
    torch.manual_seed(train.SEED)
    own = {**SIZES, "vocab_size": vocabulary, **FAMILIES[family]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **own))
    scale = getattr(model.model.embed_tokens, "scalar_embed_scale", 1.0)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=train.EMBEDDING_STD / scale)
    return model


def main() -> None:
    """Train one model and write it beside the quickstart's tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stories", type=int, default=train.STORIES)
    asked = parser.parse_args()
    torch.set_num_threads(train.THREADS)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model")

    def encoded(seed: int, count: int) -> list[list[int]]:
        texts = [story.text for story in write_stories(seed, count)]
        return [[*tokenizer(text)["input_ids"], train.EOS] for text in texts]

    model = build(asked.family, len(tokenizer))
    train.train(model, encoded(train.TRAINING_SEED, asked.stories))
    loss = train.held_out_loss(model, encoded(train.HELD_OUT_SEED, 500))
    print(f"held-out loss {loss:.4f} nats per token, perplexity {math.exp(loss):.3f}")
    model.save_pretrained(asked.out)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(QUICKSTART / "model" / name, asked.out / name)


if __name__ == "__main__":
    main()
