"""Every family × site × edit: what the plan calls exact is exact, what it refuses is expected.

What must be exact and what must be refused is written by hand, here and in tiny.py, from the
mathematics and from the classes of transformers, and shares nothing with the plan or the tables.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from harness import (
    RELATIVE,
    Base,
    bake,
    base_at,
    edit,
    logits,
    matrix,
    measure,
    orthogonal,
    plain_logits,
    plan_of,
    vector,
)
from safetensors.torch import save_file
from tiny import BIASES, LAYER_NORM, MIXTURES, PARALLEL, POST_NORM, UNGATED

from bake import edits as make
from bake.affine import AffineMap
from bake.checkpoints import open_checkpoint
from bake.edits import Edit
from bake.errors import FamilyError, InexactPlan
from bake.families.fit import layout_of
from bake.plan import Exactness
from bake.sites import STREAM_KINDS, Site, SiteKind

# Keys without rotary embedding: one constant on every key moves all scores alike.
NO_EFFECT = {("gpt2", "k", "offset")}

MAPS: dict[str, Callable[[int], tuple[str, AffineMap]]] = {
    "ablate": lambda n: ("ablate", make.ablate(vector(n))),
    "subspace": lambda n: ("ablate", make.ablate(torch.stack([vector(n, 3), vector(n, 4)]))),
    "half": lambda n: ("ablate", make.ablate(vector(n), strength=0.5)),
    "linear": lambda n: ("linear", make.linear(matrix(n))),
    "affine": lambda n: ("affine", make.affine(vector(n), mean=vector(n, 1), alpha=0.7)),
    "erase": lambda n: ("erase", eraser(n)),
    "rotate": lambda n: ("rotate", make.rotate(orthogonal(n))),
    "scale": lambda n: ("scale", make.scale(vector(n))),
    "scale and shift": lambda n: ("scale", make.scale(vector(n), shift=vector(n, 1))),
    "offset": lambda n: ("offset", make.offset(vector(n))),
}
WITH_CONSTANT = {"affine", "erase", "scale and shift", "offset"}
DIAGONAL = {"scale", "scale and shift", "offset"}
SLOTS = {
    "attn_out": {"o"},
    "z": {"o"},
    "mlp_out": {"down"},
    "mlp_act": {"down"},
    "ln1_out": {"q", "k", "v"},
    "ln2_out": {"gate", "up"},
    "q": {"q"},
    "k": {"k"},
    "v": {"v"},
    "mlp_gate": {"gate"},
    "mlp_up": {"up"},
}
COMPONENTS = (*SLOTS, "ln1_post_out", "ln2_post_out", "ln_final_out", "embed")


def eraser(width: int) -> AffineMap:
    """Return an oblique idempotent map with a mean, as LEACE fits them."""
    left, right = vector(width, 5), vector(width, 6)
    return make.erase(
        (left / (left @ right)).unsqueeze(1), right.unsqueeze(0), mean=vector(width, 7)
    )


def component_is_exact(family: str, site: str, form: str) -> bool:
    """Whether an edit of this form at a module's input or output folds exactly."""
    if site == "embed":
        return True
    if site in ("ln1_post_out", "ln2_post_out"):
        return form == "scale"
    if site in ("ln1_out", "ln2_out", "ln_final_out") and family in LAYER_NORM and form in DIAGONAL:
        return True  # the norm has gain and bias itself
    if form not in WITH_CONSTANT:
        return True
    return site != "ln_final_out" and SLOTS[site] <= BIASES[family]


def has_site(family: str, site: str) -> bool:
    """Whether the architecture has such a place at all."""
    if family in MIXTURES and site in ("mlp_gate", "mlp_up", "mlp_act"):
        return False  # each expert has its own
    if family in UNGATED and site == "mlp_gate":
        return False
    if family == "olmo2" and site in ("ln1_out", "ln2_out"):
        return False
    return family in POST_NORM or not site.endswith("post_out")


def check(base: Base, edits: list[Edit], *, exact: bool, out: Path) -> None:
    """Plan, export and measure; or see the refusal, which leaves nothing behind."""
    plan = plan_of(base, edits)
    if not exact:
        assert plan.exactness is Exactness.IMPOSSIBLE
        finding = next(f for f in plan.findings if f.exactness is Exactness.IMPOSSIBLE)
        assert finding.reason and finding.remedy
        with pytest.raises(InexactPlan):
            bake(base, plan, out)
        assert list(out.parent.iterdir()) == []
        return
    assert plan.exactness is Exactness.EXACT, plan.findings
    measured = measure(base, edits, bake(base, plan, out))
    assert measured.effect > 1e-2
    assert measured.error <= RELATIVE * measured.effect


