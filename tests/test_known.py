"""What the plan knows of the stream, against what is constant over many tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bake import edits as make
from bake.affine import AffineMap, LowRankMap, chain, tolerance
from bake.plan.known import Known

seeds = st.integers(0, 2**32 - 1)


class Draw:
    """Random tensors of one seed, in float64."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def basis(self, rows: int, width: int) -> Tensor:
        """Return orthonormal rows."""
        return torch.linalg.qr(self(width, width))[0][:rows]

    def mixed(self, rows: Tensor) -> Tensor:
        """Return another orthonormal basis of the span of orthonormal rows."""
        return self.basis(rows.shape[0], rows.shape[0]) @ rows


def close(found: Tensor, meant: Tensor, size: float = 1.0) -> bool:
    error = float((found - meant).abs().max()) if found.numel() else 0.0
    return found.shape == meant.shape and error <= tolerance(16) * max(1.0, size)


def known_of(known: Known) -> tuple[Tensor, Tensor]:
    assert known.functionals is not None and known.values is not None
    return known.functionals, known.values


def empty(width: int) -> Tensor:
    return torch.zeros(0, width).double()


# Asking


@given(seeds, st.integers(1, 5))
def test_what_lies_in_the_span_has_its_value(seed: int, count: int) -> None:
    draw = Draw(seed)
    functionals, values, mix = draw.basis(count, 8), draw(count), draw(3, count)
    found = Known(functionals, values).constant(mix @ functionals)
    assert found is not None
    assert close(found, mix @ values, 100)


@given(seeds, st.integers(0, 5), st.floats(1e-9, 1))
def test_what_leaves_the_span_has_none(seed: int, count: int, leak: float) -> None:
    draw = Draw(seed)
    basis = draw.basis(count + 1, 8)
    functionals, outside = basis[:count], basis[count]
    rows = draw.mixed(functionals) if count else empty(8)
    rows = torch.cat([rows, leak * outside.unsqueeze(0)])
    rows[0] += leak * outside
    assert Known(functionals, draw(count)).constant(rows) is None


def test_one_row_outside_is_enough_to_know_nothing() -> None:
    basis = Draw(0).basis(3, 6)
    known = Known(basis[:2], torch.ones(2).double())
    assert known.constant(basis[:2]) is not None
    assert known.constant(basis) is None
    assert known.constant(basis[2:]) is None


def test_rounding_is_not_outside() -> None:
    draw = Draw(1)
    basis = draw.basis(3, 6)
    known = Known(basis[:2], torch.ones(2).double())
    assert known.constant(basis[:2] + 2.0**-52 * basis[2]) is not None
    assert known.constant(basis[:2] + 1e-10 * basis[2]) is None


def test_nothing_asked_is_nothing_answered() -> None:
    for known in (Known(None, None), Known(empty(6), torch.zeros(0).double())):
        found = known.constant(empty(6))
        assert found is not None
        assert found.shape == (0,)


def test_before_the_embedding_everything_is_zero() -> None:
    rows = Draw(0)(3, 6)
    found = Known(None, None).constant(rows)
    assert found is not None
    assert torch.equal(found, torch.zeros(3).double())
    assert Known(empty(6), torch.zeros(0).double()).constant(rows) is None  # the other extreme


# Moving


@given(seeds, st.integers(0, 5))
def test_a_constant_moves_the_values(seed: int, count: int) -> None:
    draw = Draw(seed)
    functionals, values, shift = draw.basis(count, 8), draw(count), draw(8)
    moved, found = known_of(Known(functionals, values).shifted(shift))
    assert torch.equal(moved, functionals)
    assert close(found, values + functionals @ shift, 100)


def test_before_the_embedding_nothing_can_be_shifted() -> None:
    with pytest.raises(AssertionError, match="takes no constant"):
        Known(None, None).shifted(torch.ones(6).double())


@given(seeds, st.integers(1, 5))
def test_a_turn_carries_the_values_along(seed: int, count: int) -> None:
    """f(x) = (f Qᵀ)(Q x): what was constant of x is constant of Q x."""
    draw = Draw(seed)
    functionals, values, turn = draw.basis(count, 8), draw(count), make.rotate(draw.basis(8, 8))
    moved, found = known_of(Known(functionals, values).turned(turn.linear(functionals)))
    x = draw(8)
    assert close(moved @ turn(x), functionals @ x, 100)
    assert torch.equal(found, values)


# Meeting a write


