"""Laws of affine maps, held by every form and by every pair of forms, against dense matrices."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bake.affine import (
    AffineMap,
    DenseMap,
    DiagonalMap,
    LowRankMap,
    chain,
    identity,
    thin_factors,
    tolerance,
    translation,
)
from bake.errors import DirectionError


class Draw:
    """Random tensors of one seed, in float64."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def orthogonal(self, width: int) -> Tensor:
        return torch.linalg.qr(self(width, width))[0]

    def pick(self, width: int, count: int) -> Tensor:
        return torch.randperm(width, generator=self._generator)[:count]


Make = Callable[[Draw, int], AffineMap]


def _projection(draw: Draw, width: int) -> AffineMap:
    rows = draw.orthogonal(width)[:2]
    return LowRankMap(-rows.T, rows, draw(width))


def _oblique(draw: Draw, width: int) -> AffineMap:
    left, right = draw(width, 2), draw(2, width)
    left = left + 3 * right.T  # keeps the inverse below tame
    return LowRankMap(-left @ torch.linalg.inv(right @ left), right, draw(width))


def _reflection(draw: Draw, width: int) -> AffineMap:
    row = draw.orthogonal(width)[:1]
    return LowRankMap(-2 * row.T, row, draw(width))


def _with_ones_and_zeros(draw: Draw, width: int) -> AffineMap:
    return DiagonalMap(torch.where(draw(width) > 0, 1.0, draw(width).clamp(min=0)), draw(width))


def _one_factor_twice(draw: Draw, width: int) -> AffineMap:
    left, right = draw(width, 1), draw(1, width)
    return LowRankMap(torch.cat([left, left], 1), torch.cat([right, 2 * right]), draw(width))


def _singular(draw: Draw, width: int) -> AffineMap:
    return DenseMap(draw(width, width - 1) @ draw(width - 1, width), draw(width))


FORMS: dict[str, Make] = {
    "identity": lambda _, width: identity(width),
    "translation": lambda draw, width: translation(draw(width)),
    "rank one": lambda draw, width: LowRankMap(draw(width, 1), draw(1, width), draw(width)),
    "one factor twice": _one_factor_twice,
    "more factors than channels": lambda draw, width: LowRankMap(
        draw(width, width + 1), draw(width + 1, width), draw(width)
    ),
    "projection": _projection,
    "oblique projection": _oblique,
    "reflection": _reflection,
    "diagonal": lambda draw, width: DiagonalMap(draw(width), draw(width)),
    "diagonal of ones and zeros": _with_ones_and_zeros,
    "diagonal of signs": lambda draw, width: DiagonalMap(draw(width).sign(), draw(width)),
    "dense": lambda draw, width: DenseMap(draw(width, width), draw(width)),
    "dense identity": lambda draw, width: DenseMap(torch.eye(width).double(), draw(width)),
    "dense zero": lambda draw, width: DenseMap(torch.zeros(width, width).double(), draw(width)),
    "dense rotation": lambda draw, width: DenseMap(draw.orthogonal(width), draw(width)),
    "dense singular": _singular,
}
IDEMPOTENT = {
    "identity", "translation", "projection", "oblique projection", "dense identity", "dense zero"
}  # fmt: skip
ORTHOGONAL = {
    "identity", "translation", "reflection", "diagonal of signs", "dense identity", "dense rotation"
}  # fmt: skip

every_form = pytest.mark.parametrize("form", FORMS)
every_pair = pytest.mark.parametrize(("outer", "inner"), tuple(product(FORMS, FORMS)))
seeds = st.integers(0, 2**32 - 1)
widths = st.integers(3, 9)
# A law is tried on few draws of each form, since it is tried on every form.
some = settings(max_examples=12)
few = settings(max_examples=4)


def parts(map_: AffineMap) -> tuple[Tensor, Tensor]:
    """Return A and b, read off the fields alone."""
    match map_:
        case LowRankMap(left, right, bias):
            return torch.eye(map_.width).double() + left @ right, bias
        case DiagonalMap(scale, bias):
            return torch.diag(scale), bias
        case DenseMap(full, bias):
            return full, bias
    raise AssertionError(f"no field is known of {type(map_).__name__}")


def numbers(values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, meant: Tensor, *factors: Tensor) -> bool:
    """Whether tensors agree to the rounding of a product of the factors."""
    size = 1.0
    for factor in factors:
        size *= max(1.0, float(torch.linalg.vector_norm(factor)))
    width = max((n for factor in factors for n in factor.shape), default=1)
    error = float((found - meant).abs().max()) if found.numel() else 0.0
    return found.shape == meant.shape and error <= tolerance(width) * size


# Application


@every_form
@some
@given(seeds, widths)
def test_a_map_is_its_matrix_and_its_constant(form: str, seed: int, width: int) -> None:
    draw = Draw(seed)
    map_ = FORMS[form](draw, width)
    full, bias = parts(map_)
    x = draw(2, 3, width)
    assert map_.width == width
    assert close(map_(x), x @ full.T + bias, full, x)
    assert close(map_.linear(x), x @ full.T, full, x)
    assert close(map_(x[0, 0]), full @ x[0, 0] + bias, full, x)
    assert close(map_.matrix(), full, full)
    assert map_(x[:0]).shape == (0, 3, width)


@every_form
@some
@given(seeds, widths)
def test_the_adjoint_moves_to_the_other_side(form: str, seed: int, width: int) -> None:
    draw = Draw(seed)
    map_ = FORMS[form](draw, width)
    x, y, weight = draw(width), draw(width), draw(5, width)
    full, _ = parts(map_)
    assert close(map_.linear(x) @ y, x @ map_.adjoint(y), full, x, y)
    assert close(map_.adjoint(weight), weight @ full, full, weight)


@every_form
@some
@given(seeds, widths)
def test_the_transpose_is_linear_and_transposed(form: str, seed: int, width: int) -> None:
    draw = Draw(seed)
    map_ = FORMS[form](draw, width)
    full, _ = parts(map_)
    transpose = map_.transpose()
    assert type(transpose) is type(map_)
    assert close(transpose.matrix(), full.T, full)
    assert transpose.is_linear()
    assert close(transpose.transpose().matrix(), full, full)


# Composition


@every_pair
@few
@given(seeds, widths)
def test_composition_is_application(outer: str, inner: str, seed: int, width: int) -> None:
    draw = Draw(seed)
    second, first = FORMS[outer](draw, width), FORMS[inner](draw, width)
    x = draw(4, width)
    both = second.after(first)
    sizes = (*parts(second), *parts(first), x)
    assert close(both(x), second(first(x)), *sizes)
    assert close(chain([first, second], width)(x), both(x), *sizes)


@every_form
@some
@given(seeds, widths)
def test_the_identity_is_neutral_and_keeps_the_form(form: str, seed: int, width: int) -> None:
    map_ = FORMS[form](Draw(seed), width)
    for both in (map_.after(identity(width)), identity(width).after(map_)):
        assert type(both) is type(map_)
        assert all(torch.equal(*pair) for pair in zip(parts(both), parts(map_), strict=True))


def test_maps_in_the_wrong_order_are_another_map() -> None:
    draw = Draw(0)
    first, second = FORMS["projection"](draw, 5), FORMS["dense"](draw, 5)
    right, wrong = chain([first, second], 5), chain([second, first], 5)
    x = draw(3, 5)
    assert close(right(x), second(first(x)), *parts(first), *parts(second), x)
    assert float((right(x) - wrong(x)).abs().max()) > 1e-2


def test_a_chain_of_nothing_is_the_identity() -> None:
    map_ = chain([], 4)
    assert map_.is_identity()
    assert map_.width == 4


def test_composition_stays_thin_while_it_can() -> None:
    draw = Draw(1)
    one, two = FORMS["rank one"](draw, 4), FORMS["projection"](draw, 4)
    thin = one.after(two)
    assert isinstance(thin, LowRankMap)
    assert thin.left.shape == (4, 3)
    assert isinstance(thin.after(one), DenseMap)  # four factors save nothing over four channels
    scales = FORMS["diagonal"](draw, 4).after(FORMS["diagonal"](draw, 4))
    assert isinstance(scales, DiagonalMap)
    assert isinstance(scales.after(one), DenseMap)
    assert isinstance(scales.after(translation(draw(4))), DiagonalMap)


def test_a_translation_shares_the_other_maps_tensors() -> None:
    """Whoever carries one dense map past many plain points must not hold it many times."""
    dense = DenseMap(Draw(0)(6, 6), Draw(1)(6))
    for both in (translation(Draw(2)(6)).after(dense), dense.after(translation(Draw(2)(6)))):
        assert isinstance(both, DenseMap)
        assert both.full.data_ptr() == dense.full.data_ptr()
        assert not torch.equal(both.bias, dense.bias)


def test_maps_of_different_widths_do_not_compose() -> None:
    with pytest.raises(DirectionError, match="cannot compose maps of widths 4 and 5"):
        identity(4).after(identity(5))


# What a map is


@every_form
@some
@given(seeds, widths)
def test_delta_factors_are_as_thin_as_the_rank(form: str, seed: int, width: int) -> None:
    map_ = FORMS[form](Draw(seed), width)
    full, _ = parts(map_)
    change = full - torch.eye(width).double()
    left, right = map_.delta_factors()
    assert close(left @ right, change, full)
    rank = int(torch.linalg.matrix_rank(change, rtol=tolerance(width)))
    assert left.shape == (width, rank)
    assert right.shape == (rank, width)
    assert close(right @ right.T, torch.eye(rank).double(), torch.ones(width))
    assert map_.is_translation() == (rank == 0)


def test_small_entries_may_add_up_to_a_change() -> None:
    """Every entry is below the threshold, and together they are a factor above it."""
    for entry, translation_ in ((0.9, False), (0.9 / 8, True)):
        change = torch.full((8, 8), entry * tolerance(8), dtype=torch.float64)
        map_ = DenseMap(torch.eye(8).double() + change, torch.zeros(8).double())
        assert map_.is_translation() is translation_
        assert (map_.delta_factors()[0].shape[1] == 0) is translation_


@every_form
@some
@given(seeds, widths)
def test_predicates_agree_with_the_matrix(form: str, seed: int, width: int) -> None:
    map_ = FORMS[form](Draw(seed), width)
    full, bias = parts(map_)
    eye = torch.eye(width).double()
    assert map_.is_idempotent() == close(full @ full, full, full)
    assert map_.is_orthogonal() == close(full.T @ full, eye, eye)
    assert map_.is_translation() == torch.equal(full, eye)
    assert map_.is_linear() == (not bias.any())
    assert map_.is_identity() == (torch.equal(full, eye) and not bias.any())


@every_form
@some
@given(seeds, widths)
def test_predicates_are_true_of_what_they_are_meant_for(form: str, seed: int, width: int) -> None:
    map_ = FORMS[form](Draw(seed), width)
    ones_and_zeros = isinstance(map_, DiagonalMap) and set(map_.scale.tolist()) <= {0.0, 1.0}
    signs = isinstance(map_, DiagonalMap) and set(map_.scale.tolist()) <= {-1.0, 1.0}
    assert map_.is_idempotent() == (form in IDEMPOTENT or ones_and_zeros)
    assert map_.is_orthogonal() == (form in ORTHOGONAL or signs)


@pytest.mark.parametrize("form", sorted(IDEMPOTENT))
def test_a_projection_that_is_a_little_off_is_none(form: str) -> None:
    """The error is that of the matrix, and rounding is far below the first that counts."""
    full, bias = parts(FORMS[form](Draw(3), 6))
    for size, holds in ((0.0, True), (2.0**-50, True), (1e-9, False), (0.1, False)):
        change = size * torch.outer(Draw(4)(6), Draw(5)(6))
        assert DenseMap(full + change, bias).is_idempotent() is holds
        low = LowRankMap(full + change - torch.eye(6).double(), torch.eye(6).double(), bias)
        assert low.is_idempotent() is holds
        assert (low.idempotence_error() > 1e-10) is not holds


@pytest.mark.parametrize("form", sorted(ORTHOGONAL))
def test_a_rotation_that_is_a_little_off_is_none(form: str) -> None:
    full, bias = parts(FORMS[form](Draw(3), 6))
    for size, holds in ((0.0, True), (2.0**-50, True), (1e-9, False), (0.1, False)):
        change = size * torch.outer(Draw(4)(6), Draw(5)(6))
        assert DenseMap(full + change, bias).is_orthogonal() is holds
        low = LowRankMap(full + change - torch.eye(6).double(), torch.eye(6).double(), bias)
        assert low.is_orthogonal() is holds


def test_the_idempotence_error_is_that_of_the_matrix() -> None:
    half = LowRankMap(numbers([[-0.5], [0]]), numbers([[1, 0]]), numbers([0, 0]))
    assert half.idempotence_error() == pytest.approx(0.25)
    assert DenseMap(*parts(half)).idempotence_error() == pytest.approx(0.25)
    assert DiagonalMap(numbers([0.5, 1]), half.bias).idempotence_error() == 0.25


