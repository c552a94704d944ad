"""Every constructor against the formula that its docstring states, and what it refuses."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bake import edits as make
from bake.affine import AffineMap, DenseMap, DiagonalMap, tolerance
from bake.edits import STORAGE_TOLERANCE, Edit, EditKind, WeightUpdate
from bake.errors import DirectionError

seeds = st.integers(0, 2**32 - 1)
widths = st.integers(3, 12)
strengths = st.sampled_from([1.0, 0.5, 2.0, -1.0])
FLOAT32 = 2.0**-24  # the relative error of one value stored in float32


def drawer(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def numbers(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(found: Tensor, meant: Tensor, size: float = 1.0) -> bool:
    """Whether tensors agree to the rounding of products over their width, at a size of values."""
    error = float((found - meant).abs().max())
    scale = max(1.0, size, float(meant.abs().max()))
    return found.shape == meant.shape and error <= tolerance(max(meant.shape)) * scale


def projector(vectors: Tensor) -> Tensor:
    """Return Vᵀ (V Vᵀ)⁻¹ V, the orthogonal projector onto the span of rows."""
    rows = vectors.reshape(-1, vectors.shape[-1])
    return rows.T @ torch.linalg.inv(rows @ rows.T) @ rows


def mixed(draw: Callable[..., Tensor], vectors: Tensor) -> Tensor:
    """Return another basis of the same span, well conditioned."""
    count = vectors.shape[0]
    return (torch.linalg.qr(draw(count, count))[0] + torch.eye(count).double() / 2) @ vectors


# Ablate


@given(seeds, widths, st.integers(1, 3), strengths)
def test_ablate_removes_the_projection(seed: int, width: int, count: int, strength: float) -> None:
    draw = drawer(seed)
    vectors, x = draw(count, width), draw(4, width)
    ablated = make.ablate(vectors, strength=strength)
    condition = float(torch.linalg.cond(vectors))
    assert same(ablated(x), x - strength * x @ projector(vectors), 100 * condition**2)
    assert ablated.left.shape == (width, count)
    assert ablated.is_linear()


@given(seeds, widths)
def test_a_full_ablation_leaves_nothing_and_is_idempotent(seed: int, width: int) -> None:
    draw = drawer(seed)
    vector, x = draw(width), draw(4, width)
    ablated = make.ablate(vector)
    assert same(ablated(x) @ vector, torch.zeros(4).double(), 100 * width)
    assert float((x @ vector).abs().max()) > 1e-3  # there was something to remove
    assert ablated.is_idempotent()
    assert not make.ablate(vector, strength=0.5).is_idempotent()


@given(seeds, widths, st.integers(1, 3), st.floats(0.01, 100), st.booleans())
def test_ablate_knows_the_span_and_not_the_basis(
    seed: int, width: int, count: int, factor: float, flip: bool
) -> None:
    draw = drawer(seed)
    vectors = torch.linalg.qr(draw(width, width))[0][:count]
    other = mixed(draw, vectors) * (-factor if flip else factor)
    one, two = make.ablate(vectors).matrix(), make.ablate(other).matrix()
    assert same(one, two, 100)
    less = make.ablate(vectors[:1]).matrix()
    assert same(one, less, 100) == (count == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_vectors_of_any_floating_dtype_become_float64(dtype: torch.dtype) -> None:
    vector = drawer(0)(6).to(dtype)
    ablated = make.ablate(vector)
    assert {ablated.left.dtype, ablated.right.dtype, ablated.bias.dtype} == {torch.float64}
    assert same(ablated.matrix(), make.ablate(vector.double()).matrix())
    assert make.offset(vector).bias.dtype == torch.float64


def test_a_vector_with_a_gradient_makes_a_map_without_one() -> None:
    vector = drawer(0)(6).requires_grad_()
    assert not make.ablate(vector).left.requires_grad
    assert not make.offset(vector).bias.requires_grad


# Orthonormal


@given(seeds, widths, st.integers(1, 3))
def test_orthonormal_spans_the_same_and_keeps_the_first(seed: int, width: int, count: int) -> None:
    vectors = drawer(seed)(count, width)
    basis = make.orthonormal(vectors)
    assert same(basis @ basis.T, torch.eye(count).double(), 10)
    assert same(basis[0], vectors[0] / vectors[0].norm(), 10)
    assert same(vectors - vectors @ basis.T @ basis, torch.zeros(count, width).double(), 100)
    # Every further vector is on the positive side of the basis vector that it adds.
    assert bool((torch.diagonal(basis @ vectors.T) > 0).all())


def test_orthonormal_by_hand() -> None:
    basis = make.orthonormal(numbers([[-3, 0, 0], [5, -2, 0]]))
    assert same(basis, numbers([[-1, 0, 0], [0, -1, 0]]))


# Affine


@given(seeds, widths, st.integers(1, 3), st.floats(-2, 2), strengths)
def test_affine_is_the_formula_blended(
    seed: int, width: int, count: int, alpha: float, strength: float
) -> None:
    draw = drawer(seed)
    vectors, mean, x = draw(count, width), draw(width), draw(4, width)
    p = projector(vectors)
    whole = x - (x - mean) @ p + alpha * vectors.sum(dim=0)
    found = make.affine(vectors, mean=mean, alpha=alpha, strength=strength)(x)
    condition = float(torch.linalg.cond(vectors))
    assert same(found, x + strength * (whole - x), 100 * condition**2)


@given(seeds, widths)
def test_affine_sets_the_component_that_was_asked_for(seed: int, width: int) -> None:
    draw = drawer(seed)
    vector, mean, x = draw(width), draw(width), draw(5, width)
    edited = make.affine(vector, mean=mean, alpha=1.5)(x)
    wanted = (mean + 1.5 * vector) @ vector
    assert same(edited @ vector, wanted.expand(5), 100 * width)
    across = torch.eye(width).double() - projector(vector)
    assert same(edited @ across, x @ across, 100)


def test_affine_by_hand() -> None:
    """Along (2, 0) the component becomes the mean's, 3, and two raw vectors more, 4."""
    map_ = make.affine(numbers([2, 0]), mean=numbers([3, 9]), alpha=2)
    assert same(map_(numbers([[100, 5], [-1, 0]])), numbers([[7, 5], [7, 0]]), 100)
    assert same(make.affine(numbers([2, 0]))(numbers([100, 5])), numbers([0, 5]), 100)