@given(seeds, st.integers(0, 3), st.integers(0, 2), st.integers(0, 2))
def test_a_meeting_is_the_intersection(seed: int, shared: int, one: int, other: int) -> None:
    draw = Draw(seed)
    mix = draw(8, 8) + 3 * torch.eye(8).double()
    first, second = mix[: shared + one], torch.cat([mix[:shared], mix[5 : 5 + other]])
    functionals = torch.linalg.qr(first.T)[0].T
    values = draw(shared + one)
    rows = torch.linalg.qr(second.T)[0].T
    found, constants = known_of(Known(functionals, values).meet(rows))
    both = torch.cat([functionals, rows])
    size = first.shape[0] + second.shape[0] - int(torch.linalg.matrix_rank(both))
    assert found.shape == (size, 8)
    assert size == shared  # the spans were made to share as much, and no more
    assert close(found @ found.T, torch.eye(size).double())
    for span in (functionals, rows):
        assert close(found - found @ span.T @ span, torch.zeros(size, 8).double(), 100)
    assert close(constants, found @ functionals.T @ values, 100)


@given(seeds, st.integers(0, 6))
def test_the_first_write_decides_alone(seed: int, count: int) -> None:
    rows = Draw(seed).basis(count, 8)
    found, values = known_of(Known(None, None).meet(rows))
    assert torch.equal(found, rows)
    assert torch.equal(values, torch.zeros(count).double())


@settings(max_examples=24)  # of forty meetings each
@given(seeds, st.integers(1, 8))
def test_meeting_the_same_again_changes_nothing(seed: int, count: int) -> None:
    draw = Draw(seed)
    functionals, values = draw.basis(count, 8), draw(count)
    known = Known(functionals, values)
    for _ in range(40):
        known = known.meet(draw.mixed(functionals))
    found, constants = known_of(known)
    assert found.shape == (count, 8)
    assert close(found.T @ found, functionals.T @ functionals, 100)
    assert close(found.T @ constants, functionals.T @ values, 100)


def test_a_write_without_an_edit_ends_all_knowledge() -> None:
    draw = Draw(2)
    known = Known(draw.basis(3, 6), draw(3)).meet(empty(6))
    functionals, values = known_of(known)
    assert functionals.shape == (0, 6)
    assert values.shape == (0,)


@pytest.mark.parametrize(("angle", "count"), [(0.0, 1), (1e-15, 1), (1e-9, 0), (0.5, 0)])
def test_nearly_parallel_is_not_parallel(angle: float, count: int) -> None:
    basis = Draw(3).basis(2, 6)
    turned = basis[:1] + angle * basis[1:]
    turned = turned / torch.linalg.vector_norm(turned)
    functionals, _ = known_of(Known(basis[:1], torch.ones(1).double()).meet(turned))
    assert functionals.shape[0] == count


def test_wide_streams_cost_no_square_matrix() -> None:
    """A square matrix of 16384 channels takes 2 GiB, and its decomposition many minutes."""
    unit = torch.zeros(1, 16384).double()
    unit[0, 5] = 1
    known = Known(None, None).meet(unit)
    for _ in range(200):
        known = known.meet(unit).shifted(unit[0])
    _, values = known_of(known)
    assert values.tolist() == [200.0]


# A whole stream, token by token


def removing(directions: Tensor, chosen: list[int], draw: Draw) -> AffineMap:
    """Return an affine ablation of some directions, with a mean, and none for no direction."""
    width = directions.shape[1]
    if not chosen:
        return LowRankMap(empty(width).T, empty(width), torch.zeros(width).double())
    return make.affine(directions[chosen], mean=draw(width))


@settings(max_examples=60)
@given(seeds, st.data())
def test_what_is_known_is_what_is_constant_over_tokens(seed: int, data: st.DataObject) -> None:
    """Random hooks on the stream and on writes; hooks touch of the skip path what is constant."""
    draw, width, tokens = Draw(seed), 7, 50
    directions = draw(4, width)
    subsets = st.lists(st.sampled_from(range(4)), max_size=3, unique=True)
    known, stream = Known(None, None), torch.zeros(tokens, width).double()
    for _ in range(3):
        output = removing(directions, data.draw(subsets), draw)
        hook = removing(directions, data.draw(subsets), draw)
        if known.constant(hook.delta_factors()[1]) is None:
            hook = removing(directions, [], draw)
        stream = hook(stream + output(draw(tokens, width)))
        # What the plan does: the skip path's part is a constant, the write's is A O w.
        left, right = hook.delta_factors()
        fixed = known.constant(right)
        assert fixed is not None
        constant = hook(output.bias) + left @ fixed
        write = chain([output, hook], width).with_bias(torch.zeros(width).double())
        known = known.meet(write.left_null()).shifted(constant)
        functionals, values = known_of(known)
        assert close(stream @ functionals.T, values.expand(tokens, -1), 1000)
        spread = stream - stream.mean(dim=0)
        varying = int(torch.linalg.matrix_rank(spread, rtol=1e-10))
        assert functionals.shape[0] == width - varying
