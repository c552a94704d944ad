"""A tiny checkpoint quantised: its linear layers as codes, as the formats' own tools lay them out.

The layout of every format is held against its library in ``test_quantised.py``; here each weight is
given the scale of its largest values and the nearest codes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bake.checkpoints.quantised.levels import e2m1
from bake.checkpoints.quantised.packing import to_bytes, to_words

_LINEAR = "proj.weight"
Made = tuple[dict[str, Any], Callable[[str, Tensor], dict[str, Tensor]]]
"""The block of the configuration, and what a weight becomes."""


def _blocks(weight: Tensor, height: int, width: int) -> Tensor:
    """Return the largest size in every block, for every value."""
    rows, columns = weight.shape
    more = torch.nn.functional.pad(weight.abs(), (0, -columns % width, 0, -rows % height))
    parts = more.reshape(-1, height, more.shape[1] // width, width)
    return parts.amax((1, 3))


def _each(table: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    wide = table.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return wide[: weight.shape[0], : weight.shape[1]]


def block_fp8(size: int = 16) -> Made:
    def made(name: str, weight: Tensor) -> dict[str, Tensor]:
        scale = _blocks(weight, size, size) / 448
        codes = (weight / _each(scale, weight, size, size)).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale_inv": scale}

    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [size, size],
    }
    return config, made


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def channel_fp8() -> Made:
    def made(name: str, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 448
        return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}

    config = _compressed("float-quantized", num_bits=8, type="float", strategy="channel")
    group = config["config_groups"]["group_0"]
    group["input_activations"] = {
        "num_bits": 8,
        "type": "float",
        "strategy": "token",
        "dynamic": True,
        "symmetric": True,
    }
    return config, made


def w4(size: int = 8) -> Made:
    def made(name: str, weight: Tensor) -> dict[str, Tensor]:
        scale = _blocks(weight, 1, size) / 7
        codes = (weight / _each(scale, weight, 1, size)).round().clamp(-8, 7) + 8
        return {
            f"{name}_packed": to_words(codes.to(torch.uint8), 4),
            f"{name}_scale": scale,
            f"{name}_shape": torch.tensor(weight.shape),
        }

    return _compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=size
    ), made


def nvfp4() -> Made:
    def made(name: str, weight: Tensor) -> dict[str, Tensor]:
        factor = 448 * 6 / weight.abs().max()
        scale = (_blocks(weight, 1, 16) * factor / 6).to(torch.float8_e4m3fn)
        steps = _each(scale.float() / factor, weight, 1, 16).clamp(min=1e-9)
        levels = e2m1()
        codes = levels.code[levels.nearest((weight / steps).double()).long()]
        return {
            f"{name}_packed": to_bytes(codes),
            f"{name}_scale": scale,
            f"{name}_global_scale": factor.reshape(1),
        }

    return _compressed(
        "nvfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
    ), made


def gptq(size: int = 8) -> Made:
    """In act-order: inputs of one group lie apart."""

    def made(name: str, weight: Tensor) -> dict[str, Tensor]:
        order = torch.arange(weight.shape[1]) % (weight.shape[1] // size)
        groups = torch.stack([weight[:, order == g] for g in range(int(order.max()) + 1)])
        scale = (groups.abs().amax(2) / 7).half()
        codes = (weight / scale.float()[order].T).round().clamp(-8, 7) + 8
        zeros = torch.full((weight.shape[0], scale.shape[0]), 7, dtype=torch.uint8)
        module = name.removesuffix(".weight")
        return {
            f"{module}.qweight": to_words(codes.to(torch.uint8), 4).T.contiguous(),
            f"{module}.qzeros": to_words(zeros.T.contiguous(), 4),
            f"{module}.scales": scale,
            f"{module}.g_idx": order.to(torch.int32),
        }

    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": size,
        "desc_act": True,
        "sym": True,
    }, made


def awq() -> Made:
    """With zeros of all kinds, each a whole number of steps below the largest value."""

    def made(name: str, weight: Tensor) -> dict[str, Tensor]:
        groups = weight.reshape(weight.shape[0], -1, 8)
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = ((high - low) / 15).half().float()
        zero = (-low / scale).round().clamp(0, 15)
        codes = (groups / scale.unsqueeze(2)).round() + zero.unsqueeze(2)
        codes = codes.clamp(0, 15).reshape(weight.shape).T.to(torch.uint8)
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        words = [
            to_words(table.reshape(len(table), -1, 8)[:, :, order].flatten(1).contiguous(), 4)
            for table in (codes, zero.T.to(torch.uint8))
        ]
        module = name.removesuffix(".weight")
        return {
            f"{module}.qweight": words[0],
            f"{module}.qzeros": words[1],
            f"{module}.scales": scale.T.half(),
        }

    return {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}, made


def nf4() -> Made:
    """With a table of sixteen even numbers: the format brings its own."""

    def made(name: str, weight: Tensor) -> dict[str, Tensor]:
        table = torch.linspace(-1, 1, 16)
        largest = _blocks(weight, 1, 16)
        ideal = weight / _each(largest, weight, 1, 16)
        codes = ((ideal + 1) * 7.5).round().to(torch.uint8)
        swapped = codes.reshape(-1, 2).flip(1)
        state = {"quant_type": "nf4", "blocksize": 16, "shape": list(weight.shape)}
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return {
            name: to_bytes(swapped).reshape(-1, 1),
            f"{name}.absmax": largest.reshape(-1),
            f"{name}.quant_map": table,
            f"{name}.quant_state.bitsandbytes__nf4": text,
        }

    return {"quant_method": "bitsandbytes", "load_in_4bit": True}, made


FORMATS: dict[str, Callable[..., Made]] = {
    "block FP8": block_fp8,
    "FP8 by channel": channel_fp8,
    "W4A16": w4,
    "NVFP4": nvfp4,
    "GPTQ of 4 bits": gptq,
    "AWQ": awq,
    "bitsandbytes NF4": nf4,
}


def quantise(
    source: Path, target: Path, name: str, *, alone: tuple[str, ...] = (), **options: int
) -> Path:
    """Write a checkpoint whose linear layers are codes of a format, but for those named."""
    config, made = FORMATS[name](**options)
    target.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        coded = key.endswith(_LINEAR) and key not in alone
        tensors |= made(key, tensor.float()) if coded else {key: tensor}
    save_file({k: t.contiguous() for k, t in tensors.items()}, target / "model.safetensors")
    text = json.loads((source / "config.json").read_text()) | {"quantization_config": config}
    (target / "config.json").write_text(json.dumps(text, indent=2))
    return target
