"""Methods of ``bake fit`` against other derivations, and what their file does in a recipe.

Rows are drawn at random for a tiny Llama's stream; the split says what a fit has seen of them.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bake.affine import AffineMap
from bake.directions import SAYS, Role, read_directions
from bake.errors import InputError, UsageError, VerificationFailed
from bake.fit import METHODS, Classes, sweep
from bake.fit.auroc import auroc, margin
from bake.fit.plot import draw
from bake.fit.split import split
from bake.jobs import open_model
from bake.jobs.fit_directions import FitRequest, FittedDirections, fit_directions
from bake.jobs.fit_proposal import Proposal, propose
from bake.sites import Site, SiteKind
from bake.verify.interval import NORMAL

WIDTH = 24  # of the tiny Llama
SITE = "resid_post.1"
EXACT = 1e-10
"""Relative: float64 over sums of a hundred products, with condition numbers of a few hundred."""
WRITTEN = 1e-6
"""Relative: a coefficient in a recipe has six digits."""


def rows(count: int, seed: int, shift: float = 0.0) -> Tensor:
    """Return correlated rows, of another spread in each channel, with a few channels shifted."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) / WIDTH**0.5
    x = torch.randn(count, WIDTH, generator=generator) @ (mixing + torch.eye(WIDTH))
    x = x * (1 + 0.3 * shift * torch.linspace(-1, 1, WIDTH)) + 3 * torch.linspace(-1, 1, WIDTH)
    x[:, :6] += shift
    return x


def classes(n: int = 60, m: int = 60) -> Classes:
    return Classes(rows(n, 1, 1.5).double(), rows(m, 2).double())


def tensors(method: str, of: Classes) -> Mapping[Role, Tensor]:
    found = METHODS[method].fit(of)
    assert found is not None
    assert float(of.difference @ found.probe) > 0  # scores are larger for the positive class
    return found.tensors


def near(found: Tensor, wanted: Any, relative: float = EXACT) -> bool:
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    return float((found - wanted).abs().max()) <= relative * float(wanted.abs().max())


# Each method against another derivation


def test_a_difference_of_means_and_its_reference() -> None:
    of = classes(60, 40)
    wanted = np.mean(of.positive.numpy(), axis=0) - np.mean(of.negative.numpy(), axis=0)
    assert near(tensors("mean-difference", of)[Role.VECTOR], wanted)
    found = tensors("ace", of)
    assert near(found[Role.VECTOR], wanted)
    assert near(found[Role.MEAN], np.mean(of.negative.numpy(), axis=0))
    pooled = torch.cat([of.positive, of.negative]).mean(0)
    assert not near(found[Role.MEAN], pooled, 1e-3)  # the reference is one class's mean


@pytest.mark.parametrize(("method", "name"), [("leace", "leace"), ("orthogonal", "orth")])
def test_erasers_are_the_packages(method: str, name: str) -> None:
    """Of two labels in two columns, as it is used for more classes, where we give it one."""
    from concept_erasure import LeaceEraser

    of = classes(60, 40)
    x = torch.cat([of.positive, of.negative])
    z = torch.cat([torch.ones(60), torch.zeros(40)]).double()
    found = tensors(method, of)
    ours = found[Role.LEFT] @ found[Role.RIGHT]
    theirs = LeaceEraser.fit(x, torch.stack([z, 1 - z], dim=1), method=name)
    assert near(ours, theirs.proj_left @ theirs.proj_right)
    assert near(found[Role.MEAN], x.mean(0))
    other = LeaceEraser.fit(x, z[:, None], method="orth" if name == "leace" else "leace")
    assert not near(ours, other.proj_left @ other.proj_right, 1e-2)
    # Orthogonal erasure in closed form; LEACE is none.
    unit = of.difference / of.difference.norm()
    assert near(ours, torch.outer(unit, unit)) is (method == "orthogonal")


