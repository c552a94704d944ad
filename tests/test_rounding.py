"""Rounding to the storage dtype: to the nearest value, and never in silence past its range."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bake.errors import InputError
from bake.rounding import Feedback, to_storage

NARROW = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*NARROW, torch.float64)
# torch narrows float64 by way of float32, which may put a value that lies within float32's
# rounding of a midpoint on either side of it.
NEAREST = 0.5 + 2.0**-13
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbouring numbers of the dtype at each value."""
    limits = torch.finfo(dtype)
    # Below the smallest normal number the distance shrinks no further.
    return limits.eps * 2.0 ** torch.floor(torch.log2(values.abs().clamp(min=limits.tiny)))


# To nearest


@every_dtype
@given(seed=seeds, exponent=st.integers(-10, 10))
def test_every_value_goes_to_its_nearest_neighbour(
    dtype: torch.dtype, seed: int, exponent: int
) -> None:
    values = draw(seed, 20, 5) * 2.0**exponent
    rounded = to_storage(values, dtype, "w")
    assert rounded.dtype == dtype
    assert rounded.shape == values.shape
    error = (rounded.double() - values).abs()
    assert bool((error <= NEAREST * spacing(values, dtype)).all())


@every_dtype
def test_rounding_changes_something_unless_it_has_nothing_to_change(dtype: torch.dtype) -> None:
    values = draw(0, 40, 5)
    rounded = to_storage(values, dtype, "w").double()
    assert torch.equal(rounded, values) == (dtype == torch.float64)
    assert torch.equal(to_storage(rounded, dtype, "w").double(), rounded)


def test_ties_go_to_the_even_neighbour() -> None:
    ulp = torch.finfo(torch.bfloat16).eps
    values = torch.tensor([1 + 0.5 * ulp, 1 + 1.5 * ulp, -1 - 0.5 * ulp], dtype=torch.float64)
    assert to_storage(values, torch.bfloat16, "w").tolist() == [1, 1 + 2 * ulp, -1]


@pytest.mark.parametrize("dtype", NARROW)
def test_signs_and_zeros_stay(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1e-300, -2.0], dtype=torch.float64)
    rounded = to_storage(values, dtype, "w")
    assert rounded.tolist() == [0, 0, 0, -2]
    assert torch.signbit(rounded).tolist() == [False, True, False, True]


# What does not fit


@pytest.mark.parametrize(
    ("dtype", "largest", "too_large"),
    [
        (torch.float16, 65504.0, 65520.0),
        (torch.bfloat16, torch.finfo(torch.bfloat16).max, 3.4e38),
        (torch.float32, torch.finfo(torch.float32).max, 3.5e38),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_value_fits_and_the_next_does_not(
    dtype: torch.dtype, largest: float, too_large: float, sign: int
) -> None:
    values = draw(0, 3, 4)
    values[1, 2] = sign * largest
    assert to_storage(values, dtype, "w")[1, 2] == sign * largest
    values[1, 2] = sign * too_large
    with pytest.raises(InputError, match=r"the edited tensor model\.up does not fit its") as caught:
        to_storage(values, dtype, "model.up")
    assert f"|value| up to {too_large:.3g}" in caught.value.what
    name = str(dtype).removeprefix("torch.")
    assert f"{name} holds at most {largest:.3g}" in str(caught.value.why)
    assert "lower the strength or the coefficient" in str(caught.value.fix)
    assert caught.value.exit_code == 4


@every_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(dtype: torch.dtype, value: float) -> None:
    values = draw(0, 3, 4)
    values[2, 1] = value
    for round_ in (
        lambda: to_storage(values, dtype, "w"),
        lambda: feedback(values, draw(1, 1, 3), dtype, "w"),
    ):
        with pytest.raises(InputError, match="the edited tensor w does not fit its dtype") as error:
            round_()
        assert "or the base tensor holds values that are not finite" in str(error.value.why)


# With error feedback


def feedback(
    values: Tensor, directions: Tensor, dtype: torch.dtype, name: str, *, axis: int = 0
) -> Tensor:
    """Round a whole matrix, in one tile."""
    return Feedback(directions, axis).to_storage(values, dtype, name)


def ablated(seed: int, rows: int, columns: int, count: int) -> tuple[Tensor, Tensor]:
    """Return a weight on the bfloat16 grid with some directions removed, and the directions."""
    basis = torch.linalg.qr(draw(seed, rows, count))[0].T
    weight = draw(seed + 1, rows, columns).bfloat16().double()
    return weight - basis.T @ (basis @ weight), basis


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_feedback_keeps_removed_directions_removed(
    dtype: torch.dtype, count: int, axis: int
) -> None:
    values, basis = ablated(0, 256, 32, count)
    stored = values if axis == 0 else values.T.contiguous()
    nearest = to_storage(stored, dtype, "w").double()
    fed = feedback(stored, basis, dtype, "w", axis=axis).double()

    def seen(rounded: Tensor) -> float:
        along = rounded if axis == 0 else rounded.T
        return float((basis @ (along - values)).square().mean().sqrt())

    assert seen(fed) < 0.05 * seen(nearest)
    # The price: no value moves further than to its second neighbour, and few move at all.
    error = (fed - stored).abs()
    assert bool((error <= (1 + 2.0**-13) * spacing(stored, dtype)).all())
    ratio = float(error.square().mean().sqrt() / (nearest - stored).square().mean().sqrt())
    assert ratio < 1.5


def test_feedback_along_the_wrong_axis_is_no_help() -> None:
    values, basis = ablated(0, 64, 64, 1)
    right, wrong = (
        feedback(values, basis, torch.bfloat16, "w", axis=axis).double() - values for axis in (0, 1)
    )
    nearest = to_storage(values, torch.bfloat16, "w").double() - values
    assert float((basis @ right).norm()) < 0.1 * float((basis @ nearest).norm())
    assert float((basis @ wrong).norm()) > 0.5 * float((basis @ nearest).norm())


@every_dtype
def test_feedback_without_directions_is_rounding_to_nearest(dtype: torch.dtype) -> None:
    values = draw(0, 6, 5)
    found = feedback(values, torch.zeros(0, 6).double(), dtype, "w")
    assert torch.equal(found, to_storage(values, dtype, "w"))


@every_dtype
def test_feedback_leaves_what_lies_on_the_grid(dtype: torch.dtype) -> None:
    values = draw(0, 6, 5).bfloat16().double()
    values[0, 0] = torch.finfo(torch.float16).max if dtype == torch.float16 else 1.0
    assert torch.equal(feedback(values, draw(1, 2, 6), dtype, "w").double(), values)


def test_feedback_depends_on_the_span_alone() -> None:
    values, basis = ablated(0, 48, 9, 2)
    found = feedback(values, basis, torch.bfloat16, "w")
    scaled = torch.tensor([[3.0, 0.0], [0.0, -0.2]], dtype=torch.float64) @ basis
    again = feedback(values, scaled, torch.bfloat16, "w")
    assert torch.equal(found, again)
    assert not torch.equal(found, to_storage(values, torch.bfloat16, "w"))
