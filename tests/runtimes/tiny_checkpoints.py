"""Tiny random checkpoints that vLLM and llama.cpp load: gains ≠ 1, every bias ≠ 0, head size 32."""

import io
import json
import random
import string
from pathlib import Path

import sentencepiece
import torch
from install import GgufConverter
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bake.converter import convert

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


NO_BIAS = {**SHAPE, "attention_bias": False}
UNFLAGGED = {key: value for key, value in SHAPE.items() if key != "attention_bias"}

BYTE_LEVEL = (GPT2LMHeadModel, GPTNeoXForCausalLM, Olmo2ForCausalLM)
"""The classes whose vocabulary the converter wants byte-level."""


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """With every bias."""
    return randomised(LlamaForCausalLM(LlamaConfig(**SHAPE, mlp_bias=True)), seed)


def plain_llama(*, tied: bool = False) -> LlamaForCausalLM:
    """Without any bias, as the published ones are."""
    model = LlamaForCausalLM(LlamaConfig(**{**NO_BIAS, "tie_word_embeddings": tied}))
    randomised(model, 21)
    return with_rows_of_a_head(model) if tied else model


def tiny_qwen2() -> Qwen2ForCausalLM:
    # Qwen2's class takes no head_dim: it is hidden_size / heads, 32 as well.
    shape = {k: v for k, v in SHAPE.items() if k not in ("head_dim", "attention_bias")}
    return randomised(Qwen2ForCausalLM(Qwen2Config(**shape)), 23)


def tiny_qwen3(seed: int) -> Qwen3ForCausalLM:
    """With a bias in every linear layer of the attention."""
    return randomised(Qwen3ForCausalLM(Qwen3Config(**SHAPE)), seed)


def plain_qwen3() -> Qwen3ForCausalLM:
    """Without any bias, as the published ones are."""
    return randomised(Qwen3ForCausalLM(Qwen3Config(**NO_BIAS)), 22)


def tiny_mistral() -> MistralForCausalLM:
    return randomised(MistralForCausalLM(MistralConfig(**UNFLAGGED, sliding_window=None)), 24)


def tiny_phi3() -> Phi3ForCausalLM:
    # As Qwen2's, Phi-3's class makes its heads hidden_size / heads wide: 32 as well.
    shape = {key: value for key, value in UNFLAGGED.items() if key != "head_dim"}
    window = {"original_max_position_embeddings": 256, "sliding_window": 256, "pad_token_id": 0}
    return randomised(Phi3ForCausalLM(Phi3Config(**shape, **window)), 25)


def tiny_olmo2() -> Olmo2ForCausalLM:
    shape = {key: value for key, value in NO_BIAS.items() if key != "head_dim"}  # as Phi-3's
    return randomised(Olmo2ForCausalLM(Olmo2Config(**shape, pad_token_id=0)), 26)


def tiny_gpt_neox(*, parallel: bool) -> GPTNeoXForCausalLM:
    others = ("num_key_value_heads", "head_dim", "attention_bias", "tie_word_embeddings")
    config = GPTNeoXConfig(
        **{key: value for key, value in SHAPE.items() if key not in others},
        rotary_pct=0.5,
        use_parallel_residual=parallel,
        attn_implementation="eager",
    )
    model = randomised(GPTNeoXForCausalLM(config), 27)
    return far_from_zero(model, "dense_h_to_4h", "dense_4h_to_h")


def tiny_gemma1() -> GemmaForCausalLM:
    shape = {**NO_BIAS, "tie_word_embeddings": True}
    return tiny_gemma(GemmaForCausalLM(GemmaConfig(**shape, attn_implementation="eager")), 15)


def tiny_gemma2() -> Gemma2ForCausalLM:
    shape = {**NO_BIAS, "tie_word_embeddings": True}
    config = Gemma2Config(
        **shape, query_pre_attn_scalar=32, sliding_window=128, attn_implementation="eager"
    )
    return tiny_gemma(Gemma2ForCausalLM(config), 11)


def tiny_gemma3(*, tied: bool = True) -> Gemma3ForCausalLM:
    """Six layers, since llama.cpp has the pattern fixed: five look back a window, the sixth all."""
    shape = {**NO_BIAS, "tie_word_embeddings": tied, "num_hidden_layers": 6}
    config = Gemma3TextConfig(
        **shape, query_pre_attn_scalar=32, sliding_window=8, attn_implementation="eager"
    )
    assert config.layer_types == [*["sliding_attention"] * 5, "full_attention"]
    return tiny_gemma(Gemma3ForCausalLM(config), 14)


