"""Quantised weights: decoded as their libraries do, written back in their format."""

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bake.checkpoints import Checkpoint, open_checkpoint
from bake.checkpoints.planned import PlannedTensor
from bake.checkpoints.quantised.coded import Coded, not_less, powers_of_two
from bake.checkpoints.quantised.levels import e2m1, float8, integers
from bake.checkpoints.quantised.packing import from_bytes, from_words, to_bytes, to_words
from bake.checkpoints.quantised.rounding import Recoded
from bake.checkpoints.quantised.view import decoded
from bake.errors import CheckpointError, InputError
from bake.rounding import Feedback
from bake.verify.stored.scales import needless

SAMPLES = Path(__file__).parent / "quantised" / "samples.safetensors"
NAMES = (
    *("fp8-tensor", "fp8-channel", "fp8-block", "int8-channel", "nvfp4"),
    *("w4", "w8", "w4-zeros", "w4-order", "gptq", "gptq-order", "gptq8", "awq"),
    *("bnb-nf4", "bnb-nf4-twice", "bnb-fp4"),
)
TURNED = ("turned-w4", "turned-int8-channel", "turned-gptq-order")
OURS = (
    *("fine-fp8", "fine-short", "fine-ue8m0", "mxfp4", "modelopt-fp8", "modelopt-nvfp4"),
    *TURNED,
)
"""Those whose oracle is here: transformers, or a formula."""
WEIGHT = "layer.weight"