@pytest.mark.parametrize("site", COMPONENTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_edit_at_a_component(
    family: str, site: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A form that is refused by itself, the others three at a time, each at a block of its own.

    Each has its effect by itself, and an error of one is an error of all that are baked with it.
    """
    base = base_at(tiny_checkpoint(family))
    assert (place_of(site, 1) in base.layout.sites) == has_site(family, site)
    if not has_site(family, site):
        return
    made = {form: build(base.layout.width(place_of(site, 1))) for form, build in MAPS.items()}

    def at(form: str, block: int) -> Edit:
        return edit(base, *made[form], str(place_of(site, block)))

    for form in made:
        (tmp_path / form).mkdir()
        if not component_is_exact(family, site, form):
            check(base, [at(form, 1)], exact=False, out=tmp_path / form / "out")
        elif (family, site, form) not in NO_EFFECT:
            moved = logits(base.model, base, [at(form, 1)]) - plain_logits(base)
            assert float(moved.abs().max()) > 1e-2, form
    exact = [form for form in made if component_is_exact(family, site, form)]
    blocks = base.layout.layers if place_of(site, 1).layer is not None else 1
    count = math.ceil(len(exact) / blocks)
    for number in range(count):
        together = [at(form, block) for block, form in enumerate(exact[number::count])]
        check(base, together, exact=True, out=tmp_path / f"out{number}")


def place_of(site: str, block: int) -> Site:
    """Return a site of a block, or the one that no block has."""
    return Site(SiteKind(site), None if site in ("embed", "ln_final_out") else block)


@pytest.mark.parametrize("site", ["q", "k", "v", "z"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_edit_of_one_head(
    family: str, site: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(family))
    size = base.layout.dims["head_dim"]
    edits = [
        edit(base, "ablate", make.ablate(vector(size)), f"{site}.1.h1"),
        edit(base, "linear", make.linear(matrix(size)), f"{site}.2.h0"),
    ]
    check(base, edits, exact=True, out=tmp_path / "out")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weight_update(family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint(family))
    hidden = base.layout.hidden
    heads = base.layout.width(Site(SiteKind.Z, 1))
    size = base.layout.dims["head_dim"]
    edits = [
        edit(base, "update", make.update(vector(hidden, 1), vector(heads, 2)), "attn_out.1"),
        edit(base, "update", make.update(vector(heads, 3), vector(hidden, 4)), "q.2"),
        edit(base, "update", make.update(vector(size, 7), vector(hidden, 8)), ["q.2.h1", "v.2.h0"]),
        # Composed with edits before and behind the same weight.
        edit(base, "ablate", make.ablate(vector(heads, 5)), "z.1"),
        edit(base, "ablate", make.ablate(vector(hidden, 6)), "attn_out.1"),
    ]
    check(base, edits, exact=True, out=tmp_path / "out")


# --- the residual stream, row by row -------------------------------------------------------------

MODULES = ["resid_pre.*", "attn_out.*", "mlp_out.*"]


def down_slot(family: str) -> bool:
    return "down" in BIASES[family] and family not in POST_NORM


def mid_slot(family: str) -> bool:
    return "o" in BIASES[family] and family not in POST_NORM


def pre_norm(family: str) -> bool:
    return family not in POST_NORM


def sequential(family: str) -> bool:
    return family not in PARALLEL


STREAM: dict[str, tuple[str, str | list[str], Callable[[str], bool]]] = {
    "ablation at every stream site": ("ablate", "resid", pre_norm),
    "subspace ablation at every stream site": ("subspace", "resid", pre_norm),
    "ablation where Arditi hooks": ("ablate", MODULES, pre_norm),
    "oblique projection with mean at every stream site": ("erase", "resid", pre_norm),
    "affine edit at every stream site": ("affine", "resid", pre_norm),
    # The constant is added at every write: bias differences in the writers.
    "affine edit on modules too": (
        "affine",
        MODULES,
        lambda f: BIASES[f] >= {"o", "down"},
    ),
    "affine edit before block 2": ("affine", ["PREFIX"], pre_norm),
    "ablation before block 2": ("ablate", ["PREFIX"], pre_norm),
    "offset at the first input": ("offset", "resid_pre.0", lambda f: True),
    "offset after block 1": ("offset", "resid_post.1", down_slot),
    "offset after the last block": ("offset", "resid_post.2", down_slot),
    "offset between the branches": ("offset", "resid_mid.1", mid_slot),
    "any map at the first input": ("linear", "resid_pre.0", lambda f: True),
    # Rotations need norms that they commute with, and writers without a norm behind them.
    "rotation at one site": (
        "rotate",
        "resid_post.1",
        lambda f: pre_norm(f) and f not in LAYER_NORM,
    ),
    "rotation at every block": (
        "rotate",
        "resid_pre.*",
        lambda f: pre_norm(f) and f not in LAYER_NORM,
    ),
    # What no stock weights compute.
    "ablation at one site": ("ablate", "resid_post.1", lambda f: False),
    "affine edit at one site": ("affine", "resid_post.1", lambda f: False),
    "any map at one site": ("linear", "resid_post.1", lambda f: False),
    "gain of the stream at one site": ("scale", "resid_post.1", lambda f: False),
    "half ablation at every stream site": ("half", "resid", lambda f: False),
    "ablation from block 1 on": ("ablate", ["SUFFIX"], lambda f: False),
    "ablation at block boundaries": ("ablate", "resid_pre.*", lambda f: f in PARALLEL),
    "affine edit at block boundaries": ("affine", "resid_pre.*", lambda f: f in PARALLEL),
}


def patterns(base: Base, at: str | list[str]) -> str | list[str]:
    stream = [str(site) for site in base.layout.stream]
    if at == ["PREFIX"]:
        return stream[: stream.index("resid_post.1") + 1]
    if at == ["SUFFIX"]:
        return stream[stream.index("resid_post.0") :]
    return at


@pytest.mark.parametrize("row", STREAM)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_edit_of_the_stream(
    family: str, row: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    form, at, is_exact = STREAM[row]
    base = base_at(tiny_checkpoint(family))
    if at == "resid_mid.1" and not sequential(family):
        assert Site(SiteKind.RESID_MID, 1) not in base.layout.sites
        return
    kind, map_ = MAPS[form](base.layout.hidden)
    edits = [edit(base, kind, map_, patterns(base, at))]
    check(base, edits, exact=is_exact(family), out=tmp_path / "out")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_different_directions_at_every_site(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Hooks with a direction per layer fold at modules and not on the stream."""
    base = base_at(tiny_checkpoint(family))
    hidden = base.layout.hidden
    modules = [
        edit(base, "ablate", make.ablate(vector(hidden, seed)), f"{kind}.{layer}")
        for seed, kind in enumerate(("attn_out", "mlp_out"))
        for layer in range(base.layout.layers)
    ]
    (tmp_path / "modules").mkdir()
    check(base, modules, exact=True, out=tmp_path / "modules" / "out")
    stream = [
        edit(base, "ablate", make.ablate(vector(hidden, seed)), str(site))
        for seed, site in enumerate(base.layout.stream)
    ]
    (tmp_path / "stream").mkdir()
    check(base, stream, exact=False, out=tmp_path / "stream" / "out")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_directions_one_after_another_are_refused(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Two oblique directions at every site are no projector; their joint ablation is."""
    base = base_at(tiny_checkpoint(family))
    first, second = vector(base.layout.hidden, 1), vector(base.layout.hidden, 2)
    edits = [edit(base, "ablate", make.ablate(v), "resid") for v in (first, second)]
    check(base, edits, exact=False, out=tmp_path / "out")
    upright = second - first * (first @ second) / (first @ first)
    edits = [edit(base, "ablate", make.ablate(v), "resid") for v in (first, upright)]
    (tmp_path / "upright").mkdir()
    check(base, edits, exact=family not in POST_NORM, out=tmp_path / "upright" / "out")


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES).difference(POST_NORM)))
def test_rounding_is_not_taken_for_a_constant(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """An offset that is ablated right away leaves rounding behind, which needs no bias."""
    base = base_at(tiny_checkpoint(family))
    hidden = base.layout.hidden
    edits = [
        edit(base, "offset", make.offset(vector(hidden, 1)), "resid_pre.0"),
        edit(base, "ablate", make.ablate(vector(hidden)), "resid"),
    ]
    plan = plan_of(base, edits)
    assert not any(bias.create for bias in plan.biases)
    check(base, edits, exact=True, out=tmp_path / "out")


@pytest.mark.parametrize("family", sorted(LAYER_NORM))
def test_rotation_that_keeps_the_mean(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A LayerNorm lets a rotation pass that fixes the all-ones direction."""
    base = base_at(tiny_checkpoint(family))
    width = base.layout.hidden
    ones = torch.ones(width, dtype=torch.float64) / width**0.5
    others = torch.linalg.svd(ones.unsqueeze(0))[2][1:]
    turn = torch.outer(ones, ones) + others.T @ orthogonal(width - 1) @ others
    edits = [edit(base, "rotate", make.rotate(turn), ["resid_post.1", "resid_pre.1"])]
    check(base, edits, exact=True, out=tmp_path / "out")


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES).difference(POST_NORM, LAYER_NORM)))
def test_edits_compose_in_the_order_of_the_hooks(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Ablate, turn, ablate what the turn made of it; and edits before and behind every module."""
    base = base_at(tiny_checkpoint(family))
    hidden, stream = base.layout.hidden, base.layout.stream
    at = stream.index(Site(SiteKind.RESID_POST, 1))
    names = [str(site) for site in stream]
    direction, turn = vector(hidden), orthogonal(hidden)
    heads = base.layout.width(Site(SiteKind.Z, 0))
    edits = [
        edit(base, "ablate", make.ablate(direction), names[: at + 1]),
        edit(base, "rotate", make.rotate(turn), names[at]),
        edit(base, "ablate", make.ablate(turn @ direction), names[at + 1 :]),
        edit(base, "linear", make.linear(matrix(hidden, 1)), "ln1_out.1"),
        edit(base, "scale", make.scale(vector(hidden, 2)), ["ln1_out.1", "ln2_out.0"]),
        edit(base, "ablate", make.ablate(vector(heads, 3)), "z.0"),
        edit(base, "linear", make.linear(matrix(hidden, 4)), "mlp_out.0"),
        edit(base, "rotate", make.reflect(vector(hidden, 5)), "attn_out.2"),
        edit(base, "scale", make.scale(vector(heads, 6)), "q.2"),
        edit(
            base,
            "rotate",
            make.rotate_plane(torch.stack([vector(8, 7), vector(8, 8)]), degrees=30),
            "v.1.h0",
        ),
        edit(base, "scale", make.scale(vector(hidden, 9)), "ln_final_out"),
    ]
    if base.layout.dims["head_dim"] != 8:
        raise AssertionError("the tiny models have heads of width 8")
    check(base, edits, exact=True, out=tmp_path / "out")
    # Order matters: the same edits the other way round are another function.
    other = [*edits[:3], *reversed(edits[3:])]
    kept = plan_of(base, edits).digest
    assert plan_of(base, other).digest != kept


@pytest.mark.parametrize("family", sorted(POST_NORM))
def test_nulling_behind_post_norms(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """With allow = nulling the direction leaves the stream, and the plan says what that costs."""
    base = base_at(tiny_checkpoint(family))
    direction = vector(base.layout.hidden)
    edits = [edit(base, "ablate", make.ablate(direction), "resid")]
    plan = plan_of(base, edits, allow=["nulling"])
    assert plan.exactness is Exactness.NULLING
    with pytest.raises(InexactPlan):
        bake(base, plan, tmp_path / "refused")
    out = bake(base, plan, tmp_path / "out", allow=frozenset(["nulling"]))
    unit = direction / direction.norm()

    def along(model: torch.nn.Module) -> float:
        with torch.no_grad():
            states = model(tiny.tokens(), output_hidden_states=True).hidden_states[:-1]
        return max(float((state @ unit).abs().max()) for state in states)

    assert along(base.model) > 0.1
    assert along(tiny.load(out)) < 1e-5  # norms in float32 here: their rounding is what is left
    assert measure(base, edits, out).error > 1e-3  # and it is not the hooked function


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_recast_opens_bias_slots(
    family: str, tied: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(family, tied=tied))
    hidden = base.layout.hidden
    edits = [
        edit(base, "offset", make.offset(vector(hidden)), "resid_post.1"),
        edit(base, "affine", make.affine(vector(hidden, 1), mean=vector(hidden, 2)), MODULES),
        edit(base, "offset", make.offset(vector(hidden, 3)), "ln2_out.0"),
    ]
    refused = plan_of(base, edits)
    assert refused.exactness is Exactness.IMPOSSIBLE
    assert any('allow = ["recast"]' in str(finding.remedy) for finding in refused.findings)
    plan = plan_of(base, edits, allow=["recast"])
    assert plan.layout.family.name == "llama"
    measured = measure(base, edits, bake(base, plan, tmp_path / "out"))
    assert measured.effect > 1e-2
    assert measured.error <= RELATIVE * measured.effect
    config = tiny.config_of(tmp_path / "out")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["attention_bias"] is config["mlp_bias"] is True
    assert config["tie_word_embeddings"] is False  # the affine edit changes the embedding


def test_recast_is_refused_where_it_is_not_exact(tiny_checkpoint: Callable[..., Path]) -> None:
    base = base_at(tiny_checkpoint("mistral", sliding_window=4))
    edits = [edit(base, "offset", make.offset(vector(base.layout.hidden)), "resid_post.1")]
    plan = plan_of(base, edits, allow=["recast"])
    assert plan.exactness is Exactness.IMPOSSIBLE
    assert "not declared as llama: sliding_window is 4" in " ".join(plan.notes)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "phi3", "gpt_neox", "olmo2"])
@pytest.mark.parametrize("form", ["offset", "ablate"])
def test_tied_head_is_untied(
    family: str, form: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(family, tied=True))
    kind, map_ = MAPS[form](base.layout.hidden)
    edits = [edit(base, kind, map_, "embed")]
    plan = plan_of(base, edits)
    assert any("untied" in note and "bytes" in note for note in plan.notes)
    measured = measure(base, edits, bake(base, plan, tmp_path / "out"))
    assert measured.error <= RELATIVE * measured.effect
    head = base.layout.unembed.weight
    assert torch.equal(
        tiny.tensors_of(tmp_path / "out")[head], tiny.tensors_of(base.path)[base.layout.embed]
    )


def with_copy(path: Path, out: Path, change: float = 0.0) -> Path:
    """Return a checkpoint whose tied head is stored as well, its first value changed."""
    shutil.copytree(path, out)
    layout, tensors = tiny.layout_of(path), tiny.tensors_of(path)
    head = tensors[layout.embed].clone()
    head[0, 0] += change
    save_file({**tensors, layout.unembed.weight: head}, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("at", ["embed", "ln_final_out", "resid", "mlp_out.1"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_tied_head_that_is_stored_as_well(
    family: str, at: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The copy becomes the head where the two part, and stays a copy where they do not."""
    path = with_copy(tiny_checkpoint(family, tied=True), tmp_path / "base")
    assert layout_of(open_checkpoint(path)).head_is_stored
    base = base_at(path)
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), at)]
    plan = plan_of(base, edits)
    assert not any(update.create for update in plan.tensors)
    out = bake(base, plan, tmp_path / "out")
    measured = measure(base, edits, out)
    assert measured.effect > 1e-2
    assert measured.error <= RELATIVE * measured.effect
    parted = at != "mlp_out.1"
    assert plan.unties == parted
    assert tiny.config_of(out)["tie_word_embeddings"] is not parted
    baked = tiny.tensors_of(out)
    head, embed = baked[base.layout.unembed.weight], baked[base.layout.embed]
    assert torch.equal(head, embed) is not parted
    # Without the change of config.json the head would be lost: transformers ties what it says.
    layout_of(open_checkpoint(out))


