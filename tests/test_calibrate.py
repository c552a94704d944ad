"""Stand-ins for edits without an exact fold: the regression, the choice of writers, the result."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from harness import Base, base_at, edit, plan_of, vector
from torch import Tensor

from bake.affine import LowRankMap
from bake.approximate import Calibration, Settings, calibrate
from bake.approximate.regression import Moments, regress
from bake.approximate.runs import batches_of, divergence
from bake.approximate.stand_in import hard_edits
from bake.approximate.writers import places_for
from bake.edits import Edit, EditKind, WeightUpdate, ablate, offset
from bake.errors import InputError, UsageError
from bake.plan import Exactness
from bake.recipe import build_edits, load_recipe, read_artifacts
from bake.sites import Site, SiteKind, parse_site
from bake.verify.prompts import read_prompts

RECIPES = Path(__file__).parents[1] / "recipes"
QUICKSTART = RECIPES / "quickstart" / "model"
TOKENS, INPUTS, WIDTH = 600, 24, 16
TEXTS = 20  # with all 64 nothing here comes out otherwise


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moments(inputs: Tensor, targets: Tensor, *, constant: bool = True) -> Moments:
    """Return the moments of some tokens, added in two parts."""
    summed = Moments(inputs.shape[1], targets.shape[1], constant=constant)
    for part in (slice(None, 100), slice(100, None)):
        summed.add(inputs[part], targets[part])
    return summed


def halves(targets: Tensor, inputs: Tensor, *, constant: bool = True) -> tuple[Moments, Moments]:
    cut = len(inputs) // 2
    return tuple(  # type: ignore[return-value]
        moments(inputs[part], targets[part], constant=constant)
        for part in (slice(None, cut), slice(cut, None))
    )


LEFT, RIGHT, SHIFT = (
    random(WIDTH, 2, seed=1),
    random(2, INPUTS, seed=2),
    random(WIDTH, seed=3),
)
READ = random(TOKENS, INPUTS, seed=4)
EXACT = READ @ (LEFT @ RIGHT).T + SHIFT


def test_a_low_rank_map_is_found_with_its_constant() -> None:
    found = regress(*halves(EXACT, READ), rank=8)
    assert found is not None and found.constant is not None
    assert found.rank == 2
    assert found.r2 > 1 - 1e-9
    torch.testing.assert_close(found.left @ found.right, LEFT @ RIGHT, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.constant, SHIFT, rtol=0, atol=1e-5)


def test_a_rank_below_that_of_the_map_explains_a_part() -> None:
    found = regress(*halves(EXACT, READ), rank=1)
    assert found is not None and found.rank == 1
    assert 0.4 < found.r2 < 0.99


def test_without_a_constant_the_mean_is_left() -> None:
    found = regress(*halves(EXACT + 9 * SHIFT, READ, constant=False), rank=8)
    assert found is not None and found.constant is None
    centred = regress(*halves(EXACT - SHIFT, READ, constant=False), rank=8)
    assert centred is not None
    assert centred.r2 > 1 - 1e-9 > found.r2 + 0.3


def test_targets_that_have_nothing_to_do_with_the_inputs_give_nothing() -> None:
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(5))
    assert regress(*halves(EXACT[order], READ), rank=8) is None


def test_fewer_tokens_than_inputs_are_held_by_the_penalty() -> None:
    few = 12
    noisy = EXACT + 3 * random(TOKENS, WIDTH, seed=6)
    fit, unseen = moments(READ[:few], noisy[:few]), moments(READ[few:], noisy[few:])
    found = regress(fit, unseen, rank=8)
    assert found is not None and found.ridge > 1e-3
    # The least penalty interpolates the few tokens, noise and all, and predicts unseen ones worse:
    # by 0.028, where a solve with a penalty of 1e-8 of the inputs' power rounds to 1e-8 at most.
    loose = regress(fit, unseen, rank=8, ridges=(1e-8,))
    assert loose is None or loose.r2 < found.r2 - 0.01


def test_the_residual_is_what_it_would_be_token_by_token() -> None:
    summed = moments(READ, EXACT)
    solution = random(WIDTH, INPUTS + 1, seed=7)
    direct = EXACT - READ @ solution[:, :-1].T - solution[:, -1]
    assert summed.residual(solution) == pytest.approx(float(direct.square().sum()), rel=1e-12)
    assert summed.residual(0 * solution) != pytest.approx(summed.residual(solution), rel=1e-3)


def ablation(at: str, width: int) -> Edit:
    return Edit(EditKind.ABLATE, "c", (parse_site(at),), ablate(vector(width)))


Checkpoints = Callable[..., Path]


@pytest.mark.parametrize(
    ("family", "at", "sites"),
    [
        ("llama", "resid_post.1", ["mlp_out.1", "attn_out.2", "mlp_out.2"]),
        ("llama", "resid_mid.1", ["attn_out.1", "mlp_out.1", "attn_out.2", "mlp_out.2"]),
        ("llama", "resid_pre.2", ["mlp_out.1", "attn_out.2", "mlp_out.2"]),
        ("gpt_neox", "resid_post.1", ["mlp_out.1", "mlp_out.2"]),
        ("mixtral", "resid_post.1", ["attn_out.1", "attn_out.2"]),
        ("gemma2", "resid_post.1", []),
    ],
)
def test_writers_from_the_edit_on(
    tiny_checkpoint: Checkpoints, family: str, at: str, sites: list[str]
) -> None:
    layout = base_at(tiny_checkpoint(family)).layout
    found = places_for(layout, [ablation(at, layout.hidden)], [])
    assert [str(place.site) for place in found] == [s for s in sites if _exists(layout.layers, s)]


def _exists(layers: int, site: str) -> bool:
    return int(site.rpartition(".")[2]) < layers


def test_a_writer_whose_output_is_mapped_is_left_out(tiny_checkpoint: Checkpoints) -> None:
    layout = base_at(tiny_checkpoint("llama")).layout
    hard = [ablation("resid_post.0", layout.hidden)]
    free = places_for(layout, hard, [])
    mapped = places_for(layout, hard, [ablation("mlp_out.1", layout.hidden)])
    assert {place.site for place in free} - {place.site for place in mapped} == {
        Site(SiteKind.MLP_OUT, 1)
    }


def test_the_edits_without_a_fold_are_told_by_their_place(tiny_checkpoint: Checkpoints) -> None:
    """Of one kind, one concept and one site, one has a fold and the other has none."""
    base = base_at(tiny_checkpoint("llama", attention_bias=False, mlp_bias=False))
    whole = edit(base, "ablate", ablate(vector(24)), "resid")
    half = edit(base, "ablate", ablate(vector(24, 1), strength=0.5), "resid_post.1")
    compile_ = partial(plan_of, base)
    for edits, hard in (([whole, half], [1]), ([half, whole], [0]), ([half, whole, half], [0, 2])):
        found, kept = hard_edits(compile_(edits), compile_)
        assert [id(e) for e in found] == [id(edits[i]) for i in hard]
        assert [id(e) for e in kept] == [id(whole)]
    assert hard_edits(compile_([whole]), compile_) == ((), (whole,))


def test_what_only_a_refused_edit_made_exact_is_stood_in_for_as_well(
    tiny_checkpoint: Checkpoints,
) -> None:
    base = base_at(tiny_checkpoint("llama", attention_bias=False, mlp_bias=False))
    gaps = ["resid_pre.0", "resid_mid.0", "resid_post.1"]
    refused = edit(base, "ablate", ablate(vector(24)), gaps)
    after = edit(base, "ablate", ablate(vector(24), strength=0.5), "resid_mid.0")
    other = edit(base, "ablate", ablate(vector(24, 1)), "attn_out.1")
    compile_ = partial(plan_of, base)
    plan = compile_([refused, after, other])
    exact = [f.exactness is Exactness.EXACT for f in plan.findings]
    assert exact == [False, True, True]  # nothing is left there for the second to halve
    assert hard_edits(plan, compile_) == ((refused, after), (other,))


@cache
def story() -> tuple[Base, Edit, tuple[tuple[int, ...], ...]]:
    """Return the quickstart's model, its edit at one site only, and texts."""
    recipe = load_recipe(RECIPES / "quickstart.toml")
    found = base_at(QUICKSTART)
    (edit,) = build_edits(recipe, found.layout, read_artifacts(recipe))
    texts = read_prompts(RECIPES / "quickstart" / "eval.txt", QUICKSTART, 96).tokens[:TEXTS]
    return found, replace(edit, sites=(Site(SiteKind.RESID_POST, 2),)), texts