@cache
def sample(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Return the block of the configuration, the tensors and the values of a sample."""
    if name in OURS:
        return MADE[name]()
    with safe_open(SAMPLES, "pt") as file:
        config = json.loads(file.metadata()[name])
        keys = [key for key in file.keys() if key.startswith(f"{name}/")]
        found = {f"layer.{key.partition('/')[2]}": file.get_tensor(key) for key in keys}
    values = found.pop("layer.=")
    return config, found, values.to(torch.float64)


def folder(path: Path, config: dict[str, Any] | None, tensors: dict[str, Tensor]) -> Checkpoint:
    """Return a checkpoint of some tensors, as its files have it."""
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    settings = {} if config is None else {"quantization_config": config}
    (path / "config.json").write_text(json.dumps({"dtype": "float32", **settings}))
    return open_checkpoint(path)


def coded(path: Path, name: str) -> Coded:
    (found,) = decoded(folder(path, *sample(name)[:2])).coded.values()
    return found


# --- oracles that are installed here ------------------------------------------------------------


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator())


def _changed(
    name: str, part: str, tensor: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a sample with one of its tensors stored otherwise."""
    config, tensors, _ = sample(name)
    return config, {**tensors, f"layer.{part}": tensor(tensors[f"layer.{part}"])}


def _added(name: str, part: str, tensor: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, tensors, _ = sample(name)
    return config, {**tensors, f"layer.{part}": tensor}


def mx_compressed(scale: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """MXFP4 of compressed-tensors, whose exponents are of some type."""
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    exponents = torch.full((4, 2), 2).to(scale)
    packed = torch.zeros(4, 32, dtype=torch.uint8)
    return config, {"layer.weight_packed": packed, "layer.weight_scale": exponents}


def _fine(rows: int, columns: int, **more: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    codes = (random(rows, columns) * 100).to(torch.float8_e4m3fn)
    blocks = -(-rows // 16), -(-columns // 8)
    scale = torch.rand(*blocks, generator=generator()) + 0.01
    config = {"quant_method": "fp8", "weight_block_size": [16, 8], **more}
    return config, {WEIGHT: codes, f"{WEIGHT}_scale_inv": scale}


def _transformers(tensors: dict[str, Tensor]) -> Tensor:
    """Return what transformers decodes."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(*tensors.values(), output_dtype=torch.float32)


def fine_fp8() -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    config, tensors = _fine(32, 24)
    return config, tensors, _transformers(tensors).to(torch.float64)


def fine_ue8m0() -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    config, tensors = _fine(32, 24, scale_fmt="ue8m0")
    tensors[f"{WEIGHT}_scale_inv"] = tensors[f"{WEIGHT}_scale_inv"].to(torch.float8_e8m0fnu)
    return config, tensors, _transformers(tensors).to(torch.float64)


def fine_short() -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """The last blocks are short, as those of DeepSeek's kv_a_proj_with_mqa (576 = 4½ × 128).

    DeepSeek's kernel (inference/kernel.py: weight_dequant) multiplies by the scale of
    (row // size, column // size); transformers reads no such checkpoint.
    """
    config, tensors = _fine(40, 20)
    codes, scale = tensors.values()
    wide = scale.repeat_interleave(16, 0)[:40].repeat_interleave(8, 1)[:, :20]
    return config, tensors, codes.to(torch.float64) * wide.to(torch.float64)


def mxfp4() -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8, generator=generator())
    scales = torch.randint(120, 130, (3, 8, 2), dtype=torch.uint8, generator=generator())
    values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert values.shape == (3, 64, 8)  # [experts, in, out]
    tensors = {f"{WEIGHT}_blocks": blocks, f"{WEIGHT}_scales": scales}
    return {"quant_method": "mxfp4"}, tensors, values.to(torch.float64)


def modelopt_fp8() -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """vLLM's ModelOptFp8LinearMethod: weight × weight_scale."""
    codes, scale = (random(8, 16) * 150).to(torch.float8_e4m3fn), torch.tensor(0.37)
    tensors = {WEIGHT: codes, f"{WEIGHT}_scale": scale, "layer.input_scale": torch.tensor(2.0)}
    values = codes.to(torch.float64) * scale.to(torch.float64)
    return {"quant_method": "modelopt", "quant_algo": "FP8"}, tensors, values


def modelopt_nvfp4() -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """The sample of compressed-tensors, whose number of the whole weight divides."""
    _, stored, values = sample("nvfp4")
    factor = stored["layer.weight_global_scale"]
    tensors = {
        WEIGHT: stored["layer.weight_packed"],
        f"{WEIGHT}_scale": stored["layer.weight_scale"],
        f"{WEIGHT}_scale_2": 1 / factor,
    }
    return {"quant_method": "modelopt", "quant_algo": "NVFP4"}, tensors, values


def turned(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """A sample of which every second output has scales below 0, as AutoRound's symmetric ones."""
    config, tensors, values = sample(name.removeprefix("turned-"))
    key = next(key for key in tensors if key.endswith(("weight_scale", "scales")))
    sign = 1.0 - 2 * (torch.arange(values.shape[0]) % 2)
    along = sign if key.endswith("scales") else sign.unsqueeze(1)
    scale = (tensors[key] * along).to(tensors[key].dtype)
    return config, {**tensors, key: scale}, values * sign.unsqueeze(1)


MADE: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Tensor], Tensor]]] = {
    "fine-fp8": fine_fp8,
    "fine-short": fine_short,
    "fine-ue8m0": fine_ue8m0,
    "mxfp4": mxfp4,
    "modelopt-fp8": modelopt_fp8,
    "modelopt-nvfp4": modelopt_nvfp4,
    **{name: partial(turned, name) for name in TURNED},
}
EVERY = (*NAMES, *OURS)


def test_every_sample_is_named_here() -> None:
    with safe_open(SAMPLES, "pt") as file:
        assert set(file.metadata()) == set(NAMES)


@pytest.mark.parametrize("name", EVERY)
def test_values_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    """Within what a product in float32 rounds by; those of other codes are not."""
    config, tensors, want = sample(name)
    view = decoded(folder(tmp_path, config, tensors))
    (weight,) = view.coded.values()
    have = view.read(weight.name)
    assert have.dtype == torch.float64 and have.shape == want.shape == weight.shape
    close = 2.0**-22 * want.abs() + 1e-12
    assert bool(((have - want).abs() <= close).all())
    assert torch.equal(view.read_part(weight.name, 1, 3), have[1:3])
    rows = have.reshape(-1, have.shape[-1])
    assert torch.equal(weight.values(2, 5), rows[2:5])
    name = weight.codes.name
    turned = tensors[name].view(torch.uint8).flip(0).view(tensors[name].dtype).contiguous()
    other = decoded(folder(tmp_path, config, {**tensors, name: turned})).read(weight.name)
    assert not torch.allclose(other, want, rtol=1e-2)


# --- written back -------------------------------------------------------------------------------


def tiles_of(values: Tensor) -> Callable[[], Iterator[Tensor]]:
    rows = values.reshape(-1, values.shape[-1])
    return lambda: iter(rows.split(7))


def written(weight: Coded, values: Tensor, feedback: Feedback | None = None) -> dict[str, Tensor]:
    """Return the tensors that hold a weight's values in its format."""
    recoded = Recoded(weight, tiles_of(values))
    codes = torch.cat(list(weight.codes.stored(recoded.codes(lambda start: feedback))))
    return {weight.codes.name: codes, **recoded.stored_scales()}


def read_back(path: Path, name: str, changed: dict[str, Tensor]) -> Tensor:
    config, tensors, _ = sample(name)
    view = decoded(folder(path, config, {**tensors, **changed}))
    return view.read(next(iter(view.coded)))


def same_bytes(a: Tensor, b: Tensor) -> bool:
    flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@pytest.mark.parametrize("name", EVERY)
def test_values_that_do_not_change_keep_their_bytes(name: str, tmp_path: Path) -> None:
    weight, tensors = coded(tmp_path, name), sample(name)[1]
    rows = weight.values(0, weight.matrix[0])
    made = written(weight, rows)
    assert made.keys() == {weight.codes.name, *weight.scales.names}
    for key, tensor in made.items():
        assert same_bytes(tensor, tensors[key]), key
    rows[0] = -rows[0]
    assert not same_bytes(written(weight, rows)[weight.codes.name], tensors[weight.codes.name])


@pytest.mark.parametrize("name", EVERY)
def test_a_change_is_one_of_two_neighbours_and_feedback_keeps_what_is_removed(
    name: str, tmp_path: Path
) -> None:
    weight = coded(tmp_path / "base", name)
    base = weight.values(0, weight.matrix[0])
    along = torch.linalg.qr(random(weight.matrix[0], 1).double())[0].T
    share = 0.01 if name == "bnb-nf4-twice" else 0.1  # of which no block outgrows its scale
    exact = base - share * along.T @ (along @ base)
    nearest = read_back(tmp_path, name, written(weight, exact)).reshape(exact.shape)
    guarded = Feedback(along, 0)
    fed = read_back(tmp_path, name, written(weight, exact, guarded)).reshape(exact.shape)
    config, tensors, _ = sample(name)
    after = decoded(folder(tmp_path / "after", config, {**tensors, **written(weight, exact)}))
    steps = next(iter(after.coded.values())).steps(0, exact.shape[0], exact)
    for found, most in ((nearest, 0.5), (fed, 1.0)):
        assert bool(((found - exact).abs() <= steps * most + 1e-9).all())
    sees = [float((along @ (found - exact)).norm()) for found in (nearest, fed)]
    assert sees[1] < 0.5 * sees[0]


@pytest.mark.parametrize("name", EVERY)
def test_a_block_that_outgrows_its_scale_gets_another(name: str, tmp_path: Path) -> None:
    """Three times as large a row is out of reach; where no other scale can be, it is refused."""
    weight = coded(tmp_path / "base", name)
    exact = weight.values(0, weight.matrix[0])
    single = weight.scales.read().scale.numel() == 1
    exact[2] *= 3 * float(exact.abs().max() / exact[2].abs().max()) if single else 3
    if name == "bnb-nf4-twice":
        with pytest.raises(InputError, match="does not fit bitsandbytes NF4"):
            written(weight, exact)
        return
    made = written(weight, exact)
    have = read_back(tmp_path, name, made).reshape(exact.shape)
    after = decoded(folder(tmp_path / "a", sample(name)[0], {**sample(name)[1], **made}))
    (grown,) = after.coded.values()
    assert bool(
        ((have - exact).abs() <= grown.steps(0, *exact.shape[:1], exact) * 0.5 + 1e-9).all()
    )
    before, table = weight.scales.read(), grown.scales.read()
    assert torch.equal(table.scale.sign(), before.scale.sign())
    assert bool((table.scale.abs() >= before.scale.abs()).all()) and not torch.equal(
        table.scale, before.scale
    )
    planned = PlannedTensor(WEIGHT, "F32", tuple(exact.shape), lambda: iter(exact.split(7)))
    assert not needless(weight, grown, planned)
    # The base's values need no such scale.
    unmoved = weight.values(0, weight.matrix[0])
    small = PlannedTensor(WEIGHT, "F32", tuple(exact.shape), lambda: iter(unmoved.split(7)))
    assert needless(weight, grown, small)
    # The base's scales would clip: the control of the bound above.
    clipped = read_back(tmp_path, name, {weight.codes.name: made[weight.codes.name]})
    assert float((clipped.reshape(exact.shape)[2] - exact[2]).abs().max()) > float(
        (have[2] - exact[2]).abs().max()
    )


# --- the parts ----------------------------------------------------------------------------------


def test_levels_are_the_finite_values_of_their_codes() -> None:
    assert float8(torch.float8_e4m3fn).values.shape == (253,)  # 256 less two NaN and one zero
    assert float(float8(torch.float8_e4m3fn).high) == 448 + 16
    assert e2m1().values.tolist()[-4:] == [2, 3, 4, 6] and e2m1().values.shape == (15,)
    assert int(e2m1().code[7]) == 0  # +0 and not −0
    assert float8(torch.float8_e4m3fn).placed(torch.tensor([0x7F], dtype=torch.uint8)) == -1
    assert integers(4, -8).low == -8.5


def test_packing_is_its_own_inverse() -> None:
    codes = torch.randint(0, 16, (5, 22), dtype=torch.uint8, generator=generator())
    assert torch.equal(from_words(to_words(codes, 4), 4, 22), codes)
    assert torch.equal(from_bytes(to_bytes(codes)), codes)
    assert to_words(codes[:, :8], 4)[0, 0] & 15 == codes[0, 0]


def test_scales_are_rounded_up() -> None:
    values = torch.tensor([0.0, 0.3, 1.0, 447.0, 449.0], dtype=torch.float64)
    held = not_less(values, torch.float8_e4m3fn)
    assert held.tolist() == [0.0, 0.3125, 1.0, 448.0, torch.inf]
    assert bool((not_less(values, torch.bfloat16) >= values).all())
    assert powers_of_two(values[:4]).tolist() == [0.0, 0.5, 1.0, 512.0]


# --- refusals -----------------------------------------------------------------------------------


def without(name: str, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, tensors, _ = sample(name)
    return config, {k: v for k, v in tensors.items() if k != key}


REFUSED = {
    "no format of bake's": (
        lambda: ({"quant_method": "aqlm"}, sample("w4")[1]),
        "quantised by 'aqlm', which bake does not read",
    ),
    "nothing is said": (lambda: (None, sample("fine-fp8")[1]), "config.json says nothing of it"),
    "codes of another format": (
        lambda: ({"quant_method": "gptq", "bits": 4}, sample("w4")[1]),
        "no tensor is",
    ),
    "no scale": (lambda: without("fine-fp8", f"{WEIGHT}_scale_inv"), "has no scale"),
    "another block": (
        lambda: ({**sample("fine-fp8")[0], "weight_block_size": [8, 8]}, sample("fine-fp8")[1]),
        "has 12 blocks of 8 × 8",
    ),
    "another group": (
        lambda: ({**sample("awq")[0], "group_size": 16}, sample("awq")[1]),
        "no scales for groups of 16",
    ),
    "three bits": (
        lambda: ({**sample("gptq")[0], "bits": 3}, sample("gptq")[1]),
        "quantised by GPTQ to 3 bits",
    ),
    "to be ignored": (
        lambda: ({**sample("w4")[0], "ignore": ["re:.*layer"]}, sample("w4")[1]),
        "is to be ignored, and is quantised",
    ),
    "no zeros": (lambda: without("w4-zeros", "layer.weight_zero_point"), "no weight_zero_point"),
    "zeros that are not in words": (
        lambda: _changed("w4-zeros", "weight_zero_point", lambda zero: zero.to(torch.int8)),
        "has zeros I8",
    ),
    "zeros of other rows": (
        lambda: _changed("w4-zeros", "weight_zero_point", lambda zero: zero.repeat(2, 1)),
        "which are no words",
    ),
    "bytes in an order": (
        lambda: _added("int8-channel", "weight_g_idx", torch.zeros(4, dtype=torch.int32)),
        "bytes in an order of groups",
    ),
    "zeros of symmetric bytes": (
        lambda: _added("int8-channel", "weight_zero_point", torch.ones(4, 1, dtype=torch.int8)),
        "has zeros other than 0",
    ),
    "codes of NF4 in another type": (
        lambda: _changed("bnb-nf4", "weight", lambda t: t.reshape(-1, 2).view(torch.bfloat16)),
        "has its codes in BF16 (bnb_4bit_quant_storage)",
    ),
    "powers that are no exponents": (
        lambda: mx_compressed(torch.float8_e8m0fnu),
        "exponents stored as F8_E8M0",
    ),
    "FP8 scales of 32 columns": (
        lambda: mx_compressed(torch.float8_e4m3fn),
        "exponents stored as F8_E4M3",
    ),
    "another layout of GPTQ": (
        lambda: ({**sample("gptq")[0], "checkpoint_format": "bitblas"}, sample("gptq")[1]),
        "in the layout 'bitblas'",
    ),
    "no state": (
        lambda: without("bnb-nf4", "layer.weight.quant_map"),
        "lacks a part of its state",
    ),
    "eight bits": (
        lambda: ({"quant_method": "bitsandbytes", "load_in_8bit": True}, sample("bnb-nf4")[1]),
        "by bitsandbytes to eight bits",
    ),
    "one that is left": (
        lambda: (
            sample("fine-fp8")[0],
            {**sample("fine-fp8")[1], "other.qweight": torch.zeros(2, 2, dtype=torch.int32)},
        ),
        "other.qweight (I32) is a part of a quantised weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, words = REFUSED[case]
    with pytest.raises(CheckpointError) as error:
        decoded(folder(tmp_path, *make()))
    said = " ".join(str(p) for p in (error.value.what, error.value.fix))
    assert words in said
    assert "unquantised" in said or "fetch config.json" in said


def test_exponents_in_bytes_are_read(tmp_path: Path) -> None:
    """The control of those that are refused."""
    assert "layer.weight" in decoded(folder(tmp_path, *mx_compressed(torch.uint8))).coded


@pytest.mark.parametrize(
    ("targets", "refused"),
    [(["re:.*er"], False), (["re:lay.*"], False), (["layer"], True), (["re:x"], False)],
)
def test_a_name_comes_before_an_expression_and_both_before_a_class(
    targets: list[str], refused: bool, tmp_path: Path
) -> None:
    """The other group, of INT8, comes first: it is taken where the weight's own names it less."""
    config, tensors, _ = sample("w4")
    (own,) = config["config_groups"].values()
    other = {"targets": targets, "weights": {**own["weights"], "num_bits": 8}}
    mine = ["Linear"] if targets == ["re:x"] else ["layer"]
    groups = {"a": other, "b": {**own, "targets": mine}}
    checkpoint = folder(tmp_path, {**config, "config_groups": groups}, tensors)
    if refused:
        with pytest.raises(CheckpointError, match="the tensors disagree"):
            decoded(checkpoint)
    else:
        assert WEIGHT in decoded(checkpoint).coded


def test_a_code_that_is_no_number_is_refused(tmp_path: Path) -> None:
    config, tensors, _ = sample("fine-fp8")
    broken = tensors[WEIGHT].view(torch.uint8).clone()
    broken[3, 4] = 0x7F
    view = decoded(folder(tmp_path, config, {**tensors, WEIGHT: broken.view(torch.float8_e4m3fn)}))
    assert view.read_rows(WEIGHT, 0, 3).isfinite().all()
    with pytest.raises(CheckpointError, match="a code or a scale that is no number"):
        view.read_rows(WEIGHT, 3, 4)


def test_the_digest_is_over_all_parts(tmp_path: Path) -> None:
    config, tensors, _ = sample("w4")
    views = [decoded(folder(tmp_path, config, tensors))]
    assert views[0].digest() == views[0].as_stored.digest()
    for key in ("layer.weight_packed", "layer.weight_scale"):
        other = {**tensors, key: tensors[key].flip(0).contiguous()}
        views.append(decoded(folder(tmp_path / key, config, other)))
    assert len({view.tensor_digest(WEIGHT) for view in views}) == 3


def test_nothing_changes_of_a_checkpoint_in_floating_point(tmp_path: Path) -> None:
    mask = torch.ones(1, 1, 4, 4, dtype=torch.uint8)  # as GPT-NeoX keeps one
    plain = folder(tmp_path, None, {WEIGHT: random(3, 4), "attention.bias": mask})
    assert decoded(plain) is plain
    assert load_file(tmp_path / "model.safetensors").keys() == plain.tensors.keys()
