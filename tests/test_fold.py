"""A folded layer computes what the maps around the layer compute, however its weight is stored."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bake import tiles as module
from bake.affine import AffineMap, DenseMap, DiagonalMap, LowRankMap, identity, tolerance
from bake.edits import WeightUpdate
from bake.fold import Rows, WeightFold, fold_bias, fold_weight

OUT, IN = 7, 5
seeds = st.integers(0, 2**32 - 1)
Draw = Callable[..., Tensor]


def drawer(seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def low_rank(draw: Draw, width: int, rank: int = 2) -> LowRankMap:
    return LowRankMap(draw(width, rank), draw(rank, width), draw(width))


FORMS: dict[str, Callable[[Draw, int], AffineMap]] = {
    "thin": low_rank,
    "translation": lambda draw, width: low_rank(draw, width, 0),
    "diagonal": lambda draw, width: DiagonalMap(draw(width), draw(width)),
    "dense": lambda draw, width: DenseMap(draw(width, width), draw(width)),
}


@dataclass
class Reader:
    """Reads rows of a stored tensor and remembers which."""

    stored: Tensor
    reads: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, start: int, stop: int) -> Tensor:
        self.reads.append((start, stop))
        return self.stored[start:stop].clone()


@contextmanager
def tiles_of(rows: int, fold: WeightFold) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE_VALUES", rows * fold.shape[1])
        yield


def folded(weight: Tensor, fold: WeightFold) -> Tensor:
    """Return W' as [out, in], folded from the weight as it is stored."""
    stored = weight if fold.output_axis == 0 else weight.T.contiguous()
    assert stored.shape == fold.shape
    result = torch.cat(list(fold_weight(Reader(stored), fold)))
    assert result.shape == fold.shape
    assert result.dtype == torch.float64
    return result if fold.output_axis == 0 else result.T


def folded_bias(weight: Tensor, bias: Tensor, fold: WeightFold) -> Tensor:
    """Return b' for the input's own constant."""
    stored = weight if fold.output_axis == 0 else weight.T.contiguous()
    shift = None if fold.input is None else fold.input.bias
    return fold_bias(bias, fold, read=Reader(stored), shift=shift)


