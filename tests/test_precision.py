from decimal import Decimal, localcontext

import pytest
import torch
from tiny import FAMILIES, make_model, tokens
from tiny import tolerance as model_tolerance
from torch import Tensor

from bake.affine import EPSILON, tolerance
from bake.verify.precision import double_precision

# GPT-2 has LayerNorm, which torch computes in the input's dtype, and a softmax without a dtype.
NARROWING = tuple(family for family in FAMILIES if family != "gpt2")
NORMS = {
    "llama": "model.norm",
    "gemma": "model.norm",
    "gemma2": "model.layers.1.post_feedforward_layernorm",
    "gemma3": "model.layers.1.post_feedforward_layernorm",
    "phi3": "model.layers.0.input_layernorm",
    "olmo2": "model.layers.2.post_attention_layernorm",
    "mixtral": "model.layers.1.post_attention_layernorm",
}
CASTS = {
    "float": lambda x: x.float(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "to_dtype": lambda x: x.to(torch.float32),
    "to_keyword": lambda x: x.to(dtype=torch.float32),
    "to_device": lambda x: x.to("cpu", torch.float32),
    "to_like": lambda x: x.to(torch.zeros(1)),
    "type": lambda x: x.type(torch.float32),
    "type_name": lambda x: x.type("torch.FloatTensor"),
    "type_as": lambda x: x.type_as(torch.zeros(1)),
}
REDUCTIONS = {
    "softmax": lambda x: torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32),
    "softmax_positional": lambda x: torch.softmax(x, -1, torch.float32),
    "softmax_input": lambda x: torch.nn.functional.softmax(input=x, dim=-1, dtype=torch.float32),
    "log_softmax": lambda x: torch.nn.functional.log_softmax(x, dim=-1, dtype=torch.float32),
    "mean": lambda x: x.mean(-1, dtype=torch.float32),
    "cumsum": lambda x: x.cumsum(-1, dtype=torch.float32),
}


def second_difference(family: str) -> tuple[float, float]:
    """Return |f(e + δ) − 2 f(e) + f(e − δ)| and the tolerance for it, both relative to |f|.

    δ is 1e-7 of the embeddings: the curvature's part is δ² ≈ 1e-14 times the curvature, which is
    below the tolerance; a cast to float32 on the way rounds by 6e-8 and is far above it.
    """
    model = make_model(family)
    embeddings = model.get_input_embeddings()(tokens())
    step = 1e-7 * torch.randn(embeddings.shape, dtype=torch.float64)

    def logits(inputs: Tensor) -> Tensor:
        output: Tensor = model(inputs_embeds=inputs).logits
        return output

    middle = logits(embeddings)
    moved = logits(embeddings + step)
    difference = moved - 2 * middle + logits(embeddings - step)
    size = float(middle.abs().max())
    assert float((moved - middle).abs().max()) > 1e-9 * size  # the step has an effect
    return float(difference.abs().max()) / size, 4 * model_tolerance(model)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_is_smooth_below_float32(family: str) -> None:
    with double_precision():
        error, allowed = second_difference(family)
    assert error <= allowed < 1e-10


@pytest.mark.parametrize("family", NARROWING)
@torch.no_grad()
def test_without_the_context_float32_shows(family: str) -> None:
    assert second_difference(family)[0] > 1e-9


@torch.no_grad()
def test_gpt2_narrows_nothing() -> None:
    model = make_model("gpt2")
    outside = model(tokens()).logits
    with double_precision():
        assert torch.equal(model(tokens()).logits, outside)


@pytest.mark.parametrize("family", NORMS)
@torch.no_grad()
def test_rms_norm_is_that_of_fifty_digits(family: str) -> None:
    norm = make_model(family).get_submodule(NORMS[family])
    x = torch.randn(5, 24, dtype=torch.float64)
    expected = torch.stack([_rms_norm(row, norm) for row in x])
    allowed = tolerance(24) * expected.abs().max()
    with double_precision():
        assert (norm(x) - expected).abs().max() <= allowed
    assert (norm(x) - expected).abs().max() > 1e-9


def _rms_norm(row: Tensor, norm: torch.nn.Module) -> Tensor:
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    offset = 1 if type(norm).__name__.startswith("Gemma") else 0
    with localcontext(prec=50):
        values = [Decimal(value) for value in row.tolist()]
        mean = sum(value * value for value in values) / len(values)
        size = (mean + Decimal(eps)).sqrt()
        gains = [Decimal(gain) + offset for gain in norm.weight.tolist()]
        return torch.tensor(
            [float(value / size * gain) for value, gain in zip(values, gains, strict=True)],
            dtype=torch.float64,
        )


@pytest.mark.parametrize("family", [f for f in NARROWING if f != "gemma2"])
@torch.no_grad()
def test_two_attention_implementations_agree(family: str) -> None:
    model = make_model(family)
    results = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with double_precision():
            results[implementation, "inside"] = model(tokens()).logits
        results[implementation, "outside"] = model(tokens()).logits
    size = results["eager", "inside"].abs().max()
    inside, outside = (
        float((results["eager", where] - results["sdpa", where]).abs().max() / size)
        for where in ("inside", "outside")
    )
    assert inside <= model_tolerance(model)
    assert outside > 1e-9


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_cast_leaves_float64_as_it_is(cast) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    with double_precision():
        assert torch.equal(cast(x), x)
        assert cast(x).dtype is torch.float64
        assert cast(x.float().bfloat16()).dtype is torch.float64
    assert cast(x).dtype is not torch.float64


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS.keys())
def test_a_reduction_computes_in_float64(reduce) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    with double_precision():
        inside = reduce(x)
    outside = reduce(x)
    assert inside.dtype is torch.float64
    assert outside.dtype is torch.float32
    assert EPSILON < (inside - outside).abs().max() < 1e-5


def test_other_dtypes_are_untouched() -> None:
    whole, single, half = torch.arange(4), torch.randn(4), torch.randn(4).bfloat16()
    with double_precision():
        assert whole.float().dtype is torch.float32
        assert single.to(torch.float16).dtype is torch.float16
        assert single.double().dtype is torch.float64
        assert half.float().dtype is torch.float32
        assert torch.zeros(2, dtype=torch.float32).dtype is torch.float32
        assert single.double().to(torch.int64).dtype is torch.int64
        assert single.double().type() == "torch.DoubleTensor"
        assert single.double().view(torch.float32).shape == (8,)


@torch.no_grad()
def test_a_float32_model_evaluates_as_outside() -> None:
    model = make_model("gemma2", dtype=torch.float32)
    outside = model(tokens()).logits
    with double_precision():
        inside = model(tokens()).logits
    assert inside.dtype is torch.float32
    assert torch.equal(inside, outside)


def test_the_context_ends_with_an_error() -> None:
    x = torch.randn(3, dtype=torch.float64)
    with pytest.raises(ZeroDivisionError), double_precision():
        raise ZeroDivisionError
    assert x.float().dtype is torch.float32


def test_a_layer_that_stays_in_float32_gets_what_it_can_take() -> None:
    """A class may keep a router in float32, and would have cast its input to it."""
    layer = torch.nn.Linear(3, 2, dtype=torch.float32)
    x = torch.randn(4, 3, dtype=torch.float64)
    with double_precision(), torch.no_grad():
        found = layer(x.float())
    assert found.dtype == torch.float64
    exact = x @ layer.weight.double().T + layer.bias.double()
    assert torch.equal(found, exact.detach())
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)