def test_affine_moves_along_the_sum_of_the_raw_vectors() -> None:
    map_ = make.affine(numbers([[2, 0, 0], [1, 1, 0]]), alpha=-1)
    assert same(map_(numbers([8, 8, 8])), numbers([-3, -1, 8]), 10)


def test_the_sign_of_the_vector_matters_with_alpha_and_only_then() -> None:
    vector, x = drawer(0)(5), drawer(1)(5)
    assert same(make.affine(vector)(x), make.affine(-vector)(x), 10)
    apart = make.affine(vector, alpha=1)(x) - make.affine(-vector, alpha=1)(x)
    assert same(apart, 2 * vector, 10)


def test_a_constant_of_zero_is_no_constant() -> None:
    vector = drawer(0)(5)
    assert make.affine(vector, mean=torch.zeros(5)).is_linear()
    assert not make.affine(vector, mean=torch.ones(5)).is_linear()


# Erase


def _eraser(draw: Callable[..., Tensor], width: int, count: int) -> tuple[Tensor, Tensor]:
    """Return LEACE's factors for a random covariance: L = Σ^½ Q, R = Qᵀ Σ^−½."""
    root = torch.linalg.qr(draw(width, width))[0] * (0.5 + draw(width).abs())
    q = torch.linalg.qr(draw(width, count))[0]
    return root @ q, q.T @ torch.linalg.inv(root)


@given(seeds, widths, st.integers(1, 2), strengths)
def test_erase_is_the_formula(seed: int, width: int, count: int, strength: float) -> None:
    draw = drawer(seed)
    left, right = _eraser(draw, width, count)
    mean, x = draw(width), draw(4, width)
    found = make.erase(left, right, mean=mean, strength=strength)(x)
    meant = x - strength * (x - mean) @ (left @ right).T
    size = float(left.norm() * right.norm())
    assert same(found, meant, 100 * size**2)