def test_a_tied_head_with_other_values_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = with_copy(tiny_checkpoint("llama", tied=True), tmp_path / "base", change=1e-9)
    with pytest.raises(FamilyError, match=r"stores lm_head\.weight as well, and it is another"):
        layout_of(open_checkpoint(path))


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if tiny.unbiased(name)])
def test_a_closed_bias_flag_is_opened_with_zeros_everywhere(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(family, **tiny.unbiased(family)))
    edits = [edit(base, "offset", make.offset(vector(base.layout.hidden)), "attn_out.1")]
    plan = plan_of(base, edits)
    flag, linears = tiny.OPENED.get(family, tiny.OPENED_BY_MOST)
    assert sum(bias.is_zero() for bias in plan.biases) == linears * base.layout.layers - 1
    check(base, edits, exact=True, out=tmp_path / "out")
    assert tiny.config_of(tmp_path / "out")[flag] is True


def test_square_projections_are_folded_on_the_right_side(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", square=True))
    writer = base.layout.branches[0].writes[0]
    assert writer.shape[0] == writer.shape[1]
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), "resid")]
    check(base, edits, exact=True, out=tmp_path / "out")


def test_every_stream_kind_appears() -> None:
    assert {
        pattern.partition(".")[0]
        for _, at, _ in STREAM.values()
        for pattern in [at]
        if isinstance(at, str)
    } >= {
        *STREAM_KINDS,
        "resid",
    }
