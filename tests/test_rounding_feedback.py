"""Rounding with error feedback: what the directions see of the errors cancels, at little cost."""

import pytest
import torch
from torch import Tensor

from bake.errors import InputError
from bake.rounding import corrections, feedback, to_storage

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def problem(
    rows: int, columns: int, rank: int, dtype: torch.dtype, *, scale: float = 0.02, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight on the grid of its dtype, orthonormal directions, and it without them."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weight = (scale * normal).to(dtype).to(torch.float64)
    factors = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(factors)[0].T
    return weight, directions, weight - directions.T @ (directions @ weight)


def leak(directions: Tensor, rounded: Tensor, weight: Tensor) -> float:
    """Return how much of the removed component came back, as a share of what there was."""
    return float((directions @ rounded.to(torch.float64)).norm() / (directions @ weight).norm())


def rms(rounded: Tensor, exact: Tensor) -> float:
    return float((rounded.to(torch.float64) - exact).square().mean().sqrt())


@pytest.mark.parametrize(("rank", "limit"), [(1, 1e-5), (2, 1e-5), (4, 1e-5), (16, 1e-5)])
def test_bfloat16_keeps_a_removed_direction_removed(rank: int, limit: float) -> None:
    """What bake promises: less than 1e-5 of the component, at 1.35 times the error of nearest."""
    weight, directions, exact = problem(2048, 96, rank, torch.bfloat16)
    nearest = to_storage(exact, torch.bfloat16, "w")
    rounded = feedback(exact, directions, torch.bfloat16, "w")
    assert leak(directions, rounded, weight) < limit
    assert rms(rounded, exact) < 1.35 * rms(nearest, exact)
    # The control: rounding to nearest leaves hundreds of times as much.
    assert leak(directions, nearest, weight) > 100 * limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(48, 40), (256, 33)], ids=str)
def test_every_value_is_a_neighbour_of_the_exact_one(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    _, directions, exact = problem(*shape, 1, dtype)
    exact[0, 0] = 0.0
    rounded = feedback(exact, directions, dtype, "w")
    assert rounded.dtype == dtype
    value, nearest = rounded.to(torch.float64), exact.to(dtype)
    infinity = torch.full_like(nearest, torch.inf)
    gaps = [
        (torch.nextafter(nearest, end).to(torch.float64) - nearest.to(torch.float64)).abs()
        for end in (infinity, -infinity)
    ]
    assert bool(((value - exact).abs() <= torch.maximum(*gaps)).all())
    on_the_grid = nearest.to(torch.float64) == exact
    assert bool(on_the_grid.any())
    assert torch.equal(value[on_the_grid], exact[on_the_grid])  # what is exact stays
    moved = rounded != nearest
    assert 0 < float(moved.double().mean()) < 0.25
    seen = [float((directions @ (r.to(torch.float64) - exact)).norm()) for r in (rounded, nearest)]
    assert seen[0] < seen[1] / 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_axes_are_alike(dtype: torch.dtype) -> None:
    _, directions, exact = problem(96, 64, 2, dtype)
    down = feedback(exact, directions, dtype, "w")
    across = feedback(exact.T.contiguous(), directions, dtype, "w", axis=1)
    assert torch.equal(down, across.T)
    assert not torch.equal(down, exact.to(dtype))


def test_directions_need_no_normalisation() -> None:
    _, directions, exact = problem(128, 32, 2, torch.bfloat16)
    mixed = torch.tensor([[3.0, 0.0], [1.0, -200.0]], dtype=torch.float64) @ directions
    first = feedback(exact, directions, torch.bfloat16, "w").to(torch.float64)
    other = feedback(exact, mixed, torch.bfloat16, "w").to(torch.float64)
    nearest = exact.to(torch.bfloat16).to(torch.float64)
    errors = [float((directions @ (r - exact)).norm()) for r in (first, other, nearest)]
    assert max(errors[:2]) < errors[2] / 20


def test_a_sparse_direction_touches_only_its_rows() -> None:
    _, _, exact = problem(64, 32, 1, torch.bfloat16)
    exact = exact + 1e-5
    direction = torch.zeros(1, 64, dtype=torch.float64)
    direction[0, 8:24] = torch.linspace(0.5, 1.5, 16, dtype=torch.float64)
    moved = feedback(exact, direction, torch.bfloat16, "w") != exact.to(torch.bfloat16)
    assert bool(moved[8:24].any())
    assert not bool(moved[:8].any() or moved[24:].any())


def test_no_direction_is_rounding_to_nearest() -> None:
    _, _, exact = problem(32, 32, 1, torch.float16)
    none = torch.zeros(0, 32, dtype=torch.float64)
    assert torch.equal(feedback(exact, none, torch.float16, "w"), exact.to(torch.float16))


def test_choices_that_are_equal_are_not_taken() -> None:
    """A value moves only where the other neighbour is another one."""
    _, directions, exact = problem(64, 16, 1, torch.bfloat16)
    nearest = exact.to(torch.bfloat16)
    other = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    other[:, 3] = nearest[:, 3]
    chosen = corrections(exact, (nearest, other), directions)
    assert not bool(chosen[:, 3].any())
    assert bool(chosen.any())


def test_many_columns_are_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    _, directions, exact = problem(64, 50, 2, torch.bfloat16)
    whole = feedback(exact, directions, torch.bfloat16, "w")
    monkeypatch.setattr("bake.rounding._BLOCK", 64 * 7)
    assert torch.equal(feedback(exact, directions, torch.bfloat16, "w"), whole)


def test_the_end_of_the_range_stays_finite() -> None:
    largest = torch.finfo(torch.float16).max
    exact = torch.full((4, 4), largest * (1 + 2.0**-13), dtype=torch.float64)
    exact[0] = 1.0001
    directions = torch.ones(1, 4, dtype=torch.float64)
    rounded = feedback(exact, directions, torch.float16, "w")
    assert bool(torch.isfinite(rounded).all())
    assert float(rounded.max()) == largest
    with pytest.raises(InputError, match="the edited tensor w does not fit its dtype"):
        feedback(exact * 2, directions, torch.float16, "w")


def test_one_sided_steps_need_a_way_back() -> None:
    """An edit that is small beside the steps: with three choices the walk does not get stuck."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (1024, 48), generator=generator).to(torch.float64)
    direction = torch.randn(1, 1024, generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    exact = codes - direction.T @ (direction @ codes)  # the steps are 1, the change is about 0.1
    towards = torch.sign(exact - codes)
    two = (codes, codes + towards)
    three = (*two, codes - towards)
    left = {}
    for name, choices in (("nearest", (codes,)), ("two", two), ("three", three)):
        chosen = corrections(exact, choices, direction).to(torch.int64)
        taken = torch.stack(choices).gather(0, chosen.unsqueeze(0))[0]
        left[name] = float((direction @ taken).norm() / (direction @ codes).norm())
    assert left["nearest"] == pytest.approx(1.0)  # every value is nearest where it was
    assert left["three"] < 1e-4
    assert left["three"] < left["two"] / 10