def test_small_activations_are_erased_as_large_ones() -> None:
    """The package's own limit is a length of activations, below which it erases nothing."""
    from concept_erasure import LeaceEraser

    of = classes()
    small = Classes(1e-4 * of.positive, 1e-4 * of.negative)
    z = torch.cat([torch.ones(60), torch.zeros(60)]).double()[:, None]
    theirs = LeaceEraser.fit(torch.cat([small.positive, small.negative]), z, method="orth")
    assert not theirs.proj_right.any()  # or there would be nothing to mend
    for method in ("leace", "orthogonal"):
        left, right = (tensors(method, small)[role] for role in (Role.LEFT, Role.RIGHT))
        whole = tensors(method, of)
        assert near(left @ right, whole[Role.LEFT] @ whole[Role.RIGHT], 1e-6)


def test_gaussian_transport_takes_mean_and_deviation() -> None:
    of = classes(60, 40)
    found = tensors("gaussian-act", of)
    y = (of.negative * found[Role.SCALE] + found[Role.OFFSET]).numpy()
    assert near(torch.tensor(y.mean(0)), of.positive.numpy().mean(0))
    assert near(torch.tensor(y.std(0, ddof=1)), of.positive.numpy().std(0, ddof=1))
    assert not near(torch.tensor(of.negative.numpy().std(0)), of.positive.numpy().std(0), 1e-2)


@pytest.mark.parametrize(("n", "m"), [(60, 60), (60, 40), (7, 5)])
def test_linear_transport_is_least_squares_over_the_coupling(n: int, m: int) -> None:
    """Sorted values in pairs, each repeated until both classes have as many."""
    of = classes(n, m)
    found = tensors("linear-act", of)
    x = np.sort(np.repeat(of.negative.numpy(), n, axis=0), axis=0)
    y = np.sort(np.repeat(of.positive.numpy(), m, axis=0), axis=0)
    fits = [np.polyfit(x[:, i], y[:, i], 1) for i in range(WIDTH)]
    assert near(found[Role.SCALE], [slope for slope, _ in fits])
    assert near(found[Role.OFFSET], [constant for _, constant in fits])
    gaussian = tensors("gaussian-act", of)
    assert not near(found[Role.SCALE], gaussian[Role.SCALE], 1e-3)
    # It is the best line: that of the Gaussian transport leaves more.
    left = [
        float(((x * each[Role.SCALE].numpy() + each[Role.OFFSET].numpy() - y) ** 2).sum())
        for each in (found, gaussian)
    ]
    assert left[0] < 0.999 * left[1]


def test_units_that_do_not_vary_are_left_alone_or_shifted() -> None:
    of = classes()
    of.negative[:, 2] = 0.25
    for method in ("mean-act", "gaussian-act"):  # ml-act's std_eps
        found = tensors(method, of)
        assert found[Role.OFFSET][2] == 0
        assert method == "mean-act" or found[Role.SCALE][2] == 1
    found = tensors("linear-act", of)
    assert found[Role.SCALE][2] == 1
    assert near(found[Role.OFFSET][2], of.positive[:, 2].mean() - 0.25)


@pytest.fixture(scope="module")
def repeng() -> Any:
    """repeng's module. repeng 0.4.0 names ``np.float_``, which NumPy 2 calls float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "float_", np.float64, raising=False)
        from repeng import extract
    return extract


@pytest.mark.parametrize("method", ["pca-diff", "pca-center"])
@pytest.mark.parametrize("swapped", [False, True])
def test_components_are_repengs(
    method: str, swapped: bool, repeng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real package on the same rows; the sign too, whichever class is the positive one."""
    of = classes()
    if swapped:
        of = Classes(of.negative, of.positive)
    monkeypatch.setattr(repeng, "model_layer_list", lambda model: [None] * 3)
    interleaved = torch.stack([of.positive, of.negative], dim=1).flatten(0, 1).numpy()
    monkeypatch.setattr(repeng, "batched_get_hiddens", lambda *_: {1: interleaved.copy()})
    inputs = [repeng.DatasetEntry("", "")] * 60
    name = method.replace("-", "_")
    theirs = repeng.read_representations(None, None, inputs, [1], method=name)[1]
    found = METHODS[method].fit(of)
    assert found is not None
    single = 1e-5  # repeng rounds to float32
    assert near(found.tensors[Role.VECTOR], theirs, single)
    assert not near(-found.tensors[Role.VECTOR], theirs, single)
    other = METHODS["pca-center" if method == "pca-diff" else "pca-diff"].fit(of)
    assert other is not None and not near(other.tensors[Role.VECTOR], theirs, 1e-2)