@cache
def fitted() -> Calibration:
    model, edit, texts = story()
    return calibrate(model.model, model.layout, asked=[edit], kept=[], prompts=texts)


def test_an_affine_edit_at_one_site_is_stood_in_for() -> None:
    """One site is no stock weight, and the stand-ins lose a fiftieth of its effect at most."""
    model, edit, _ = story()
    found = fitted()
    assert plan_of(model, [edit]).exactness is Exactness.IMPOSSIBLE
    assert found.effect > 0.1  # nats: the edit does something
    assert found.share < 0.02
    assert [fit.kl for fit in found.fits] == sorted((f.kl for f in found.fits), reverse=True)
    assert plan_of(model, found.edits).exactness is Exactness.EXACT


def test_stand_ins_of_the_wrong_sign_or_none_fail() -> None:
    model, edit, texts = story()
    found, held_out = fitted(), batches_of(texts[::5])

    def lost(edits: tuple[Edit, ...]) -> float:
        return divergence(model.model, model.layout, [edit], edits, held_out) / found.effect

    assert lost(found.edits) == pytest.approx(found.share, rel=1e-6)
    assert lost(()) == pytest.approx(1, rel=1e-6)
    assert lost(tuple(map(_negative, found.edits))) > 0.5
    assert lost(found.edits[1:]) > 5 * found.share


