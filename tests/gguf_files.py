"""Small GGUF files of tiny checkpoints, by gguf-py's names and a second account of the layout.

bake's own tables and writer have no part in this.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import tiny
import torch
from torch import Tensor

Array = npt.NDArray[Any]
ARCH = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MixtralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "GemmaForCausalLM": gguf.MODEL_ARCH.GEMMA,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
    "Phi3ForCausalLM": gguf.MODEL_ARCH.PHI3,
    "GPT2LMHeadModel": gguf.MODEL_ARCH.GPT2,
    "GPTNeoXForCausalLM": gguf.MODEL_ARCH.GPTNEOX,
    "Olmo2ForCausalLM": gguf.MODEL_ARCH.OLMO2,
}


def converted(path: Path) -> tuple[str, dict[str, Array]]:
    """Return the architecture and every tensor, in float64, as llama.cpp's converter lays it out.

    Mirrors llama.cpp's conversion/{llama,gemma,gpt2,gptneox}.py: modify_tensors.
    """
    config = tiny.config_of(path)
    (name,) = config["architectures"]
    arch = ARCH[name]
    heads = config.get("num_attention_heads") or config["n_head"]
    grouped = config.get("num_key_value_heads") or heads
    layers = config.get("num_hidden_layers") or config["n_layer"]
    names = gguf.get_tensor_name_map(arch, layers)
    found: dict[str, Array] = {}
    stacks: dict[str, dict[int, Array]] = {}
    for key, tensor in tiny.tensors_of(path).items():
        value = tensor.to(torch.float64).numpy()
        if arch is gguf.MODEL_ARCH.LLAMA and "q_proj" in key:
            value = interleaved(value, heads)
        if arch is gguf.MODEL_ARCH.LLAMA and "k_proj" in key:
            value = interleaved(value, grouped)
        if name.startswith("Gemma") and "norm" in key:
            value = value + 1
        if arch is gguf.MODEL_ARCH.GPT2 and re.search(r"c_(attn|proj|fc)\.weight$", key):
            value = value.T
        if "query_key_value" in key:
            split = value.reshape(heads, 3, -1, *value.shape[1:])
            value = np.concatenate([split[:, i].reshape(-1, *value.shape[1:]) for i in range(3)])
        if expert := re.fullmatch(
            r"model\.(.*)block_sparse_moe\.experts\.(\d+)\.(w\d\.weight)", key
        ):
            stacked = f"{expert[1]}feed_forward.experts.{expert[3]}"
            stacks.setdefault(stacked, {})[int(expert[2])] = value
            continue
        found[named(names, key)] = value
    for key, experts in stacks.items():
        found[named(names, key)] = np.stack([experts[i] for i in range(len(experts))])
    return gguf.MODEL_ARCH_NAMES[arch], found


def named(names: gguf.TensorNameMap, key: str) -> str:
    name = names.get_name(key, try_suffixes=(".weight", ".bias"))
    assert name is not None, key
    return name


def interleaved(value: Array, heads: int) -> Array:
    """Return ``LlamaModel.permute``."""
    split = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return split.swapaxes(1, 2).reshape(value.shape)


def write(
    path: Path,
    checkpoint: Path,
    kind: str = "F32",
    *,
    kinds: Mapping[str, str] | None = None,
    extra: Mapping[str, Array] | None = None,
    drop: tuple[str, ...] = (),
    arch: str | None = None,
    raw: Mapping[str, Array] | None = None,
    **options: Any,
) -> Path:
    """Write a checkpoint as GGUF: matrices in ``kind``, vectors in float32.

    Args:
        path: the file; a split model's names are made from it.
        checkpoint: the folder.
        kind: a type that gguf-py encodes.
        kinds: other types, by tensor.
        extra: further tensors.
        drop: tensors to leave out.
        arch: another architecture than the checkpoint's.
        raw: bytes of tensors that gguf-py cannot encode itself.
        options: of ``GGUFWriter``: how to split.
    """
    known, tensors = converted(checkpoint)
    writer = gguf.GGUFWriter(path, arch or known, **options)
    writer.add_name("tiny")
    writer.add_file_type(7)
    writer.add_uint32(f"{known}.block_count", 3)
    writer.add_float32(f"{known}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "é", "\x00", "c" * 300])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0, 0.0])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3, 4])
    writer.add_chat_template("{% for m in messages %}{{ m }}{% endfor %}")
    for name, value in {**tensors, **(extra or {})}.items():
        if name in drop:
            continue
        chosen = "F32" if value.ndim == 1 else (kinds or {}).get(name, kind)
        number = gguf.GGMLQuantizationType[chosen]
        data = (raw or {}).get(name)
        if data is None:
            data = gguf.quants.quantize(np.ascontiguousarray(value, dtype=np.float32), number)
        writer.add_tensor(name, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a file in float64, read by gguf-py."""
    return {
        tensor.name: torch.from_numpy(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return type and bytes of every tensor of a file, in order, read by gguf-py."""
    return {
        tensor.name: (tensor.tensor_type.name, tensor.data.tobytes())
        for tensor in gguf.GGUFReader(path).tensors
    }


def metadata(path: Path) -> dict[str, Any]:
    """Return every key with its type and value, read by gguf-py."""
    return {
        name: ([kind.name for kind in field.types], field.contents())
        for name, field in gguf.GGUFReader(path).fields.items()
        if not name.startswith("GGUF.")
    }