def layer(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return x @ weight.T + bias


def steered(weight: Tensor, bias: Tensor, fold: WeightFold, x: Tensor) -> Tensor:
    """Return what the layer computes with the maps around it, one after another."""
    seen = x if fold.input is None else fold.input(x)
    y = layer(weight, bias, seen)
    for update in fold.updates:
        y = y + seen @ update.right.T @ update.left.T
    for rows, map_ in fold.outputs:
        index = torch.arange(y.shape[-1]) if rows is None else torch.tensor(rows)
        y = y.index_copy(-1, index, map_(y[..., index]))
    return y


def same(found: Tensor, meant: Tensor, fold: WeightFold) -> bool:
    """Whether tensors agree to the rounding of the products of a fold's maps."""
    maps = [map_ for _, map_ in fold.outputs] + ([fold.input] if fold.input is not None else [])
    size = 100.0
    for map_ in maps:
        size *= max(1.0, float(torch.linalg.matrix_norm(map_.matrix())))
    error = float((found - meant).abs().max())
    return found.shape == meant.shape and error <= tolerance(max(fold.shape)) * size


def shape_of(axis: int, out: int = OUT, inner: int = IN) -> tuple[int, int]:
    return (out, inner) if axis == 0 else (inner, out)


def everything(draw: Draw, axis: int, output: str, input_: str) -> WeightFold:
    """Return a fold with maps on both sides and two updates."""
    updates = (
        WeightUpdate(draw(OUT, 1), draw(1, IN)),
        WeightUpdate(draw(OUT, 2), draw(2, IN)),
    )
    return WeightFold(
        shape_of(axis),
        axis,
        ((None, FORMS[output](draw, OUT)),),
        updates,
        FORMS[input_](draw, IN),
    )


def check(fold: WeightFold, draw: Draw) -> None:
    """Require that the folded layer is the steered one, and that both differ from the base."""
    weight, bias, x = draw(OUT, IN), draw(OUT), draw(3, IN)
    new = layer(folded(weight, fold), folded_bias(weight, bias, fold), x)
    hooked = steered(weight, bias, fold, x)
    assert same(new, hooked, fold)
    assert float((hooked - layer(weight, bias, x)).abs().max()) > 1e-3


axes = pytest.mark.parametrize("axis", [0, 1])
every_form = pytest.mark.parametrize("form", FORMS)


# Equalities


@axes
@every_form
@settings(max_examples=15)
@given(seeds)
def test_a_map_of_the_output(axis: int, form: str, seed: int) -> None:
    draw = drawer(seed)
    check(WeightFold(shape_of(axis), axis, ((None, FORMS[form](draw, OUT)),)), draw)


@axes
@every_form
@settings(max_examples=15)
@given(seeds)
def test_a_map_of_the_input(axis: int, form: str, seed: int) -> None:
    draw = drawer(seed)
    check(WeightFold(shape_of(axis), axis, input=FORMS[form](draw, IN)), draw)


@axes
@pytest.mark.parametrize(("output", "input_"), tuple(product(FORMS, FORMS)))
@settings(max_examples=5)
@given(seeds, st.integers(1, 8))
def test_everything_at_once_in_tiles_of_any_size(
    axis: int, output: str, input_: str, seed: int, rows: int
) -> None:
    draw = drawer(seed)
    fold = everything(draw, axis, output, input_)
    with tiles_of(rows, fold):
        check(fold, draw)


@axes
@settings(max_examples=15)
@given(seeds)
def test_an_update_comes_before_the_maps_on_both_sides(axis: int, seed: int) -> None:
    draw = drawer(seed)
    fold = everything(draw, axis, "dense", "dense")
    weight, alone = draw(OUT, IN), WeightFold(fold.shape, axis, updates=fold.updates)
    added = sum((u.left @ u.right for u in fold.updates), torch.zeros(OUT, IN).double())
    assert same(folded(weight, alone), weight + added, alone)
    (_, outer), inner = fold.outputs[0], fold.input
    assert inner is not None
    meant = outer.matrix() @ (weight + added) @ inner.matrix()
    assert same(folded(weight, fold), meant, fold)


PARTS: tuple[tuple[Rows, ...], ...] = (
    (range(0, 3), range(3, 7)),
    (range(2, 5),),
    ((0, 2, 4, 6), (1, 5)),
    ((6, 0, 3),),  # in an order of its own, as heads lie in a fused projection
)


@axes
@every_form
@pytest.mark.parametrize("parts", PARTS, ids=str)
@settings(max_examples=6)
@given(seeds, st.integers(1, 8))
def test_maps_on_some_rows_of_a_fused_layer(
    axis: int, form: str, parts: tuple[Sequence[int], ...], seed: int, rows: int
) -> None:
    draw = drawer(seed)
    outputs = tuple((part, FORMS[form](draw, len(part))) for part in parts)
    fold = WeightFold(shape_of(axis), axis, outputs, input=low_rank(draw, IN))
    with tiles_of(rows, fold):
        check(fold, draw)
    weight = draw(OUT, IN)
    alone = replace(fold, input=None)
    untouched = [i for i in range(OUT) if not any(i in part for part in parts)]
    assert torch.equal(folded(weight, alone)[untouched], weight[untouched])


@every_form
@settings(max_examples=15)
@given(seeds, st.integers(1, 9))
def test_rows_of_a_table_take_the_constant_too(form: str, seed: int, rows: int) -> None:
    draw = drawer(seed)
    table, map_ = draw(9, 4), FORMS[form](draw, 4)
    fold = WeightFold((9, 4), 1, ((None, map_),), table=True)
    with tiles_of(rows, fold):
        new = torch.cat(list(fold_weight(Reader(table), fold)))
    assert same(new, map_(table), fold)
    plain = torch.cat(list(fold_weight(Reader(table), replace(fold, table=False))))
    assert same(plain, map_.linear(table), fold)
    assert float((new - plain).abs().max()) > 1e-3  # the constant is what the two differ by


def test_rows_are_read_in_storage_order_whatever_the_dtype() -> None:
    draw = drawer(0)
    weight = draw(OUT, IN).bfloat16()
    fold = WeightFold((OUT, IN), 0, ((None, low_rank(draw, OUT)),))
    new = torch.cat(list(fold_weight(Reader(weight), fold)))
    assert new.dtype == torch.float64
    assert same(new, fold.outputs[0][1].matrix() @ weight.double(), fold)


# Controls


@every_form
def test_the_wrong_axis_of_a_square_matrix_is_another_layer(form: str) -> None:
    """No shape gives it away: this is why the axis is stated."""
    draw = drawer(1)
    weight, x = draw(OUT, OUT), draw(3, OUT)
    fold = WeightFold((OUT, OUT), 0, ((None, FORMS[form](draw, OUT).with_bias(x[0])),))
    right = torch.cat(list(fold_weight(Reader(weight), fold)))
    wrong = torch.cat(list(fold_weight(Reader(weight), replace(fold, output_axis=1))))
    hooked = steered(weight, torch.zeros(OUT).double(), fold, x) - fold.outputs[0][1].bias
    assert same(x @ right.T, hooked, fold)
    if form != "translation":
        assert float((x @ wrong.T - hooked).abs().max()) > 1e-2


@axes
def test_forgetting_one_side_is_another_layer(axis: int) -> None:
    draw = drawer(2)
    fold = everything(draw, axis, "thin", "thin")
    weight, bias, x = draw(OUT, IN), draw(OUT), draw(3, IN)
    hooked = steered(weight, bias, fold, x)
    for broken in (replace(fold, outputs=()), replace(fold, updates=()), replace(fold, input=None)):
        new = layer(folded(weight, broken), folded_bias(weight, bias, fold), x)
        assert float((new - hooked).abs().max()) > 1e-2


# Biases


@axes
@pytest.mark.parametrize(("output", "input_"), tuple(product(FORMS, FORMS)))
@settings(max_examples=5)
@given(seeds, st.integers(1, 8))
def test_the_bias_is_the_layers_value_at_zero(
    axis: int, output: str, input_: str, seed: int, rows: int
) -> None:
    draw = drawer(seed)
    fold = everything(draw, axis, output, input_)
    weight, bias, addend = draw(OUT, IN), draw(OUT), draw(OUT)
    stored = weight if axis == 0 else weight.T.contiguous()
    assert fold.input is not None
    with tiles_of(rows, fold):
        found = fold_bias(
            bias, fold, read=Reader(stored), shift=fold.input.bias, addend=addend
        )  # fmt: skip
    meant = steered(weight, bias, fold, torch.zeros(IN).double()) + addend
    assert same(found, meant, fold)
    assert float((found - bias).abs().max()) > 1e-3
    without = fold_bias(bias, fold, read=Reader(stored), shift=fold.input.bias)
    assert same(found - without, addend, fold)


@axes
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_the_bias_of_a_fused_layer(axis: int, parts: tuple[Sequence[int], ...]) -> None:
    draw = drawer(3)
    outputs = tuple((part, low_rank(draw, len(part))) for part in parts)
    fold = WeightFold(shape_of(axis), axis, outputs)
    bias = draw(OUT)
    found = fold_bias(bias, fold)
    assert same(found, steered(draw(OUT, IN), bias, fold, torch.zeros(IN).double()), fold)
    untouched = [i for i in range(OUT) if not any(i in part for part in parts)]
    assert torch.equal(found[untouched], bias[untouched])


def test_a_bias_without_a_shift_reads_no_weight() -> None:
    draw = drawer(4)
    fold = WeightFold((OUT, IN), 0, ((None, low_rank(draw, OUT)),), input=low_rank(draw, IN))
    bias = draw(OUT).bfloat16()
    found = fold_bias(bias, fold)
    assert found.dtype == torch.float64
    assert same(found, fold.outputs[0][1](bias.double()), fold)


# Tiles: memory does not grow with the matrix


def passes(reads: Sequence[tuple[int, int]], rows: int) -> int:
    """Return how often the rows were read from end to end, in order and without gaps."""
    starts = [start for start, _ in reads]
    count = starts.count(0)
    assert len(reads) % count == 0
    one = list(reads[: len(reads) // count])
    assert list(reads) == one * count
    assert [start for start, _ in one] == [0, *(stop for _, stop in one[:-1])]
    assert one[-1][1] == rows
    return count


@axes
@pytest.mark.parametrize(
    ("output", "input_", "expected"),
    [
        ("diagonal", "dense", (1, 0)),  # the input lies within rows of [out, in], not of [in, out]
        ("thin", "thin", (2, 2)),
        ("thin", "diagonal", (2, 1)),
        ("diagonal", "thin", (1, 2)),
        ("diagonal", "diagonal", (1, 1)),
        ("translation", "translation", (1, 1)),
        ("dense", "diagonal", (0, 1)),
    ],
)
def test_thin_maps_read_a_tile_at_a_time(
    axis: int, output: str, input_: str, expected: tuple[int, int]
) -> None:
    """Two passes for a thin map across rows, one for maps within; 0 stands for the whole matrix."""
    draw = drawer(5)
    fold = WeightFold(
        shape_of(axis, 40, 30), axis, ((None, FORMS[output](draw, 40)),),
        input=FORMS[input_](draw, 30),
    )  # fmt: skip
    reader = Reader(draw(*fold.shape))
    with tiles_of(8, fold):
        sizes = [tile.shape[0] for tile in fold_weight(reader, fold)]
    assert max(stop - start for start, stop in reader.reads) == 8
    assert passes(reader.reads, fold.shape[0]) == max(1, expected[axis])
    assert sum(sizes) == fold.shape[0]
    assert max(sizes) == (8 if expected[axis] else fold.shape[0])


@axes
@pytest.mark.parametrize(("output", "input_"), tuple(product(FORMS, FORMS)))
def test_tiles_change_nothing(axis: int, output: str, input_: str) -> None:
    draw = drawer(6)
    fold, weight = everything(draw, axis, output, input_), draw(OUT, IN)
    whole = folded(weight, fold)
    for rows in (1, 2, 3, 6, 7, 100):
        with tiles_of(rows, fold):
            assert same(folded(weight, fold), whole, fold)


def test_no_tile_is_read_before_it_is_asked_for() -> None:
    draw = drawer(7)
    fold = WeightFold((40, 30), 0, input=low_rank(draw, 30))
    reader = Reader(draw(40, 30))
    with tiles_of(8, fold):
        tiles = fold_weight(reader, fold)
        assert reader.reads == []
        next(tiles)
        assert reader.reads == [(0, 8)]


def test_a_row_wider_than_a_tile_is_a_tile() -> None:
    fold = WeightFold((3, 50), 0, ((None, identity(3)),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE_VALUES", 10)
        assert [tile.shape for tile in fold_weight(Reader(drawer(0)(3, 50)), fold)] == [(1, 50)] * 3


def test_a_tile_holds_as_many_values_as_it_says() -> None:
    for shape in ((128256, 4096), (4096, 14336), (1 << 20, 3)):
        rows = next(module.spans(shape))[1]
        assert rows * shape[1] <= module.TILE_VALUES
        assert (rows + 1) * shape[1] > module.TILE_VALUES


def test_a_fold_without_maps_copies() -> None:
    weight = drawer(8)(OUT, IN)
    assert torch.equal(folded(weight, WeightFold((OUT, IN), 0)), weight)