def _negative(edit: Edit) -> Edit:
    if isinstance(edit.map, WeightUpdate):
        return replace(edit, map=WeightUpdate(-edit.map.left, edit.map.right))
    assert isinstance(edit.map, LowRankMap)
    return replace(edit, map=LowRankMap(edit.map.left, edit.map.right, -edit.map.bias))


def test_corrections_at_later_writers_help() -> None:
    model, edit, texts = story()
    settings = Settings(corrections=0)
    first = calibrate(
        model.model, model.layout, asked=[edit], kept=[], prompts=texts, settings=settings
    )
    assert [str(fit.site) for fit in first.fits] == ["mlp_out.2"]
    assert fitted().share < 0.5 * first.share < 0.5


def test_the_same_texts_give_the_same_stand_ins() -> None:
    """At the writer of the edit and at the next, which are fitted in the same way as the others."""
    model, edit, texts = story()
    settings = Settings(corrections=1)
    again = calibrate(
        model.model, model.layout, asked=[edit], kept=[], prompts=texts, settings=settings
    )
    assert again.fits and again.fits == fitted().fits[: len(again.fits)]
    for one, other in zip(again.edits, fitted().edits, strict=False):
        assert one.sites == other.sites
        if isinstance(one.map, WeightUpdate) and isinstance(other.map, WeightUpdate):
            assert torch.equal(one.map.right, other.map.right)


