"""A tokenizer of whole words that transformers loads, with a chat template where one is wanted."""

from pathlib import Path
from typing import Any

MARKS = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
WORDS = tuple(
    "a the what is bread it be kind sorry no yes we you they cat dog sun sea tree house runs sees "
    "eats sleeps and or but in on under red blue old new day night".split()
)
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|system|>be "
    "kind<|end|>{% endif %}{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role') }}{% endif %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% endif %}"
)
"""It has a system prompt of its own, and takes three roles."""


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Any:
    """Write a tokenizer to a folder, and return it. Its tokens fit the tiny models' vocabulary."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    return _write(folder, WORDS, Split(Regex(r"\s+"), "removed"), template)


def write_letters(folder: Path) -> Any:
    """Write a tokenizer of single letters without accents, which bake's own text is written in."""
    from tokenizers import Regex
    from tokenizers.normalizers import NFD, Lowercase, Sequence, StripAccents
    from tokenizers.pre_tokenizers import Split

    letters = tuple("abcdefghijklmnopqrstuvwxyz0123456789 .,:'-")
    normal = Sequence([NFD(), StripAccents(), Lowercase()])
    return _write(folder, letters, Split(Regex("."), "isolated"), None, normal)


def _write(
    folder: Path, pieces: tuple[str, ...], split: Any, template: str | None, normal: Any = None
) -> Any:
    from tokenizers import Tokenizer as Tokens
    from tokenizers.models import WordLevel
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(("[UNK]", *MARKS, *pieces))}
    tokens = Tokens(WordLevel(ids, unk_token="[UNK]"))
    tokens.pre_tokenizer = split
    if normal is not None:
        tokens.normalizer = normal
    tokens.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(MARKS[2:]),
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer
