"""Edits that are no affine maps: hooked as they are written down here, refused by the plan by name,
and the words by which a recipe says what a system does that weights do not."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Base, bake, base_at, logits, plain_logits, plan_of
from test_sources import hooked
from torch import Tensor

from bake.approximate import Settings, calibrate
from bake.approximate.stand_in import hard_edits
from bake.edit_store import dump_edits, load_edits
from bake.edits import Edit
from bake.errors import BakeError, UsageError
from bake.jobs.planned import judged
from bake.plan import Exactness
from bake.positions import Positions, Spoken
from bake.recipe import build_edits, load_recipe, read_artifacts, remarks
from bake.steer import steered
from bake.verify.prompts import read_prompts
from bake.verify.verification import Verification

Map = Callable[[Tensor], Tensor]
D = 24  # of tests/tiny.py


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


V, COND, SHIFT = rand(D), rand(D, seed=1), rand(D, seed=2)
R = V / V.norm()
ENCODER, DECODER, CENTRE = rand(1, D, seed=3), rand(D, 1, seed=4), rand(D, seed=5)
JUMP = 1.25
SCALE, LOW, HIGH = 1 + rand(D, seed=6), -rand(D, seed=7).abs() / 20, rand(D, seed=8).abs() / 20


def ablated(x: Tensor) -> Tensor:
    return x - (x @ R)[..., None] * R


def kept(x: Tensor, y: Tensor) -> Tensor:
    return y * (x.norm(dim=-1) / y.norm(dim=-1))[..., None]


def clamped(low: float, high: float) -> Map:
    def act(x: Tensor) -> Tensor:
        a = x @ R
        return x + (a.clamp(low, high) - a)[..., None] * R

    return act


def feature(x: Tensor) -> Tensor:
    """A feature of an encoder set to two, wherever it is above or below."""
    a = torch.relu((x - CENTRE) @ ENCODER[0])
    return x + (2.0 - a)[..., None] * DECODER[:, 0]


def jumping(x: Tensor) -> Tensor:
    """The same of an encoder whose feature is active above a threshold only."""
    a = (x - CENTRE) @ ENCODER[0]
    return x + (2.0 - a * (a > JUMP))[..., None] * DECODER[:, 0]


def masked(x: Tensor) -> Tensor:
    return torch.where((x > LOW) & (x < HIGH), SCALE * x + SHIFT, x)


def on(condition: Map, act: Map) -> Map:
    return lambda x: torch.where(condition(x)[..., None], act(x), x)


def side(x: Tensor) -> Tensor:
    return x @ (COND / COND.norm()) > 0.01


def cosine(x: Tensor) -> Tensor:
    return x @ (COND / COND.norm()) / x.norm(dim=-1) < -0.05


TURN = rand(2, D, seed=9)
GATED = 'kind = "gate"\nmap = "ablate"\ndirection = "v"\n'
KINDS: Mapping[str, tuple[str, Map]] = {
    "capped": ('kind = "clamp"\ndirection = "v"\nlow = -0.02\nhigh = 0.03', clamped(-0.02, 0.03)),
    "floor": ('kind = "clamp"\ndirection = "v"\nlow = 0.01', clamped(0.01, math.inf)),
    "feature": (
        'kind = "clamp"\ndirection = "sae"\nlow = 2.0\nhigh = 2.0\nrectified = true',
        feature,
    ),
    "jumping feature": ('kind = "clamp"\ndirection = "jump"\nlow = 2.0\nhigh = 2.0', jumping),
    "masked": ('kind = "masked-scale"\ndirection = "act"', masked),
    "half masked": (
        'kind = "masked-scale"\ndirection = "act"\nstrength = 0.5',
        lambda x: (x + masked(x)) / 2,
    ),
    "norm": (
        'kind = "norm-preserving"\nmap = "ablate"\ndirection = "v"',
        lambda x: kept(x, ablated(x)),
    ),
    "norm of a sum": (
        'kind = "norm-preserving"\nmap = "offset"\ncoefficient = 0.1\ndirection = "v"',
        lambda x: kept(x, x + 0.1 * V),
    ),
    "gate": (
        GATED + 'gate = { direction = "cond", above = 0.01 }',
        on(side, ablated),
    ),
    "gate on a cosine": (
        GATED.replace("ablate", "offset")
        + 'coefficient = 0.1\ngate = { direction = "cond", below = -0.05, measure = "cosine" }',
        on(cosine, lambda x: x + 0.1 * V),
    ),
}


def artifacts(folder: Path) -> None:
    """Write the directions in bake's own format."""
    from safetensors.torch import save_file

    said = {"format": "bake-directions", "version": "1"}
    for name, tensors in {
        "v": {"vector": V},
        "cond": {"vector": COND},
        "plane": {"subspace": TURN},
        "sae": {"left": DECODER, "right": ENCODER, "mean": CENTRE},
        "jump": {
            **{"left": DECODER, "right": ENCODER, "mean": CENTRE},
            "threshold": torch.tensor([JUMP], dtype=torch.float64),
        },
        "act": {"scale": SCALE, "offset": SHIFT, "low": LOW, "high": HIGH},
    }.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata={**said, "concept": name})


def read(folder: Path, edit: str, *, said: str = "", model: str = "base") -> Any:
    """Return a recipe of one edit, and its directions."""
    artifacts(folder)
    names = ("v", "cond", "plane", "sae", "jump", "act")
    tables = "".join(
        f'[directions.{name}]\nfile = "{name}.safetensors"\n{said if name == "v" else ""}\n'
        for name in names
    )
    (folder / "r.toml").write_text(f'[base]\nmodel = "{model}"\n{tables}[[edits]]\n{edit}\n')
    return load_recipe(folder / "r.toml")


def built(base: Base, folder: Path, edit: str, *, said: str = "") -> tuple[Edit, ...]:
    recipe = read(folder, edit, said=said)
    return build_edits(recipe, base.layout, read_artifacts(recipe))


@pytest.fixture
def base(tiny_checkpoint: Callable[..., Path]) -> Base:
    return base_at(tiny_checkpoint("llama"))


def under(base: Base, edits: tuple[Edit, ...], **options: Any) -> Tensor:
    with steered(base.model, base.layout, edits, **options):
        return logits(base.model, base)


@pytest.mark.parametrize("at", ["resid_post.1", "mlp_out.0", "resid_mid.1"])
@pytest.mark.parametrize("name", KINDS)
def test_hooks_do_what_is_written_down(base: Base, tmp_path: Path, name: str, at: str) -> None:
    text, act = KINDS[name]
    edits = built(base, tmp_path, f'{text}\nat = "{at}"')
    layer = f"model.layers.{at[-1]}"
    found = under(base, edits)
    if at.startswith("resid_mid"):  # the sum that no module computes: the other hooks say how
        (edit,) = edits
        x = rand(5, D, seed=40)
        torch.testing.assert_close(edit.map(x), act(x), rtol=0, atol=1e-12)  # type: ignore[operator]
        return
    path = layer if at.startswith("resid") else f"{layer}.mlp"
    with hooked(base.model, {path: act}):
        wanted = logits(base.model, base)
    effect = float((wanted - plain_logits(base)).abs().max())
    assert effect > 1e-4
    assert float((found - wanted).abs().max()) <= 1e-9 * effect
    # The control: the affine map that it is where its condition holds is another model.
    always = edits[0].map.always  # type: ignore[union-attr]
    if always is not None:
        affine = under(base, (Edit(edits[0].kind, "v", edits[0].sites, always),))
        assert float((affine - wanted).abs().max()) > 1e-3 * effect


@pytest.mark.parametrize("name", KINDS)
def test_the_plan_refuses_them_and_says_what_is_exact(
    base: Base, tmp_path: Path, name: str
) -> None:
    text, _ = KINDS[name]
    edits = built(base, tmp_path, f'{text}\nat = "mlp_out.1"')
    (plain,) = built(base, tmp_path, 'kind = "ablate"\ndirection = "v"\nat = "attn_out.0"')
    plan = plan_of(base, [plain, *edits])
    assert [f.exactness for f in plan.findings] == [Exactness.EXACT, Exactness.IMPOSSIBLE]
    assert [f.edit for f in plan.findings] == [0, 1]
    assert not plan.tensors and not plan.biases and not plan.config
    assert plan.edits == (plain, *edits)
    reason, remedy = plan.findings[1].reason, plan.findings[1].remedy
    assert "no affine map" in reason and remedy is not None and "approximate" in remedy
    always = edits[0].map.always  # type: ignore[union-attr]
    told = "no part of it" if always is None else "without its condition, is exact here"
    assert told in reason
    named = re.match('kind = "([a-z-]+)" in place of kind = "([a-z-]+)"', remedy)
    assert (named is None) == (always is None)
    if named is not None:  # what it offers is what it says: that map, and exact
        without = re.sub(r"map = .*\n|gate = .*", "", text)
        other = without.replace(f'kind = "{named[2]}"', f'kind = "{named[1]}"')
        (instead,) = built(base, tmp_path, f'{other}\nat = "mlp_out.1"')
        assert plan_of(base, [instead]).exactness is Exactness.EXACT
        x = rand(7, D, seed=50)
        torch.testing.assert_close(instead.map(x), always(x))  # type: ignore[operator]


def test_what_is_exact_is_found_and_not_supposed(base: Base, tmp_path: Path) -> None:
    """At a block's output the ablation inside is impossible too, and the plan says so."""
    text = 'kind = "norm-preserving"\nmap = "ablate"\ndirection = "v"\nat = "resid_post.1"'
    (finding,) = plan_of(base, built(base, tmp_path, text)).findings
    assert "without its condition, is impossible here" in finding.reason
    assert finding.remedy is not None and "in place of" not in finding.remedy


def test_a_turn_keeps_the_norm_by_itself_and_is_exact(base: Base, tmp_path: Path) -> None:
    turn = 'direction = "plane"\ndegrees = 40\nat = "mlp_out.1"'
    kept_norm = built(base, tmp_path, f'kind = "norm-preserving"\nmap = "rotate"\n{turn}')
    plan = plan_of(base, kept_norm)
    assert plan.exactness is Exactness.EXACT
    plain = plan_of(base, built(base, tmp_path, f'kind = "rotate"\n{turn}'))
    assert plan.digest == plain.digest and plan.tensors


def test_a_component_that_is_set_to_one_number_is_affine(base: Base, tmp_path: Path) -> None:
    """A clamp between equal limits folds; an encoder's ReLU and unequal limits do not."""
    at = 'direction = "v"\nat = "mlp_out.1"'
    clamp = f'kind = "clamp"\nlow = 0.02\nhigh = {{}}\n{at}'
    (edit,) = edits = built(base, tmp_path, clamp.format(0.02))
    plan = plan_of(base, edits)
    assert plan.exactness is Exactness.EXACT and plan.tensors
    x = rand(5, D, seed=41)
    wanted = clamped(0.02, 0.02)(x)
    torch.testing.assert_close(edit.map(x), wanted, rtol=0, atol=1e-12)  # type: ignore[operator]
    assert not torch.equal(wanted, x)
    for other in (clamp.format(0.03), clamp.format(0.02) + "\nrectified = true"):
        assert plan_of(base, built(base, tmp_path, other)).exactness is Exactness.IMPOSSIBLE


def test_they_are_kept_with_an_artifact(base: Base, tmp_path: Path) -> None:
    texts = [f'{text}\nat = "resid_post.1"' for text, _ in KINDS.values()]
    said = 'positions = "first:3"\n'
    edits = tuple(e for text in texts for e in built(base, tmp_path, text, said=said))
    offset = 'kind = "offset"\ndirection = "v"\nat = "resid_post.1"'
    edits += built(base, tmp_path, offset, said=f"{said}normalize = true\n")
    path = tmp_path / "edits.safetensors"
    path.write_bytes(dump_edits(edits))
    again = load_edits(path)
    x = rand(7, D, seed=50)
    for one, two in zip(edits, again, strict=True):
        assert (one.kind, one.concept, one.sites) == (two.kind, two.concept, two.sites)
        torch.testing.assert_close(one.map(x), two.map(x), rtol=0, atol=1e-12)  # type: ignore[operator]
        assert (one.own is None) == (two.own is None)
        if one.own is not None and two.own is not None:
            assert one.own.positions == two.own.positions
            assert (one.own.map is None) == (two.own.map is None)
            if one.own.map is not None and two.own.map is not None:
                torch.testing.assert_close(one.own.map(x), two.own.map(x), rtol=0, atol=1e-12)
    assert again[-1].own is not None
    assert dump_edits(again) == path.read_bytes()


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ('kind = "clamp"\ndirection = "v"', ["a clamp has no limit", "give low, high or both"]),
        ('kind = "clamp"\ndirection = "v"\nlow = 2\nhigh = 1', ["holds no value"]),
        ('kind = "clamp"\ndirection = "v"\nlow = nan', ["low = nan is not finite"]),
        ('kind = "clamp"\ndirection = "v"\nalpha = 1', ["'alpha' is no key of kind = 'clamp'"]),
        ('kind = "ablate"\ndirection = "v"\nlow = 1', ["'low' is no key", "belongs to clamp"]),
        ('kind = "masked-scale"\ndirection = "v"', ["needs low", "holds vector"]),
        ('kind = "gate"\ndirection = "v"', ["map = None is none", "write one of ablate"]),
        ('kind = "gate"\nmap = "ablate"\ndirection = "v"', ["a gate has no condition"]),
        (
            'kind = "norm-preserving"\nmap = "update"\ndirection = "v"',
            ["map = 'update' is none", "write one of ablate"],
        ),
        (
            'kind = "norm-preserving"\nmap = "ablate"\ncoefficient = 1\ndirection = "v"',
            ["'coefficient' is no key", "takes strength"],
        ),
        (
            GATED + 'gate = { direction = "cnd", above = 1 }',
            ["there is no direction 'cnd'", "did you mean 'cond'?"],
        ),
        (
            GATED + 'gate = { direction = "cond" }',
            ["a gate has one side"],
        ),
        (
            GATED + 'gate = { direction = "cond", above = 1, measure = "cosin" }',
            ["measure = 'cosin' is unknown", "did you mean 'cosine'?"],
        ),
        (
            GATED + 'gate = { direction = "act", above = 1 }',
            ["kind = 'gate' needs vector"],
        ),
    ],
)
def test_what_cannot_be_said(base: Base, tmp_path: Path, text: str, fragments: list[str]) -> None:
    with pytest.raises(BakeError) as error:
        built(base, tmp_path, f'{text}\nat = "mlp_out.1"')
    for fragment in fragments:
        assert fragment in str(error.value)


# --- positions, norms and conditions of the edit's own system ------------------------------------

SPOKEN = Spoken(prompt=5, instruction=3)


@pytest.mark.parametrize(
    ("positions", "spoken", "wanted"),
    [
        ("all", SPOKEN, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("prompt", SPOKEN, [1, 1, 1, 1, 1, 0, 0, 0]),
        ("last", SPOKEN, [0, 0, 0, 0, 1, 1, 1, 1]),
        ("first:2", SPOKEN, [1, 1, 0, 0, 0, 0, 0, 0]),
        ("first:9", SPOKEN, [1, 1, 1, 1, 1, 0, 0, 0]),
        ("after-instruction", SPOKEN, [0, 0, 1, 1, 1, 1, 1, 1]),
        ("after-instruction", Spoken(5, None), [1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_positions(positions: str, spoken: Spoken, wanted: list[int]) -> None:
    assert Positions(positions).mask(8, spoken).tolist() == [bool(one) for one in wanted]


@pytest.mark.parametrize("text", ["first", "first:0", "first:-1", "las", "", "first:1e3"])
def test_positions_that_are_none(base: Base, tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="positions = "):
        built(
            base,
            tmp_path,
            'kind = "offset"\ndirection = "v"\nat = "resid_post.1"',
            said=f'positions = "{text}"',
        )


OFFSET = 'kind = "offset"\ndirection = "v"\ncoefficient = 0.1\nat = "resid_post.1"'
OWN: Mapping[str, tuple[str, Map, list[str]]] = {
    "positions": ('positions = "last"', lambda x: x + 0.1 * V, ["last token of the prompt"]),
    "normalize": ("normalize = true", lambda x: kept(x, x + 0.1 * V), ["scales the result back"]),
    "gate": (
        'gate = { direction = "cond", above = 0.01 }',
        on(side, lambda x: x + 0.1 * V),
        ["only where a token's projection on cond is above 0.01"],
    ),
    "all of it": (
        'positions = "first:4"\nnormalize = true\ngate = { direction = "cond", above = 0.01 }',
        on(side, lambda x: kept(x, x + 0.1 * V)),
        ["at the first 4 tokens", "only where", "leave the norm as it becomes"],
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_what_the_system_does_is_said_and_hooked_and_the_weights_always_act(
    base: Base, tmp_path: Path, name: str
) -> None:
    said, act, words = OWN[name]
    edits = built(base, tmp_path, OFFSET, said=said)
    plain = built(base, tmp_path, OFFSET)
    # Always and everywhere: the plan and bake's hooks are those of the edit without the words.
    assert torch.equal(under(base, edits), under(base, plain))
    assert plan_of(base, edits).digest == plan_of(base, plain).digest
    spoken = Spoken(prompt=6, instruction=None)
    (edit,) = edits
    assert edit.own is not None
    positions = edit.own.positions

    def own(x: Tensor) -> Tensor:
        mask = positions.mask(x.shape[1], spoken)
        return torch.where(mask[:, None], act(x), x)

    with hooked(base.model, {"model.layers.1": own}):
        wanted = logits(base.model, base)
    found, always = under(base, edits, as_system=spoken), under(base, plain)
    effect = float((wanted - plain_logits(base)).abs().max())
    assert effect > 1e-4
    assert float((found - wanted).abs().max()) <= 1e-9 * effect
    assert float((always - wanted).abs().max()) > 1e-2 * effect
    recipe = read(tmp_path, OFFSET, said=said)
    (note,) = remarks(recipe, read_artifacts(recipe))
    assert all(word in note for word in [*words, "the weights act at every token"])


def test_an_artifact_says_where_its_system_acts(base: Base, tmp_path: Path) -> None:
    """CAA's folder does; the recipe's word counts more."""
    (tmp_path / "caa").mkdir()
    torch.save(V.float(), tmp_path / "caa" / "vec_layer_1_m.pt")
    for line, wanted in (("", "after-instruction"), ('positions = "last"\n', "last")):
        text = f'[base]\nmodel = "base"\n[directions.v]\nfile = "caa"\n{line}[[edits]]\n'
        (tmp_path / "r.toml").write_text(f'{text}kind = "offset"\ndirection = "v"\n')
        recipe = load_recipe(tmp_path / "r.toml")
        found = read_artifacts(recipe)
        (edit,) = build_edits(recipe, base.layout, found)
        assert edit.own is not None and edit.own.positions.text == wanted
        (note,) = remarks(recipe, found)
        assert Positions(wanted).words in note


def test_quantiles_of_a_transport_are_hooked_as_the_system_does(base: Base, tmp_path: Path) -> None:
    edits = built(base, tmp_path, 'kind = "scale"\ndirection = "act"\nat = "mlp_out.1"')
    with hooked(base.model, {"model.layers.1.mlp": masked}):
        wanted = logits(base.model, base)
    effect = float((wanted - plain_logits(base)).abs().max())
    found = under(base, edits, as_system=SPOKEN)
    assert float((found - wanted).abs().max()) <= 1e-9 * effect
    assert float((under(base, edits) - wanted).abs().max()) > 1e-2 * effect


@pytest.mark.parametrize("expanded", [False, True])
def test_the_quantiles_of_act_are_read_by_name(base: Base, tmp_path: Path, expanded: bool) -> None:
    """``linear_ot.yaml`` masks: the file has the limits by name, or those of a hook loaded once."""
    (tmp_path / "ot").mkdir()
    limits = [LOW.float(), HIGH.float()]
    state = {"net.w1": SCALE[None].float(), "net.b1": SHIFT[None].float()}
    state |= {"quantiles_src": limits} if expanded else {"quantiles_dict_src": {"q_0_100": limits}}
    torch.save(state, tmp_path / "ot" / "model.layers.1.mlp.statedict")
    (tmp_path / "r.toml").write_text(
        '[base]\nmodel = "base"\n[directions.v]\nfile = "ot"\nquantiles = "q_0_100"\n[[edits]]\n'
        'kind = "masked-scale"\ndirection = "v"\nstrength = 0.5\n'
    )
    recipe = load_recipe(tmp_path / "r.toml")
    found = read_artifacts(recipe)
    (edit,) = build_edits(recipe, base.layout, found)
    x = rand(9, D, seed=60)
    low, high, s, b = (t.float().double() for t in (LOW, HIGH, SCALE, SHIFT))
    half = 0.5 * x + 0.5 * (s * x + b)
    wanted = torch.where((x > low) & (x < high), half, x)
    torch.testing.assert_close(edit.map(x), wanted, rtol=0, atol=1e-12)  # type: ignore[operator]
    assert not torch.equal(wanted, x) and not torch.equal(wanted, half)
    assert any("between the quantiles q_0_100" in note for note in remarks(recipe, found))


def test_systems_that_do_not_act_alike_do_not_act_together(base: Base, tmp_path: Path) -> None:
    text = 'kind = "ablate"\ndirection = ["v", "cond"]\nat = "mlp_out.1"'
    with pytest.raises(UsageError, match="their systems do not act alike"):
        built(base, tmp_path, text, said='positions = "last"')
    assert built(base, tmp_path, text)


@pytest.mark.parametrize(
    "said", ["normalize = true", 'gate = { direction = "cond", above = 0.01 }']
)
def test_what_a_system_does_is_not_said_of_an_edit_that_does_it(
    base: Base, tmp_path: Path, said: str
) -> None:
    """It would not be hooked, and the plan would say that weights leave it out."""
    text = KINDS["gate"][0] + '\nat = "mlp_out.1"'
    with pytest.raises(UsageError, match="the edit is no affine map") as error:
        built(base, tmp_path, text, said=said)
    assert error.value.fix is not None and "leave both out of [directions.v]" in error.value.fix
    assert built(base, tmp_path, text) and built(base, tmp_path, OFFSET, said=said)


def test_a_verification_hooks_the_system_beside_bake(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The weights are the hooks that always act, and far from those that act at the last token."""
    base = base_at(tiny_checkpoint("llama"))
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]

    def rows(said: str, name: str) -> dict[str, float]:
        edits = built(base, tmp_path, OFFSET, said=said)
        out = bake(base, plan_of(base, edits), tmp_path / name)
        asked = Verification(
            out, base=str(base.path), prompts=prompts, generate=2, as_system=bool(said)
        )
        report = judged(asked)
        assert report.passed
        return {row.name: row.value for row in report.rows}

    found = rows('positions = "last"', "last")
    distance = "max |Δlogit| of the plan from"
    always, own = f"{distance} bake's hooks", f"{distance} the system's own hooks"
    assert found[always] < 1e-9 < 1e-3 < found[own]
    # An edit of which nothing is said has no such rows, and none to ask for.
    assert not any(name.startswith(distance) for name in rows("", "plain"))
    with pytest.raises(UsageError, match="none says how that is"):
        judged(Verification(tmp_path / "plain", base=str(base.path), as_system=True))
    # A rule that holds at every token is what the weights do.
    everywhere = rows('positions = "after-instruction"', "after")
    assert everywhere[own] < 1e-9


def test_a_fit_stands_in_for_a_gate(tmp_path: Path) -> None:
    """Least squares takes any hook; here one that leaves about half of the tokens alone."""
    recipes = Path(__file__).parents[1] / "recipes"
    model = base_at(recipes / "quickstart" / "model")
    texts = read_prompts(recipes / "quickstart" / "eval.txt", model.path, 48).tokens[:20]
    mood = str(recipes / "quickstart" / "mood.safetensors")
    (tmp_path / "r.toml").write_text(
        f'[base]\nmodel = "x"\n[directions.mood]\nfile = "{mood}"\nlayer = 2\n[[edits]]\n'
        'kind = "gate"\nmap = "offset"\ncoefficient = 12.0\ndirection = "mood"\n'
        'at = "resid_post.2"\ngate = { direction = "mood", below = 0.0 }\n'
    )
    recipe = load_recipe(tmp_path / "r.toml")
    (edit,) = build_edits(recipe, model.layout, read_artifacts(recipe))
    assert hard_edits(plan_of(model, [edit]), lambda edits: plan_of(model, edits)) == ((edit,), ())
    found = calibrate(
        model.model,
        model.layout,
        asked=[edit],
        kept=[],
        prompts=texts,
        settings=Settings(corrections=0),
    )
    assert found.effect > 0.01 and found.share < 0.5
    assert plan_of(model, found.edits).exactness is Exactness.EXACT