@every_form
@some
@given(seeds, widths)
def test_left_null_is_the_complement_of_the_image(form: str, seed: int, width: int) -> None:
    map_ = FORMS[form](Draw(seed), width)
    full, _ = parts(map_)
    null = map_.left_null()
    rank = int(torch.linalg.matrix_rank(full, rtol=tolerance(width)))
    assert null.shape == (width - rank, width)
    assert close(null @ full, torch.zeros(width - rank, width).double(), full)
    assert close(null @ null.T, torch.eye(width - rank).double(), torch.ones(width))


@pytest.mark.parametrize("form", ["projection", "oblique projection", "dense singular"])
def test_left_null_says_what_the_map_makes_constant(form: str) -> None:
    draw = Draw(7)
    map_ = FORMS[form](draw, 6)
    null = map_.left_null()
    seen = map_(draw(50, 6)) @ null.T
    assert null.shape[0] > 0
    assert float((seen - null @ map_.bias).abs().max()) <= tolerance(6) * 64
    assert float(map_(draw(50, 6)).std(dim=0).min()) > 1e-2  # no channel is constant by itself


@pytest.mark.parametrize("steepness", [1e0, 1e2, 1e4, 1e6])
def test_left_null_of_a_steep_projection(steepness: float) -> None:
    """LEACE's projections are oblique by the condition of the covariance: R L = I must be seen."""
    draw = Draw(0)
    basis = draw.orthogonal(24)
    right, left = basis[:3], (basis[:3] + steepness * basis[3:6]).T
    map_ = LowRankMap(-left, right, torch.zeros(24).double())
    assert map_.left_null().shape == (3, 24)
    assert close(map_.left_null() @ right.T @ right, map_.left_null(), torch.ones(24))


# Scatter, bias, dtype


@every_form
@some
@given(seeds, widths)
def test_scatter_is_a_block_of_the_identity(form: str, seed: int, width: int) -> None:
    draw = Draw(seed)
    map_ = FORMS[form](draw, width)
    full, bias = parts(map_)
    indices = draw.pick(width + 4, width)  # in any order
    wide = map_.scatter(indices, width + 4)
    meant = torch.eye(width + 4).double()
    meant[indices.unsqueeze(1), indices] = full
    constant = torch.zeros(width + 4).double()
    constant[indices] = bias
    assert type(wide) is type(map_)
    assert close(wide.matrix(), meant, full)
    assert torch.equal(wide.bias, constant)
    x = draw(3, width + 4)
    assert close(wide(x)[:, indices], map_(x[:, indices]), full, bias, x)
    others = [i for i in range(width + 4) if i not in indices]
    assert torch.equal(wide(x)[:, others], x[:, others])


@every_form
def test_with_bias_changes_the_constant_alone(form: str) -> None:
    draw = Draw(0)
    map_ = FORMS[form](draw, 5)
    bias = draw(5)
    other = map_.with_bias(bias)
    assert type(other) is type(map_)
    assert torch.equal(parts(other)[0], parts(map_)[0])
    assert torch.equal(other.bias, bias)
    assert not other.is_linear()
    assert map_.with_bias(torch.zeros(5).double()).is_linear()


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_moves_every_tensor(form: str, dtype: torch.dtype) -> None:
    map_ = FORMS[form](Draw(0), 5)
    moved = map_.to(dtype)
    fields = [getattr(moved, field.name) for field in dataclasses.fields(moved)]  # type: ignore[arg-type]
    assert {tensor.dtype for tensor in fields} == {dtype}
    assert moved(torch.ones(2, 5, dtype=dtype)).dtype == dtype
    assert type(moved) is type(map_)
    error = (moved.matrix().double() - parts(map_)[0]).abs().max()
    assert float(error) <= 16 * torch.finfo(dtype).eps * float(parts(map_)[0].abs().max())