def test_a_component_points_to_the_class_that_most_pairs_say() -> None:
    """And where as many pairs say either, to the one that the means say."""
    axis = torch.zeros(WIDTH).double()
    axis[0] = 1.0
    negative = torch.zeros(4, WIDTH).double()
    for gaps, sign in (([1, 1, 1, -9], 1), ([-1, -1, -1, 9], -1), ([5, 5, -1, -1], 1)):
        positive = torch.tensor(gaps).double()[:, None] * axis
        found = METHODS["pca-center"].fit(Classes(positive, negative))
        assert found is not None and near(found.tensors[Role.VECTOR], sign * axis)


# What the file does, read in a recipe as any file is

Fit = Callable[..., tuple[FittedDirections, Proposal]]


@pytest.fixture
def fit(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Fit:
    """Return a function that fits saved activations of a tiny Llama."""
    model = open_model(tiny_checkpoint("llama"))

    def run(
        positive: Tensor, negative: Tensor, **options: Any
    ) -> tuple[FittedDirections, Proposal]:
        paths = {}
        for name, values in (("positive", positive), ("negative", negative)):
            paths[name] = tmp_path / f"{name}.npy"
            np.save(paths[name], values.numpy())
        asked = FitRequest(**{**paths, "concept": "c", "at": (SITE,), **options})
        found = fit_directions(model, asked)
        return found, propose(found, tmp_path / "c.safetensors")

    return run


def acting(
    fit: Fit, method: str, positive: Tensor, negative: Tensor
) -> tuple[AffineMap, Tensor, Tensor]:
    """Return the map of the recipe that is proposed, and the rows that it was fitted on."""
    found, proposal = fit(positive, negative, method=method)
    (edit,) = proposal.request.plan.reference
    assert isinstance(edit.map, AffineMap)
    assert [str(site) for site in edit.sites] == [SITE]
    assert proposal.request.refusal() is None
    part = found.sweep.split.fit
    seen = positive[list(part.positive)].double(), negative[list(part.negative)].double()
    return edit.map, *seen


def moved(map_: AffineMap, x: Tensor) -> Tensor:
    return map_(x) - x


@pytest.mark.parametrize("method", ["leace", "orthogonal"])
def test_an_eraser_leaves_no_linear_information(method: str, fit: Fit) -> None:
    map_, positive, negative = acting(fit, method, rows(60, 1, 1.5), rows(60, 2))
    x = torch.cat([positive, negative])
    labels = torch.cat([torch.ones(len(positive)), -torch.ones(len(negative))]).double()

    def covariance(x: Tensor) -> float:
        return float((labels @ (x - x.mean(0))).abs().max()) / len(x)

    assert covariance(map_(x)) <= EXACT * covariance(x)
    assert covariance((map_(x) + x) / 2) > 0.4 * covariance(x)  # half of it leaves half
    assert near(map_(x).mean(0), x.mean(0))
    # LEACE moves the rows less, as their own covariance measures it.
    if method == "leace":
        other, *_ = acting(fit, "orthogonal", rows(60, 1, 1.5), rows(60, 2))
        inverse = torch.linalg.inv(torch.cov(x.T))
        sizes = [float(((moved(m, x) @ inverse) * moved(m, x)).sum()) for m in (map_, other)]
        assert sizes[0] < 0.9 * sizes[1]


def test_affine_editing_sets_the_reference(fit: Fit) -> None:
    map_, positive, negative = acting(fit, "ace", rows(60, 1, 1.5), rows(60, 2))
    vector = positive.mean(0) - negative.mean(0)
    x = torch.cat([positive, negative])
    wanted = negative.mean(0) @ vector
    assert near(map_(x) @ vector, wanted.expand(len(x)))
    assert not near(x @ vector, wanted.expand(len(x)), 0.1)
    unit = vector / vector.norm()
    across = moved(map_, x) - torch.outer(moved(map_, x) @ unit, unit)
    assert float(across.abs().max()) <= EXACT * float(moved(map_, x).abs().max())


@pytest.mark.parametrize("method", ["mean-difference", "mean-act", "gaussian-act", "linear-act"])
def test_transport_takes_one_mean_to_the_other(method: str, fit: Fit) -> None:
    map_, positive, negative = acting(fit, method, rows(60, 1, 1.5), rows(60, 2))
    assert near(map_(negative).mean(0), positive.mean(0))
    assert not near(map_(positive).mean(0), negative.mean(0), 0.1)  # it has a direction
    spread = near(map_(negative).std(0), positive.std(0))
    assert spread is (method == "gaussian-act")


def test_a_component_takes_one_mean_to_the_other_along_itself(fit: Fit) -> None:
    map_, positive, negative = acting(fit, "pca-center", rows(60, 1, 1.5), rows(60, 2))
    step = moved(map_, negative[:1])[0]
    gap = (positive.mean(0) - negative.mean(0)) @ step / step.norm()
    assert near(step.norm(), gap, WRITTEN) and float(gap) > 0
    assert not near(step, positive.mean(0) - negative.mean(0), 0.05)


def test_the_file_says_where_it_is_from(fit: Fit, tmp_path: Path) -> None:
    positive, negative = rows(60, 1, 1.5), rows(60, 2)
    found, proposal = fit(positive, negative, method="linear-act")
    path = tmp_path / "again.safetensors"
    path.write_bytes(proposal.directions)
    read = read_directions(path)
    assert (read.format, read.concept, read.items[0].site) == ("bake", "c", SITE)
    assert read.metadata["examples"] == "36 + 36 fitted, 12 + 12 chose the site, 12 + 12 judged it"
    assert "positive.npy, saved activations, sha256:" in read.metadata["positive"]
    assert read.metadata["model_digest"] == found.model.checkpoint.digest()
    assert "q_all" in read.metadata[SAYS]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exact_at_a_modules_output_and_the_same_twice(
    method: str, fit: Fit
) -> None:
    positive, negative = rows(60, 1, 1.5), rows(60, 2)
    options = {"method": method, "at": ("attn_out.1",)}
    _, once = fit(positive, negative, **options)
    assert once.exactness == "exact" and once.request.recipe.export.allow == ()
    again = fit(positive, negative, **options)[1]
    assert (again.directions, again.recipe) == (once.directions, once.recipe)
    assert fit(positive, negative, **options, seed=1)[1].directions != once.directions


@pytest.mark.parametrize(
    ("method", "allow", "exactness"),
    [
        ("mean-difference", (), "exact"),
        ("ace", ("relocate",), "relocated"),
        ("gaussian-act", ("relocate",), "relocated"),
    ],
)
def test_a_recipe_allows_no_more_than_its_plan_needs(
    method: str, allow: tuple[str, ...], exactness: str, fit: Fit
) -> None:
    _, proposal = fit(rows(60, 1, 1.5), rows(60, 2), method=method)
    assert (proposal.request.recipe.export.allow, proposal.exactness) == (allow, exactness)
    assert proposal.request.refusal() is None


# AUROC, the split, and noise


def test_auroc_counts_pairs_and_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 9, (n,), generator=generator).double() for n in (17, 11))
    pairs = [(x > y) + (x == y) / 2 for x in a.tolist() for y in b.tolist()]
    assert math.isclose(auroc(a, b).value, sum(pairs) / len(pairs))
    assert math.isclose(auroc(a, b).value + auroc(b, a).value, 1.0)
    assert auroc(a, b).count == 28


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0, 50.0])
def test_an_interval_ends_where_the_error_does(shift: float) -> None:
    """By Hanley and McNeil's variance with their own Q1 and Q2, at both limits."""
    generator = torch.Generator().manual_seed(1)
    n, m = 16, 12
    a, b = (torch.randn(k, generator=generator).double() for k in (n, m))
    found = auroc(a + shift, b)
    assert found.low < found.high
    for limit in {found.low, found.high} - {0.0, 1.0}:
        q1, q2 = limit / (2 - limit), 2 * limit**2 / (1 + limit)
        extra = (n + m) / 2 - 1
        variance = limit * (1 - limit) + extra * (q1 - limit**2) + extra * (q2 - limit**2)
        distance = NORMAL * math.sqrt(variance / (n * m))
        assert math.isclose(abs(found.value - limit), distance, rel_tol=1e-9)
    if shift == 50.0:
        assert found.value == found.high == 1.0 and 0.7 < found.low < 0.95


