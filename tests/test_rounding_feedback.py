"""Rounding with error feedback: what the directions see of the errors cancels, at little cost."""

import json
from collections.abc import Callable
from pathlib import Path

import harness
import pytest
import tiny
import torch
from exporting import written
from torch import Tensor

from bake.affine import LowRankMap
from bake.errors import InputError
from bake.rounding import Feedback, Moves, Where, to_storage

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


def feedback(
    values: Tensor, directions: Tensor, dtype: torch.dtype, name: str, *, axis: int = 0
) -> Tensor:
    """Round a whole matrix, in one tile."""
    return Feedback(directions, axis).to_storage(values, dtype, name)


class Steps:
    """Whole numbers that may move by a step, as far as ``low`` and ``high`` say."""

    def __init__(self, values: Tensor, unit: Tensor, low: int, high: int) -> None:
        self.values, self.unit, self.ends = values.clone(), unit, (low, high)
        self.counts = torch.zeros_like(values)

    def moves(self, where: Where) -> Moves:
        done = self.counts[where]
        return Moves(self.unit[where], self.ends[0] - done, self.ends[1] - done)

    def move(self, where: Where, counts: Tensor) -> None:
        self.counts[where] += counts
        self.values[where] += counts * self.unit[where]


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


def test_values_that_cannot_move_stay() -> None:
    _, directions, exact = problem(64, 16, 1, torch.bfloat16)
    nearest = exact.to(torch.bfloat16).to(torch.float64)
    unit = torch.full_like(nearest, 2.0**-12)
    unit[:, 3] = 0.0
    steps = Steps(nearest, unit, -1, 1)
    Feedback(directions, 0).settle(nearest - exact, steps)
    assert not bool(steps.counts[:, 3].any())
    assert bool(steps.counts.any())


@pytest.mark.parametrize("tile", [300, 1024, 2048])
def test_tiles_carry_on_what_was_seen(tile: int) -> None:
    """However the rows are cut: the last tile settles what the others have left."""
    weight, directions, exact = problem(2048, 96, 1, torch.bfloat16)

    def rounded(stop: int) -> Tensor:
        """Round with feedback up to a row, and to nearest behind it."""
        state = Feedback(directions, 0)
        starts = range(0, stop, tile)
        tiles = [
            state.to_storage(exact[start : start + tile], torch.bfloat16, "w") for start in starts
        ]
        done = sum(part.shape[0] for part in tiles)
        return torch.cat([*tiles, to_storage(exact[done:], torch.bfloat16, "w")])

    assert leak(directions, rounded(2048), weight) < 1e-5
    assert rms(rounded(2048), exact) < 1.3 * rms(exact.to(torch.bfloat16), exact)
    # The control: without the last tile a component is left.
    assert leak(directions, rounded(2048 - tile), weight) > 1e-4


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


def test_a_checkpoint_is_rounded_as_asked(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """With feedback a removed direction is gone; nothing that the edit leaves is touched."""
    base = harness.base_at(
        tiny_checkpoint("llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=96)
    )
    unit = harness.vector(256) / harness.vector(256).norm()
    ablation = LowRankMap(-unit[:, None], unit[None], torch.zeros(256, dtype=torch.float64))
    plan = harness.plan_of(base, [harness.edit(base, "ablate", ablation, "resid")])
    before, names = tiny.tensors_of(base.path), [update.name for update in plan.tensors]
    left: dict[str | None, float] = {}
    for rounding in (None, "nearest", "feedback"):
        out = tmp_path / f"{rounding}"
        written("checkpoint", plan, base.checkpoint, out, rounding=rounding)
        after = tiny.tensors_of(out)
        changed = {n for n in after if n not in before or not torch.equal(before[n], after[n])}
        assert changed <= {*names, *(bias.name for bias in plan.biases)}
        name = "model.layers.1.mlp.down_proj.weight"
        left[rounding] = leak(unit[None], after[name], before[name].double())
        told = json.loads((out / "bake.json").read_text(encoding="utf-8")).get("export")
        assert told == (None if rounding is None else {"rounding": rounding})
    assert left[None] == left["nearest"]
    assert left["feedback"] < 1e-4 < left["nearest"] / 10


def test_one_sided_steps_need_a_way_back() -> None:
    """An edit that is small beside the steps: with three choices the walk does not get stuck."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-7, 8, (1024, 48), generator=generator).to(torch.float64)
    direction = torch.randn(1, 1024, generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    exact = codes - direction.T @ (direction @ codes)  # the steps are 1, the change is about 0.1
    left = {}
    for name, low, high in (("nearest", 0, 0), ("two", 0, 1), ("three", -1, 1)):
        steps = Steps(codes, torch.sign(exact - codes), low, high)
        Feedback(direction, 0).settle(codes - exact, steps)
        left[name] = float((direction @ steps.values).norm() / (direction @ codes).norm())
    assert left["nearest"] == pytest.approx(1.0)  # every value is nearest where it was
    assert left["three"] < 1e-4
    assert left["three"] < left["two"] / 10