@torch.no_grad()
def with_rows_of_a_head(model: PreTrainedModel) -> PreTrainedModel:
    """Give an embedding that is also the head the rows of a linear layer, and logits their size."""
    model.get_input_embeddings().weight.mul_(HIDDEN**-0.5)
    return model


def tiny_gemma(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Randomise a Gemma, whose head is the embedding."""
    return with_rows_of_a_head(far_from_zero(randomised(model, seed), "gate_proj", "down_proj"))


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=3,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    model = far_from_zero(randomised(GPT2LMHeadModel(config), 12), "c_fc", "mlp.c_proj")
    with torch.no_grad():  # or the text is one token again and again, edited or not
        model.transformer.wpe.weight.mul_(4)
    return model


def tiny_mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(**UNFLAGGED, num_local_experts=4, num_experts_per_tok=2)
    return randomised(MixtralForCausalLM(config), 13)


def far_from_zero(model: PreTrainedModel, gates: str, downs: str) -> PreTrainedModel:
    """Drive the activations out of [-10, 10] and undo the scale behind them.

    In between, ggml's CPU code looks GELU up in a table of float16 (ggml/src/ggml-cpu/vec.h), which
    costs some thousandths of a nat, edited or not, and would hide what is measured here.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if gates in name:
                parameter.mul_(1000)
            if name.endswith(f"{downs}.weight"):
                parameter.mul_(1e-3)
    return model


@torch.no_grad()
def randomised(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Fill every parameter so that none has a value (zero, one) that would hide its loss."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(".bias"):
            parameter.copy_(0.3 * noise)
        elif parameter.dim() == 1:  # the gain of a norm
            parameter.copy_(1 + 0.2 * noise)
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
    """Save the model with a vocabulary, which a GGUF file cannot do without.

    It is SentencePiece's, or where the converter wants another one a byte-level one. So that the
    converter finds them, keys that published checkpoints have, and save_pretrained does not write,
    are written as well.
    """
    model.save_pretrained(folder)
    if not isinstance(model, BYTE_LEVEL):
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
        return folder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if isinstance(model, GPT2LMHeadModel):
        config["n_ctx"] = config["n_positions"]
    elif isinstance(model, GPTNeoXForCausalLM):
        config["rotary_pct"] = config["rope_parameters"]["partial_rotary_factor"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    byte_level_tokenizer(folder)
    return folder


def byte_level_tokenizer(folder: Path) -> None:
    """Write the byte-level tokenizer of VOCAB tokens that the converter recognises."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *alphabet]
    words += [a + b for a in alphabet for b in alphabet][: VOCAB - len(words)]
    merges = [(word[0], word[1]) for word in words[3 + len(alphabet) :]]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def converter_for(model: PreTrainedModel, converter: GgufConverter, folder: Path) -> Path:
    """Return a folder with a converter script that knows the model's vocabulary.

    The script recognises byte-level vocabularies by a hash of what they make of a text, and cannot
    know a made-up one: for those the folder gets a script that answers in its place. Its reader of
    config.json is transformers, whose version 5 leaves out a key that it asks a GPT-NeoX for.
    """
    script = converter.script
    if not isinstance(model, BYTE_LEVEL):
        return script.parent
    folder.mkdir(exist_ok=True)
    (folder / script.name).write_text(
        "import json, runpy, sys\n"
        f"sys.path[:0] = [{str(script.parent)!r}, {str(script.parent / 'gguf-py')!r}]\n"
        "from conversion.base import ModelBase, TextModel\n"
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'\n"
        "read = ModelBase.load_hparams\n"
        "def whole(folder, *rest):\n"
        "    return json.loads((folder / 'config.json').read_text()) | read(folder, *rest)\n"
        "ModelBase.load_hparams = staticmethod(whole)\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n",
        encoding="utf-8",
    )
    return folder


def converted(model: PreTrainedModel, folder: Path, converter: GgufConverter) -> Path:
    """Return `base.gguf` in float32 beside a checkpoint's folder."""
    file = folder.parent / "base.gguf"
    scripts = converter_for(model, converter, folder.parent / "converter")
    convert(folder, file, converter=scripts / converter.script.name, python=converter.python)
    return file


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