@every_form
def test_maps_are_values(form: str) -> None:
    map_ = FORMS[form](Draw(0), 5)
    before = [tensor.clone() for tensor in parts(map_)]
    map_(Draw(1)(2, 5))
    map_.after(map_)
    map_.scatter(torch.arange(5), 7)
    map_.delta_factors()
    assert all(torch.equal(*pair) for pair in zip(before, parts(map_), strict=True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        map_.bias = torch.zeros(5)  # type: ignore[misc]


# By hand


def test_an_affine_map_of_the_plane_by_hand() -> None:
    """The component along (3, 4)/5 is removed, then (1, 1) is added."""
    row = numbers([0.6, 0.8]).unsqueeze(0)
    map_ = LowRankMap(-row.T, row, numbers([1, 1]))
    assert close(map_.matrix(), numbers([[0.64, -0.48], [-0.48, 0.36]]), row)
    assert close(map_(numbers([5, 0])), numbers([4.2, -1.4]), row, numbers([5, 0]))
    assert close(map_(numbers([3, 4])), numbers([1, 1]), row, numbers([3, 4]))
    assert close(map_(numbers([-4, 3])), numbers([-3, 4]), row, numbers([-4, 3]))
    assert close(map_.left_null().abs(), row, row)
    # The constant's own component, 1.4 along (3, 4)/5, goes when the map is applied again.
    assert close(map_.after(map_).bias, numbers([2 - 1.4 * 0.6, 2 - 1.4 * 0.8]), row)


def test_thin_factors_drop_what_rounding_left() -> None:
    draw = Draw(0)
    matrix = draw(6, 2) @ draw(2, 6)
    left, right = thin_factors(matrix + 1e-16 * draw(6, 6))
    assert left.shape == (6, 2)
    assert close(left @ right, matrix, matrix)
    assert close(right @ right.T, torch.eye(2).double(), torch.ones(6))
    assert thin_factors(matrix + 1e-9 * draw(6, 6))[0].shape == (6, 6)
    assert thin_factors(torch.zeros(4, 4).double())[0].shape == (4, 0)


# What is no map


def _broken(value: float) -> Iterable[Callable[[], AffineMap]]:
    good, row = torch.ones(3).double(), torch.ones(1, 3).double()
    for position in range(3):
        bad = good.clone()
        bad[position] = value
        yield lambda bad=bad: LowRankMap(bad.unsqueeze(1), row, good)  # type: ignore[misc]
        yield lambda bad=bad: LowRankMap(row.T, bad.unsqueeze(0), good)  # type: ignore[misc]
        yield lambda bad=bad: LowRankMap(row.T, row, bad)  # type: ignore[misc]
        yield lambda bad=bad: DiagonalMap(bad, good)  # type: ignore[misc]
        yield lambda bad=bad: DiagonalMap(good, bad)  # type: ignore[misc]
        yield lambda bad=bad: DenseMap(torch.diag(bad), good)  # type: ignore[misc]
        yield lambda bad=bad: DenseMap(torch.eye(3).double(), bad)  # type: ignore[misc]
        yield lambda bad=bad: translation(bad)  # type: ignore[misc]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    for make in _broken(value):
        with pytest.raises(DirectionError, match=r"not finite \(NaN or infinity\)"):
            make()
    for make in _broken(2.0):
        make()


def test_whole_numbers_are_refused() -> None:
    ints, floats = torch.ones(3, dtype=torch.int64), torch.ones(3).double()
    with pytest.raises(DirectionError, match=r"needs floating-point factors, not torch\.int64"):
        DiagonalMap(ints, floats)
    with pytest.raises(DirectionError, match="a dense map needs floating-point factors"):
        DenseMap(torch.eye(3, dtype=torch.int32), floats)
    with pytest.raises(DirectionError, match="a low-rank map needs floating-point factors"):
        translation(ints)


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda t: LowRankMap(t(3, 2), t(1, 3), t(3)), r"\[3, 2\], \[1, 3\], \[3\]"),
        (lambda t: LowRankMap(t(4, 1), t(1, 3), t(3)), r"\[4, 1\], \[1, 3\], \[3\]"),
        (lambda t: LowRankMap(t(3, 1), t(1, 4), t(3)), r"\[3, 1\], \[1, 4\], \[3\]"),
        (lambda t: LowRankMap(t(3), t(3), t(3)), r"\[3\], \[3\], \[3\]"),
        (lambda t: DiagonalMap(t(4), t(3)), r"\[4\], \[3\]"),
        (lambda t: DiagonalMap(t(1, 3), t(3)), r"\[1, 3\], \[3\]"),
        (lambda t: DenseMap(t(3, 4), t(3)), r"\[3, 4\], \[3\]"),
        (lambda t: DenseMap(t(3, 3), t(4)), r"\[3, 3\], \[4\]"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    make: Callable[[Callable[..., Tensor]], AffineMap], shapes: str
) -> None:
    with pytest.raises(DirectionError, match=rf"do not fit each other: {shapes}"):
        make(lambda *shape: torch.ones(*shape).double())
