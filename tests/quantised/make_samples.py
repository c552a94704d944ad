"""Write samples.safetensors anew: small random weights, stored and decoded by the libraries.

Run by a Python that has compressed-tensors 0.17.0 (vLLM's environment has it), and before it on
PYTHONPATH bitsandbytes 0.50.2 and the unpacked archives of auto_gptq 0.7.1 and autoawq 0.2.9, of
which single files are loaded: none of them installs beside the others. Every sample is a layer's
tensors, ``<sample>/<tensor>``, its values ``<sample>/=`` and, in the metadata, the block of its
configuration.

    PYTHONPATH=<folder of the libraries> <python> tests/quantised/make_samples.py
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
Sample = tuple[str, dict[str, Any], dict[str, Tensor], Tensor]
"""Name, block of the configuration, tensors of the layer ``layer``, values."""


def loaded(package: str, file: str) -> ModuleType:
    """Return one file of a package, without what the package imports at its top."""
    place = next(Path(p) / package for p in sys.path if (Path(p) / package).is_dir())
    spec = importlib.util.spec_from_file_location(Path(file).stem, place / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(rows: int, columns: int) -> Tensor:
    """Return a weight in float32 whose rows and columns differ in size."""
    return torch.randn(rows, columns) * torch.logspace(-1, 0.5, rows).unsqueeze(1)


# --- compressed-tensors -----------------------------------------------------------------------


def compressed() -> Iterator[Sample]:
    """Yield a sample of every scheme of compressed-tensors that bake reads."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    cases = {
        "fp8-tensor": ("float-quantized", dict(num_bits=8, type="float", strategy="tensor")),
        "fp8-channel": ("float-quantized", dict(num_bits=8, type="float", strategy="channel")),
        "fp8-block": (
            "float-quantized",
            dict(num_bits=8, type="float", strategy="block", block_structure=[8, 16]),
        ),
        "int8-channel": ("int-quantized", dict(num_bits=8, type="int", strategy="channel")),
        "w4": ("pack-quantized", dict(num_bits=4, type="int", strategy="group", group_size=16)),
        "w8": ("pack-quantized", dict(num_bits=8, type="int", strategy="group", group_size=16)),
        "w4-zeros": (
            "pack-quantized",
            dict(num_bits=4, type="int", strategy="group", group_size=16, symmetric=False),
        ),
        "w4-order": (
            "pack-quantized",
            dict(num_bits=4, type="int", strategy="group", group_size=16, actorder="group"),
        ),
        "nvfp4": (
            "nvfp4-pack-quantized",
            dict(num_bits=4, type="float", strategy="tensor_group", group_size=16),
        ),
    }
    for name, (form, said) in cases.items():
        args = QuantizationArgs(**said)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
        weight = weights(24, 64)
        made = parameters(weight, said)
        compressor = BaseCompressor.load_from_registry(form)
        stored = compressor.compress({"weight": weight, **made}, scheme)
        if name == "nvfp4":  # its own decompressor computes in bfloat16
            values = in_float32(stored, weight.shape)
        else:
            values = compressor.decompress(dict(stored), scheme)["weight"]
        config = {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": said}},
            "ignore": ["lm_head"],
        }
        yield name, config, dict(stored), values