@given(seeds, st.integers(4, 12))
def test_an_eraser_in_float32_becomes_idempotent(seed: int, width: int) -> None:
    left, right = (factor.float() for factor in _eraser(drawer(seed), width, 2))
    stored = torch.eye(width).double() - left.double() @ right.double()
    assert not DenseMap(stored, torch.zeros(width).double()).is_idempotent()
    map_ = make.erase(left, right)
    assert map_.is_idempotent()
    assert map_.left_null().shape == (2, width)
    size = float(left.norm() * right.norm())
    assert float((map_.matrix() - stored).abs().max()) <= 8 * width * FLOAT32 * size**2


@given(seeds, st.integers(4, 12), st.sampled_from([0.5, 0.9, 1.01]))
def test_an_eraser_that_was_never_idempotent_stays(seed: int, width: int, factor: float) -> None:
    left, right = _eraser(drawer(seed), width, 2)
    map_ = make.erase(factor * left, right)
    size = float(left.norm() * right.norm())
    assert same(map_.matrix(), torch.eye(width).double() - factor * left @ right, 100 * size**2)
    assert not map_.is_idempotent()


def test_factors_that_repeat_themselves_are_thinned() -> None:
    left, right = _eraser(drawer(0), 6, 1)
    map_ = make.erase(torch.cat([left, left], 1) / 2, torch.cat([right, right]))
    assert map_.left.shape == (6, 1)
    assert map_.is_idempotent()


def test_erase_by_hand() -> None:
    """Along (1, 1), seen by (1, 0): the first channel becomes the mean's, the second follows."""
    map_ = make.erase(numbers([[1], [1]]), numbers([[1, 0]]), mean=numbers([2, 7]))
    assert same(map_(numbers([5, 5])), numbers([2, 2]), 10)
    assert map_.is_idempotent()


# Offset and scale


@given(seeds, widths, st.floats(-5, 5))
def test_offset_adds(seed: int, width: int, coefficient: float) -> None:
    draw = drawer(seed)
    vector, x = draw(width), draw(4, width)
    map_ = make.offset(vector, coefficient=coefficient)
    assert torch.equal(map_(x), x + coefficient * vector)
    assert map_.is_translation()


@given(seeds, widths)
def test_scale_is_per_channel(seed: int, width: int) -> None:
    draw = drawer(seed)
    factor, shift, x = draw(width), draw(width), draw(4, width)
    assert torch.equal(make.scale(factor, shift=shift)(x), factor * x + shift)
    assert torch.equal(make.scale(factor)(x), factor * x)
    assert isinstance(make.scale(factor), DiagonalMap)


def test_a_scale_may_be_zero_and_a_direction_may_not() -> None:
    assert make.scale(torch.zeros(3)).is_idempotent()
    with pytest.raises(DirectionError, match="a direction is zero"):
        make.offset(torch.zeros(3))


# Rotations


@given(seeds, widths)
def test_rotate_keeps_an_orthogonal_matrix_and_restores_a_stored_one(seed: int, width: int) -> None:
    draw = drawer(seed)
    q, x = torch.linalg.qr(draw(width, width))[0], draw(4, width)
    assert same(make.rotate(q)(x), x @ q.T, 100)
    stored = q.float()
    assert not DenseMap(stored.double(), torch.zeros(width).double()).is_orthogonal()
    map_ = make.rotate(stored)
    assert map_.is_orthogonal()
    assert float((map_.matrix() - q).abs().max()) <= 8 * width * FLOAT32


def test_rotate_takes_the_nearest_orthogonal_matrix() -> None:
    q = torch.linalg.qr(drawer(0)(5, 5))[0]
    stretch = torch.diag(1 + numbers([5, -5, 3, -3, 0]) * 1e-5)
    assert same(make.rotate(q @ stretch).matrix(), q, 10)


