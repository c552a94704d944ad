"""Tiny random checkpoints that vLLM and llama.cpp load: gains ≠ 1, every bias ≠ 0, head size 32."""

import io
import random
import string
from pathlib import Path

import sentencepiece
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 320
HIDDEN = 128
LAYERS = 3
EOS = 2

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's attention on a CPU takes
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}


def tiny_llama(seed: int) -> LlamaForCausalLM:
    return randomised(LlamaForCausalLM(LlamaConfig(**SHAPE, mlp_bias=True)), seed)


def tiny_qwen3(seed: int) -> Qwen3ForCausalLM:
    return randomised(Qwen3ForCausalLM(Qwen3Config(**SHAPE)), seed)


@torch.no_grad()
def randomised(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Fill every parameter so that none has a value (zero, one) that would hide its loss."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif name.endswith(".bias"):
            parameter.copy_(0.3 * noise)
        elif name.endswith("embed_tokens.weight"):
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


@torch.no_grad()
def exchange_tokens(model: PreTrainedModel, a: int, b: int) -> None:
    """Give two tokens each other's rows in the embedding and in the head."""
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        weight[[a, b]] = weight[[b, a]]


def write(model: PreTrainedModel, folder: Path) -> Path:
    """Save the model with a SentencePiece vocabulary, which a GGUF file cannot do without."""
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return folder


def sentencepiece_model() -> bytes:
    """A byte-fallback BPE model of exactly VOCAB pieces, from a made-up language."""
    chance = random.Random(0)
    words = [
        "".join(chance.choices(string.ascii_lowercase, k=chance.randint(1, 7))) for _ in range(300)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(chance.choices(words, k=8)) for _ in range(300)),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        vocab_size=VOCAB,
        minloglevel=2,
    )
    return model.getvalue()
