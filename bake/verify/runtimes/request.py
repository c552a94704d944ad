"""What bake asks of a runtime, and what the runtime answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from bake.errors import UsageError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class RuntimeRequest:
    """Log-probabilities over some prompts, and the greedy text after each.

    Raises:
        UsageError: a prompt is empty or holds no token of the vocabulary, or a field has a value
            that no runtime takes.
    """

    model: Path
    """The folder of a checkpoint, or the GGUF file for a runtime that reads those."""

    prompts: tuple[tuple[int, ...], ...]
    """Token ids. No tokenizer is involved and nothing is added, so a prompt that wants a
    beginning-of-text token holds one."""

    max_new_tokens: int
    """Length of the greedy continuation. An end-of-text token does not end it."""

    vocab_size: int
    """Rows of the model's unembedding, padding included."""

    dtype: str
    """One of DTYPES. vLLM: of weights and arithmetic. llama.cpp: of the K/V cache, since the
    weights' types are the file's own and it computes in float32."""

    adapter: Path | None = None
    """Served with the model. vLLM: the folder of a PEFT LoRA. llama.cpp: a GGUF file, which is a
    LoRA or a control vector."""

    unadapted: int = 0
    """How many of the prompts, from the first, are served without the adapter as well."""

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise UsageError("a runtime needs at least one prompt, and every prompt a token")
        for prompt in self.prompts:
            outside = [token for token in prompt if not 0 <= token < self.vocab_size]
            if outside:
                raise UsageError(
                    f"token {outside[0]} is outside the vocabulary of {self.vocab_size}"
                )
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}, and has to be at least 1")
        if self.unadapted and self.adapter is None:
            raise UsageError("a model without an adapter cannot be served without it")
        if not 0 <= self.unadapted <= len(self.prompts):
            raise UsageError(f"{self.unadapted} of {len(self.prompts)} prompts without the adapter")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}, and has to be one of {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True, eq=False)
class RuntimeResult:
    """What the runtime computed, in the order of the request's prompts."""

    name: str
    """The runtime's title."""

    version: str
    """The version of the package that served, as it states it."""

    prompt_logprobs: tuple[Float32[np.ndarray, "_ vocab"], ...]
    """Per prompt [tokens, vocab]: row t holds log p(next token | the first t + 1 tokens) in nats,
    so the last row is about the first generated token."""

    greedy: tuple[tuple[int, ...], ...]
    """Per prompt, the ids of max_new_tokens generated tokens."""

    environment: Mapping[str, str]
    """Versions and processor features that a report states beside the numbers."""

    unadapted: tuple[Float32[np.ndarray, "_ vocab"], ...] = ()
    """The first prompts without the adapter, as ``prompt_logprobs``: as many as were asked for."""