def test_exact_edits_stay_in_force_beside_the_stand_ins() -> None:
    """The stand-ins make up for the hard edit in a model that has the exact one."""
    model, edit, texts = story()
    kept = Edit(
        EditKind.OFFSET,
        "push",
        (Site(SiteKind.RESID_POST, 4),),
        offset(vector(model.layout.hidden), coefficient=0.05),
    )
    found = calibrate(model.model, model.layout, asked=[kept, edit], kept=[kept], prompts=texts)
    assert all(fit.site != Site(SiteKind.MLP_OUT, 4) for fit in found.fits)
    both, held_out = (kept, *found.edits), batches_of(texts[::5])
    lost = divergence(model.model, model.layout, [kept, edit], both, held_out)
    assert lost == pytest.approx(found.kl, rel=1e-6)
    assert lost < 0.2 * divergence(model.model, model.layout, [kept, edit], [kept], held_out)


def test_stand_ins_are_for_the_edits_in_their_order() -> None:
    """A push behind an edit that sets its component stays; before it, it would be undone."""
    model, edit, texts = story()
    assert isinstance(edit.map, LowRankMap)
    push = offset(edit.map.left[:, 0], coefficient=3.0)
    kept = Edit(EditKind.OFFSET, "push", edit.sites, push)
    found = calibrate(
        model.model,
        model.layout,
        asked=[edit, kept],
        kept=[kept],
        prompts=texts,
        settings=Settings(corrections=2),
    )
    both, held_out = (kept, *found.edits), batches_of(texts[::5])
    lost, other = (
        divergence(model.model, model.layout, asked, both, held_out)
        for asked in ([edit, kept], [kept, edit])
    )
    assert lost == pytest.approx(found.kl, rel=1e-6)
    assert other > 10 * lost


def test_too_few_texts() -> None:
    model, edit, texts = story()
    with pytest.raises(InputError, match="4 calibration texts are too few"):
        calibrate(model.model, model.layout, asked=[edit], kept=[], prompts=texts[:4])


def test_an_edit_without_effect() -> None:
    model, edit, texts = story()
    idle = replace(edit, map=ablate(vector(model.layout.hidden), strength=0.0))
    with pytest.raises(InputError, match="no effect on the calibration texts"):
        calibrate(model.model, model.layout, asked=[idle], kept=[], prompts=texts)


def test_a_family_without_a_writer_for_it(tiny_checkpoint: Checkpoints) -> None:
    model = base_at(tiny_checkpoint("gemma2"))
    edit = ablation("resid_post.0", model.layout.hidden)
    prompts = [[1, 2, 3, n] for n in range(4, 10)]
    with pytest.raises(UsageError, match="no writer that could take a fitted update"):
        calibrate(model.model, model.layout, asked=[edit], kept=[], prompts=prompts)


@pytest.mark.slow  # six seconds: each fix is followed
def test_what_no_writer_predicts_is_told_what_would_help() -> None:
    """A site behind every writer, and too few of them tried."""
    model, edit, texts = story()
    blocks, ablated = model.layout.layers, replace(edit, map=ablate(vector(model.layout.hidden)))

    def fitted_at(site: str, settings: Settings | None = None) -> Calibration:
        one = replace(ablated, sites=(parse_site(site),))
        asked = {"asked": [one], "kept": [], "prompts": texts, "settings": settings}
        return calibrate(model.model, model.layout, **asked)  # type: ignore[arg-type]

    with pytest.raises(UsageError, match="no writer predicts") as caught:
        fitted_at("ln_final_out")
    assert caught.value.fix == f'act on what the final norm reads: at = "resid_post.{blocks - 1}"'
    assert fitted_at(f"resid_post.{blocks - 1}").fits
    with pytest.raises(UsageError, match="no writer predicts") as caught:
        fitted_at("embed", Settings(corrections=0))
    assert str(caught.value.fix).startswith("leave corrections out of [calibrate]")
    assert fitted_at("embed").fits


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "rank of a fit is 0"), ({"corrections": -1}, "cannot be -1 corrections")],
)
def test_settings_without_a_meaning(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**settings)