def in_float32(stored: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """Return the values of an NVFP4 weight, by the functions that its decompressor calls."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    codes = unpack_fp4_from_uint8(stored["weight_packed"], *shape, dtype=torch.float32)
    scale, factor = stored["weight_scale"].float(), stored["weight_global_scale"]
    return dequantize(codes, scale, global_scale=factor, dtype=torch.float32)


def parameters(weight: Tensor, said: dict[str, Any]) -> dict[str, Tensor]:
    """Return scales, zeros and an order for a weight, as an observer would."""
    rows, columns = weight.shape
    top = (
        448.0
        if said["type"] == "float" and said["num_bits"] == 8
        else 2.0 ** (said["num_bits"] - 1) - 1
    )
    if said["strategy"] == "tensor":
        return {"weight_scale": (weight.abs().max() / top).reshape(1)}
    if said["strategy"] == "channel":
        return {"weight_scale": weight.abs().amax(1, keepdim=True) / top}
    if said["strategy"] == "block":
        height, width = said["block_structure"]
        parts = weight.reshape(rows // height, height, columns // width, width)
        return {"weight_scale": parts.abs().amax((1, 3)) / top}
    size = said["group_size"]
    order = torch.arange(columns) // size
    if said.get("actorder") == "group":
        order = order[torch.randperm(columns)]
    groups = torch.stack([weight[:, order == g] for g in range(columns // size)], dim=1)
    if said["strategy"] == "tensor_group":
        factor = (448.0 * 6.0) / weight.abs().max()
        scale = (groups.abs().amax(2) / 6.0 * factor).to(torch.float8_e4m3fn).to(torch.float32)
        return {"weight_scale": scale, "weight_global_scale": factor.reshape(1)}
    if said.get("symmetric", True):
        found = {"weight_scale": groups.abs().amax(2) / top}
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = (high - low) / 15
        zero = (-8 - low / scale).round().clamp(-8, 7).to(torch.int8)
        found = {"weight_scale": scale, "weight_zero_point": zero}
    return found | ({"weight_g_idx": order.to(torch.int32)} if "actorder" in said else {})


# --- GPTQ, AWQ, bitsandbytes --------------------------------------------------------------------


def gptq() -> Iterator[Sample]:
    """Yield what auto-gptq packs and multiplies with: in order, and in act-order."""
    layers = loaded("auto_gptq", "nn_modules/qlinear/qlinear_cuda.py")
    for name, bits, ordered in (("gptq", 4, True), ("gptq-order", 4, False), ("gptq8", 8, True)):
        rows, columns, size = 32, 64, 16
        weight = weights(rows, columns)
        layer = layers.QuantLinear(
            bits, size, columns, rows, bias=False, weight_dtype=torch.float32
        )
        order = torch.arange(columns) // size
        order = order if ordered else order[torch.randperm(columns)]
        groups = torch.stack([weight[:, order == g] for g in range(columns // size)], dim=1)
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).half().float()
        zero = (-low / scale).round()
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight
        layer.pack(linear, scale, zero, order.to(torch.int32))
        values = layer(torch.eye(columns)).T.contiguous()
        tensors = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
        config = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": not ordered}
        yield name, config, tensors, values


def awq() -> Iterator[Sample]:
    """Yield what autoawq unpacks, of codes packed as its layer packs them."""
    packing = loaded("awq", "utils/packing_utils.py")
    rows, columns, size = 16, 64, 32
    codes = torch.randint(0, 16, (columns, rows), dtype=torch.int32)
    zeros = torch.randint(0, 16, (columns // size, rows), dtype=torch.int32)
    packed = []
    for table in (codes, zeros):
        words = torch.zeros(table.shape[0], rows // 8, dtype=torch.int32)
        for field, column in enumerate(packing.AWQ_ORDER):
            words |= table[:, column::8] << (4 * field)
        packed.append(words)
    scales = (torch.rand(columns // size, rows) + 0.5).half()
    values = packing.dequantize_gemm(*packed, scales.float(), 4, size).T.contiguous()
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}
    yield "awq", config, {"qweight": packed[0], "qzeros": packed[1], "scales": scales}, values


def bitsandbytes() -> Iterator[Sample]:
    """Yield NF4 and FP4, with scales as they are and quantised again."""
    from bitsandbytes import functional

    for kind, twice in (("nf4", False), ("nf4", True), ("fp4", False)):
        weight = weights(24, 128)
        codes, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type=kind, compress_statistics=twice
        )
        tensors = {"weight": codes}
        tensors |= {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": twice,
        }
        name = f"bnb-{kind}" + ("-twice" if twice else "")
        yield name, config, tensors, functional.dequantize_4bit(codes, state)


MAKERS: tuple[Callable[[], Iterator[Sample]], ...] = (compressed, gptq, awq, bitsandbytes)


def main() -> None:
    torch.manual_seed(0)
    tensors, configs = {}, {}
    for make in MAKERS:
        for name, config, stored, values in make():
            configs[name] = json.dumps(config)
            tensors[f"{name}/="] = values.float().contiguous()
            for key, tensor in stored.items():
                tensors[f"{name}/{key}"] = tensor.detach().contiguous()
    save_file(tensors, HERE / "samples.safetensors", configs)
    print(f"{len(configs)} samples")


if __name__ == "__main__":
    main()