@pytest.mark.parametrize("off", [2 * STORAGE_TOLERANCE, 0.1])
def test_rotate_refuses_what_is_no_rotation(off: float) -> None:
    with pytest.raises(DirectionError, match="the matrix of a rotation is not orthogonal") as error:
        make.rotate(numbers([[1 + off, 0], [0, 1]]))
    assert f"it is {off:.1e} from the nearest one" in error.value.what
    assert error.value.fix == 'use kind = "linear" for a map that is no rotation'


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (3,), (1, 3, 3)])
def test_rotate_refuses_what_is_not_square(shape: tuple[int, ...]) -> None:
    rows = torch.zeros(shape)
    rows.reshape(-1)[:1] = 1.0
    with pytest.raises(DirectionError, match=r"a rotation needs a square matrix, not \["):
        make.rotate(rows)
    with pytest.raises(DirectionError, match=r"a linear edit needs a square matrix, not \["):
        make.linear(rows)


@pytest.mark.parametrize(
    ("degrees", "image"), [(90, [0, 1]), (-90, [0, -1]), (180, [-1, 0]), (60, [0.5, 0.75**0.5])]
)
def test_a_turn_of_the_plane_by_hand(degrees: float, image: list[float]) -> None:
    """From the first vector to the second, whatever their lengths and the angle between them."""
    map_ = make.rotate_plane(numbers([[5, 0], [3, 2]]), degrees=degrees)
    assert same(map_(numbers([1, 0])), numbers(image), 10)
    assert map_.is_orthogonal()
    back = make.rotate_plane(numbers([[3, 2], [5, 0]]), degrees=degrees)
    assert same(back.after(map_).matrix(), torch.eye(2).double(), 10)


@given(seeds, widths, st.floats(-360, 360))
def test_a_turn_leaves_the_rest_of_space(seed: int, width: int, degrees: float) -> None:
    draw = drawer(seed)
    plane, x = draw(2, width), draw(4, width)
    map_ = make.rotate_plane(plane, degrees=degrees)
    basis = make.orthonormal(plane)
    across = torch.eye(width).double() - basis.T @ basis
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned = x @ basis.T @ numbers([[cosine, sine], [-sine, cosine]]) @ basis
    assert same(map_(x), x @ across + turned, 100)
    assert map_.is_orthogonal()
    assert map_.left.shape == (width, 2)


@pytest.mark.parametrize("count", [1, 3])
def test_a_plane_has_two_directions(count: int) -> None:
    plane = drawer(0)(count, 5)
    with pytest.raises(DirectionError, match=f"spanned by two directions, not by {count}"):
        make.rotate_plane(plane if count > 1 else plane[0], degrees=30)


@given(seeds, widths)
def test_reflect_is_a_householder(seed: int, width: int) -> None:
    draw = drawer(seed)
    vector, x = draw(width), draw(4, width)
    unit = vector / vector.norm()
    map_ = make.reflect(vector)
    assert same(map_(x), x - 2 * torch.outer(x @ unit, unit), 100)
    assert same(map_(vector), -vector, 10 * float(vector.norm()))
    assert map_.is_orthogonal()
    assert same(map_.after(map_).matrix(), torch.eye(width).double(), 10)


# Linear and update


@given(seeds, widths)
def test_linear_is_the_matrix(seed: int, width: int) -> None:
    draw = drawer(seed)
    full, shift, x = draw(width, width), draw(width), draw(4, width)
    assert same(make.linear(full, shift=shift)(x), x @ full.T + shift, 100 * width)
    assert make.linear(full).is_linear()


@given(seeds, st.integers(1, 3))
def test_an_update_is_a_sum_of_outer_products(seed: int, count: int) -> None:
    draw = drawer(seed)
    outer, inner = draw(count, 5), draw(count, 7)
    update = make.update(outer, inner)
    assert update.left.shape == (5, count)
    assert update.right.shape == (count, 7)
    meant = sum(torch.outer(outer[i], inner[i]) for i in range(count))
    assert isinstance(meant, Tensor)
    assert same(update.left @ update.right, meant, 100)
    single = make.update(outer[0], inner[0])
    assert torch.equal(single.left @ single.right, torch.outer(outer[0], inner[0]))


