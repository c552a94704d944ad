"""Load adapters as a user does, with PEFT on a live base model, and read their files."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
import torch
from harness import Base
from safetensors.torch import load_file, save_file
from torch import Tensor

from bake.verify.precision import double_precision

NO_BIAS = {"attention_bias": False, "mlp_bias": False}


@contextmanager
def peft_warnings() -> Iterator[None]:
    """Let through what PEFT says of adapters that are as they are meant to be."""
    with warnings.catch_warnings():
        # transformers renames a property that PEFT still reads.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        # The adapter is for the embedding alone: the tied head keeps the base's rows on purpose.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        # PEFT's own patterns for fused experts, matched against modules instead of parameters.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match")
        yield


def peft_model(base: Path, adapter: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Return the base with the adapter, every tensor of the adapter in its place."""
    return with_adapter(tiny.load(base, dtype), adapter)


def with_adapter(model: Any, adapter: Path) -> Any:
    """Return a live model with the adapter, every tensor of the adapter in its place."""
    from peft import PeftModel

    with peft_warnings():
        return PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)


def peft_logits(base: Base, adapter: Path, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the logits of the standard tokens from the base with the adapter."""
    return logits_of(peft_model(base.path, adapter, dtype))


def logits_of(model: Any) -> Tensor:
    """Return the logits of the standard tokens; float64 models compute in float64 throughout."""
    wide = next(model.parameters()).dtype == torch.float64
    with torch.no_grad():
        if not wide:
            result: Tensor = model(tiny.tokens(), use_cache=False).logits
            return result
        with double_precision():
            result = model(tiny.tokens(), use_cache=False).logits
            return result


def config_of(adapter: Path) -> dict[str, Any]:
    """Return an adapter's adapter_config.json."""
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return config


def factors_of(adapter: Path) -> dict[str, Tensor]:
    """Return an adapter's tensors."""
    return load_file(adapter / "adapter_model.safetensors")


def rewritten(adapter: Path, out: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """Write an adapter like another, with other tensors and some config keys changed."""
    out.mkdir()
    text = json.dumps({**config_of(adapter), **changes})
    (out / "adapter_config.json").write_text(text)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out