def test_a_margin_is_in_units_of_the_spread() -> None:
    a, b = torch.tensor([3.0, 5.0]).double(), torch.tensor([1.0, -1.0]).double()
    assert math.isclose(margin(a, b), 4.0)
    assert margin(a[:1], b[:1]) == math.inf and margin(b[:1], a[:1]) == -math.inf
    assert margin(a[:1], a[:1]) == 0.0


def test_a_split_holds_every_example_once_and_keeps_pairs() -> None:
    parts = split(20, 20, held_out=0.4, seed=3)
    for side in ("positive", "negative"):
        held = [set(getattr(p, side)) for p in (parts.fit, parts.choose, parts.judge)]
        assert [len(one) for one in held] == [12, 4, 4]
        assert set.union(*held) == set(range(20))
    assert parts.fit.positive == parts.fit.negative
    assert parts == split(20, 20, held_out=0.4, seed=3) != split(20, 20, held_out=0.4, seed=4)
    # The same on every machine: written down.
    assert parts.judge.positive == (1, 5, 12, 17)


@pytest.mark.parametrize(
    ("counts", "held_out", "error", "words"),
    [
        ((1, 80), 0.4, InputError, r"the positive class has 1 example\b"),
        ((80, 9), 0.4, InputError, "the negative class has 9 examples"),
        ((80, 80), 0.0, UsageError, "no share between 0 and 1"),
        ((80, 80), math.nan, UsageError, "no share between 0 and 1"),
        ((80, 80), 0.99, UsageError, "leaves 0 of 80 examples to fit"),
    ],
)
def test_a_split_refuses(
    counts: tuple[int, int], held_out: float, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        split(*counts, held_out=held_out, seed=0)
    split(10, 10, held_out=0.4, seed=0)  # what the advice says suffices


def noise(sites: int, seed: int) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """Return rows of two classes that do not differ."""
    generator = torch.Generator().manual_seed(seed)
    places = [Site(SiteKind.RESID_POST, layer) for layer in range(sites)]
    draw = lambda: {site: torch.randn(40, 8, generator=generator) for site in places}  # noqa: E731
    return draw(), draw()


def test_noise_is_not_proposed() -> None:
    """The best of a hundred sites looks good to the examples that chose it, and not to others."""
    parts = split(40, 40, held_out=0.4, seed=0)
    found = [sweep(METHODS["mean-difference"], *noise(100, seed), parts) for seed in range(12)]
    assert sum(one.best.chosen_by.low > 0.5 for one in found) >= 10
    assert sum(one.separates for one in found) <= 1  # 2.5 % each
    failed = next(one for one in found if not one.separates).failure()
    assert isinstance(failed, VerificationFailed) and "better than chance" in failed.what
    # The control: the same noise with a shift at one site is found there.
    positive, negative = noise(40, 0)
    positive[Site(SiteKind.RESID_POST, 7)] += 1.0
    told = sweep(METHODS["mean-difference"], positive, negative, parts)
    assert told.separates and str(told.best.site) == "resid_post.7" and told.failure() is None


def test_a_site_where_nothing_varies_is_left_out() -> None:
    positive, negative = noise(3, 0)
    first = Site(SiteKind.RESID_POST, 0)
    positive[first][:] = negative[first][:] = 0.7
    parts = split(40, 40, held_out=0.4, seed=0)
    for name, method in METHODS.items():
        found = sweep(method, positive, negative, parts)
        assert found.left_out == (first,), name
        assert len(found.fits) == 2
    constant = {first: positive[first]}
    with pytest.raises(VerificationFailed, match="do not differ at any site"):
        sweep(METHODS["leace"], constant, constant, parts)


def test_a_sweep_is_drawn_the_same_every_time() -> None:
    parts = split(40, 40, held_out=0.4, seed=0)
    found = sweep(METHODS["mean-difference"], *noise(4, 0), parts)
    assert draw(found, "svg") == draw(found, "svg")
    text = draw(found, "svg").decode()
    assert "chance" in text and f"{found.best.site}, judged" in text
    assert draw(found, "png")[:4] == b"\x89PNG"


# Saved activations


def saved(folder: Path, name: str, values: Mapping[str, Tensor]) -> Path:
    save_file({key: value.contiguous() for key, value in values.items()}, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("change", "at", "words"),
    [
        ({"0": (60, 24), "1": (60, 24)}, "resid_post.*", "holds nothing at resid_post.2"),
        ({"0": (60, 24), "3": (60, 24)}, "resid_post.0", "is of layer 3, and the model has 3"),
        ({"1": (60, 23)}, "resid_post.1", "23 wide, and the site is 24 wide"),
        ({"1": (60, 2, 24)}, "resid_post.1", r"\[60, 2, 24\] is no \[N, d\]"),
        ({"1": (60, 24), "x": (60, 24)}, "resid_post.1", "'x' names neither a site nor a layer"),
        ({"1": (60, 24)}, "resid", "names a layer, and no site of it"),
        ({"0": (60, 24), "1": (59, 24), "2": (60, 24)}, "resid_post.*", "hold 59, 60 examples"),
        ({"1": (60, 24), "resid_post.1": (60, 24)}, "resid_post.1", "are of one site"),
    ],
)
def test_saved_activations_are_refused(
    change: dict[str, tuple[int, ...]],
    at: str,
    words: str,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    generator = torch.Generator().manual_seed(0)
    paths = [
        saved(
            tmp_path,
            f"{name}.safetensors",
            {key: torch.randn(shape, generator=generator) for key, shape in change.items()},
        )
        for name in ("a", "b")
    ]
    model = open_model(tiny_checkpoint("llama"))
    asked = FitRequest(positive=paths[0], negative=paths[1], concept="c", at=(at,))
    with pytest.raises(InputError, match=words):
        fit_directions(model, asked)


def test_arrays_are_refused(fit: Fit) -> None:
    good, other = rows(60, 1, 1.5), rows(60, 2)
    bad = good.clone()
    bad[4, 3] = math.nan
    with pytest.raises(InputError, match="of 1 examples are not finite, first of example 5"):
        fit(bad, other)
    bad[4, 3] = math.inf
    with pytest.raises(InputError, match="not finite"):
        fit(good, bad)
    with pytest.raises(InputError, match=r"\[60, 24\] is of 1 site, and --at selects 3"):
        fit(good, other, at=("resid_post.*",))
    with pytest.raises(InputError, match="is of 4 sites, and --at selects 3"):
        fit(good[:, None].repeat(1, 4, 1), other, at=("resid_post.*",))
    with pytest.raises(UsageError, match="both classes hold the same activations"):
        fit(good, good)
    with pytest.raises(UsageError, match="takes pairs, and the classes have 60 and 50 examples"):
        fit(good, other[:50], method="pca-diff")
    with pytest.raises(InputError, match=r"the negative class has 1 example\b"):
        fit(good, other[:1])
    with pytest.raises(UsageError, match="there is no method 'lece'") as caught:
        fit(good, other, method="lece")
    assert caught.value.fix == "did you mean 'leace'?"
    for option in ({"position": "mean"}, {"dtype": "bfloat16"}, {"streamed": True}):
        with pytest.raises(UsageError, match="is for prompts, and these are activations"):
            fit(good, other, **option)
    fit(good, other)  # the control


def test_arrays_of_several_sites_are_theirs_in_order(fit: Fit) -> None:
    positive, negative = (rows(60, seed)[:, None].repeat(1, 3, 1) for seed in (1, 2))
    positive[:, 2] += 1.0
    found, proposal = fit(
        positive, negative, at=("resid_post.0", "mlp_out.1", "resid_post.2"), every_site=True
    )
    assert [str(one.site) for one in found.sweep.fits] == [
        "resid_post.0", "mlp_out.1", "resid_post.2",
    ]  # fmt: skip
    assert str(found.sweep.best.site) == "resid_post.2"
    acts = [[str(site) for site in edit.sites] for edit in proposal.request.plan.reference]
    assert sorted(acts) == [["mlp_out.1"], ["resid_post.0"], ["resid_post.2"]]
    assert "without the edits of the others" in found.directions.metadata[SAYS]