def test_an_edit_is_a_value() -> None:
    edit = Edit(EditKind.ABLATE, "refusal", (), make.ablate(torch.ones(3)))
    with pytest.raises(AttributeError):
        edit.concept = "other"  # type: ignore[misc]
    assert [str(kind) for kind in EditKind] == [
        "ablate", "affine", "erase", "offset", "scale", "rotate", "linear", "update",
        "clamp", "masked-scale", "norm-preserving", "gate",
    ]  # fmt: skip


# What is refused

VECTOR, MATRIX = torch.ones(4), torch.eye(4)
Constructor = Callable[[Tensor], AffineMap | WeightUpdate]
TAKES_VECTORS: dict[str, Constructor] = {
    "ablate": make.ablate,
    "affine": make.affine,
    "affine's mean": lambda t: make.affine(VECTOR, mean=t),
    "erase's left": lambda t: make.erase(t.unsqueeze(-1), VECTOR.unsqueeze(0)),
    "erase's right": lambda t: make.erase(VECTOR.unsqueeze(1), t.unsqueeze(0)),
    "erase's mean": lambda t: make.erase(VECTOR.unsqueeze(1), VECTOR.unsqueeze(0), mean=t),
    "offset": make.offset,
    "scale": make.scale,
    "scale's shift": lambda t: make.scale(VECTOR, shift=t),
    "reflect": make.reflect,
    "linear": lambda t: make.linear(torch.diag(t)),
    "linear's shift": lambda t: make.linear(MATRIX, shift=t),
    "rotate": lambda t: make.rotate(torch.diag(t)),
    "rotate_plane": lambda t: make.rotate_plane(torch.stack([t, t.flip(0)]), degrees=9),
    "update's left": lambda t: make.update(t, VECTOR),
    "update's right": lambda t: make.update(VECTOR, t),
}
GOOD = numbers([1, 0.5, 2, 1])
every_constructor = pytest.mark.parametrize("name", TAKES_VECTORS)


@every_constructor
def test_the_cases_below_are_refused_for_one_reason_each(name: str) -> None:
    TAKES_VECTORS[name](torch.ones(4) if name == "rotate" else GOOD)


@every_constructor
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(name: str, value: float) -> None:
    bad = GOOD.clone()
    bad[2] = value
    with pytest.raises(DirectionError, match=r"not finite \(NaN or infinity\), or none") as error:
        TAKES_VECTORS[name](bad)
    assert error.value.fix == "look at it with `bake directions FILE` and fit it again"


@every_constructor
@pytest.mark.parametrize("value", [1e39, -1e300])
def test_values_that_no_weights_hold(name: str, value: float) -> None:
    """Their products would overflow float64, and every property of the map with them."""
    bad = GOOD.clone()
    bad[2] = value
    with pytest.raises(DirectionError, match=r"holds \d\.\de\+\d+") as error:
        TAKES_VECTORS[name](bad)
    assert error.value.why == "weights are stored in float32 at most, which ends at 3.4e+38"


def test_factors_that_no_weights_hold() -> None:
    for broken in (
        lambda: make.ablate(GOOD, strength=1e39),
        lambda: make.offset(GOOD, coefficient=1e300),
        lambda: make.affine(GOOD, alpha=-1e200),
    ):
        with pytest.raises(DirectionError, match="a low-rank map holds"):
            broken()
    assert make.ablate(GOOD, strength=1e30).idempotence_error() > 1


@every_constructor
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_values_that_are_no_floats(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(DirectionError, match=f"holds {dtype} values where floats are meant"):
        TAKES_VECTORS[name](torch.ones(4).to(dtype))


@pytest.mark.parametrize(
    "name", ["ablate", "affine", "offset", "scale", "reflect", "update's left"]
)
def test_no_values_at_all(name: str) -> None:
    with pytest.raises(DirectionError, match="or none at all"):
        TAKES_VECTORS[name](torch.ones(0))


@pytest.mark.parametrize("name", ["ablate", "affine", "offset", "reflect"])
def test_a_direction_of_zero(name: str) -> None:
    with pytest.raises(DirectionError, match="a direction is zero") as error:
        TAKES_VECTORS[name](torch.zeros(4))
    assert error.value.fix == "fit it again, or name another layer"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("affine's mean", "the mean has width 5 where 4 is meant"),
        ("erase's mean", "the mean has width 5 where 4 is meant"),
        ("scale's shift", "the shift has width 5 where 4 is meant"),
        ("linear's shift", "the shift has width 5 where 4 is meant"),
        ("erase's left", r"factors do not fit: left \[5, 1\], right \[1, 4\]"),
        ("erase's right", r"factors do not fit: left \[4, 1\], right \[1, 5\]"),
    ],
)
def test_another_width(name: str, what: str) -> None:
    with pytest.raises(DirectionError, match=what):
        TAKES_VECTORS[name](torch.ones(5))


@pytest.mark.parametrize(
    "name", ["affine's mean", "erase's mean", "scale", "scale's shift", "offset"]
)
@pytest.mark.parametrize("shape", [(1, 4), (4, 4), ()])
def test_what_is_no_vector(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(DirectionError, match=r"is no vector: its shape is \["):
        TAKES_VECTORS[name](torch.ones(shape))


@pytest.mark.parametrize("name", ["ablate", "affine", "reflect", "update's left", "update's right"])
@pytest.mark.parametrize("shape", [(1, 2, 4), ()])
def test_what_is_no_list_of_vectors(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(DirectionError, match=r"is no vector or matrix: its shape is \["):
        TAKES_VECTORS[name](torch.ones(shape))


def test_dependent_vectors() -> None:
    draw = drawer(0)
    one, two = draw(6), draw(6)
    with pytest.raises(DirectionError, match="a subspace are linearly dependent") as error:
        make.ablate(torch.stack([one, two, 2 * one - 3 * two]))
    assert "of its length off the others' span" in str(error.value.why)
    assert error.value.fix == "drop the directions that repeat others"
    with pytest.raises(DirectionError, match="linearly dependent"):
        make.ablate(torch.stack([one, one + 1e-5 * two]))
    make.ablate(torch.stack([one, one + 1e-2 * two]))  # close, and two directions all the same
    with pytest.raises(DirectionError, match="4 directions of width 3 are dependent"):
        make.ablate(draw(4, 3))


def test_dependence_is_judged_by_angle_and_not_by_length() -> None:
    one, two = drawer(0)(6), drawer(1)(6)
    long = make.ablate(torch.stack([1e6 * one, 1e-6 * two]))
    assert same(long.matrix(), make.ablate(torch.stack([one, two])).matrix(), 10)


def test_an_eraser_of_nothing() -> None:
    with pytest.raises(DirectionError, match="an eraser erases nothing"):
        make.erase(numbers([[1, 1], [0, 0]]), numbers([[1, 0], [-1, 0]]))
    # Of rank zero, as a fit leaves it where a layer carries nothing, it is the identity.
    nothing = numbers([[0], [0]])
    assert make.erase(nothing, nothing.T, mean=numbers([1, 2])).is_identity()
    assert not make.erase(numbers([[1], [0]]), numbers([[1, 0]])).is_identity()


def test_an_update_with_vectors_that_have_no_partner() -> None:
    with pytest.raises(DirectionError, match="an update has 2 left and 3 right vectors") as error:
        make.update(torch.ones(2, 5), torch.ones(3, 7))
    assert error.value.fix == "give one right vector for every left one"
    with pytest.raises(DirectionError, match="factors of an update do not fit each other"):
        WeightUpdate(torch.ones(5, 2), torch.ones(3, 7))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_strength_that_is_not_finite(value: float) -> None:
    for refused in (
        lambda: make.ablate(VECTOR, strength=value),
        lambda: make.affine(VECTOR, alpha=value),
        lambda: make.offset(VECTOR, coefficient=value),
        lambda: make.rotate_plane(torch.eye(4)[:2], degrees=math.nan),
    ):
        with pytest.raises(DirectionError, match="not finite"):
            refused()


def test_every_error_is_one_of_input() -> None:
    with pytest.raises(DirectionError) as error:
        make.ablate(torch.zeros(3))
    assert error.value.exit_code == 4
