"""Hooks against forward passes written by hand, and against weights changed in the live model."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from tiny import (
    CONFIGS,
    EAGER,
    FAMILIES,
    MIXTURES,
    PARALLEL,
    UNGATED,
    config_of,
    header_of,
    layout_of,
    make_model,
    tokens,
)
from tiny import tolerance as model_tolerance
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bake import edits
from bake.affine import AffineMap, identity
from bake.edits import Edit, EditKind, WeightUpdate
from bake.errors import DirectionError, FamilyError, UsageError
from bake.families import Layout, family_named, resolve
from bake.nonlinear import Clamp, Gated, Masked, Measure, Nonlinear, NormPreserving
from bake.sites import Site, SiteKind, parse_site
from bake.steer import steered
from bake.verify.precision import double_precision

Maps = Mapping[Site, AffineMap]
Subject = Callable[[str], tuple[PreTrainedModel, Layout]]
EFFECT = 1e-3  # what every edit here moves the logits by, at least, relative to the largest
SEQUENTIAL = tuple(family for family in FAMILIES if family not in PARALLEL)


@pytest.fixture(autouse=True)
def _float64(request: pytest.FixtureRequest) -> Iterator[None]:
    narrow = "dtype" in request.fixturenames
    with torch.no_grad(), nullcontext() if narrow else double_precision():
        yield


# Models and edits


@pytest.fixture
def subject(
    tiny_checkpoint: Callable[..., Path],
) -> Callable[[str], tuple[PreTrainedModel, Layout]]:
    return lambda family: (_model(family), _layout(tiny_checkpoint(family)))


@cache
def _model(family: str) -> PreTrainedModel:
    return make_model(family)


@cache
def _layout(path: Path) -> Layout:
    return layout_of(path)


def random_map(kind: EditKind, width: int, seed: int = 0) -> AffineMap | Nonlinear:
    """Return an edit of that kind which moves an activation by about its own size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        EditKind.ABLATE: lambda: edits.ablate(draw(2, width)),
        EditKind.AFFINE: lambda: edits.affine(draw(width), mean=draw(width), alpha=0.5),
        EditKind.ERASE: lambda: edits.erase(draw(width, 2), draw(2, width), mean=draw(width)),
        EditKind.OFFSET: lambda: edits.offset(draw(width), coefficient=0.7),
        EditKind.SCALE: lambda: edits.scale(1 + 0.5 * draw(width), shift=0.3 * draw(width)),
        EditKind.ROTATE: lambda: edits.rotate(torch.linalg.qr(draw(width, width))[0]),
        EditKind.LINEAR: lambda: edits.linear(draw(width, width) / width**0.5, shift=draw(width)),
        EditKind.CLAMP: lambda: Clamp(
            draw(width, 2), draw(2, width), draw(width), -0.3, 0.2, (0.0, 0.1)
        ),
        EditKind.MASKED_SCALE: lambda: Masked(
            1 + draw(width), draw(width), -draw(width).abs(), draw(width).abs()
        ),
        EditKind.NORM_PRESERVING: lambda: NormPreserving(edits.ablate(draw(width // 2, width))),
        EditKind.GATE: lambda: Gated(
            edits.offset(draw(width)), draw(width), 0.0, True, Measure.PROJECTION
        ),
    }[kind]()


MAP_KINDS = tuple(kind for kind in EditKind if kind is not EditKind.UPDATE)
AFFINE_KINDS = tuple(kind for kind in MAP_KINDS if isinstance(random_map(kind, 8), AffineMap))


def at(site: Site | str, map_: AffineMap | WeightUpdate | Nonlinear) -> Edit:
    where = parse_site(site) if isinstance(site, str) else site
    return Edit(EditKind.LINEAR, "test", (where,), map_)


def one_map_per_site(layout: Layout, sites: Sequence[Site]) -> dict[Site, AffineMap]:
    """Return a map for every site, the kinds in turn."""
    maps = {}
    for index, site in enumerate(sites):
        kind = AFFINE_KINDS[index % len(AFFINE_KINDS)]
        if kind is EditKind.OFFSET and site.kind is SiteKind.K:
            kind = EditKind.LINEAR  # without rotary embeddings softmax cancels a constant key
        found = random_map(kind, layout.width(site), seed=index)
        assert isinstance(found, AffineMap)
        maps[site] = found
    return maps


def logits_of(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    logits: Tensor = model(tokens() if ids is None else ids).logits
    return logits


def steered_logits(
    model: PreTrainedModel, layout: Layout, edits_: Sequence[Edit], ids: Tensor | None = None
) -> Tensor:
    with steered(model, layout, edits_):
        return logits_of(model, ids)


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


# The forward pass by hand: blocks written out per family, with maps applied at named sites


def _change(maps: Maps, kind: str, layer: int | None, x: Tensor) -> Tensor:
    map_ = maps.get(Site(SiteKind(kind), layer))
    return x if map_ is None else map_(x)


def _pre_norm(b: nn.Module, do: Callable[[str, Tensor], Tensor], x: Tensor, **context: Any):
    x = do("resid_pre", x)
    n = do("ln1_out", b.input_layernorm(x))
    x = x + do("attn_out", b.self_attn(hidden_states=n, **context)[0])
    x = do("resid_mid", x)
    x = x + do("mlp_out", b.mlp(do("ln2_out", b.post_attention_layernorm(x))))
    return do("resid_post", x)


def _granite(b: nn.Module, do: Callable[[str, Tensor], Tensor], x: Tensor, **context: Any):
    x = do("resid_pre", x)
    n = do("ln1_out", b.input_layernorm(x))
    x = x + 0.4 * do("attn_out", b.self_attn(hidden_states=n, **context)[0])
    x = do("resid_mid", x)
    x = x + 0.4 * do("mlp_out", b.mlp(do("ln2_out", b.post_attention_layernorm(x))))
    return do("resid_post", x)


def _sandwich(b: nn.Module, do: Callable[[str, Tensor], Tensor], x: Tensor, **context: Any):
    x = do("resid_pre", x)
    n = do("ln1_out", b.input_layernorm(x))
    w = do("attn_out", b.self_attn(hidden_states=n, **context)[0])
    x = do("resid_mid", x + do("ln1_post_out", b.post_attention_layernorm(w)))
    w = do("mlp_out", b.mlp(do("ln2_out", b.pre_feedforward_layernorm(x))))
    return do("resid_post", x + do("ln2_post_out", b.post_feedforward_layernorm(w)))


def _post_norm(b: nn.Module, do: Callable[[str, Tensor], Tensor], x: Tensor, **context: Any):
    x = do("resid_pre", x)
    w = do("attn_out", b.self_attn(hidden_states=x, **context)[0])
    x = do("resid_mid", x + do("ln1_post_out", b.post_attention_layernorm(w)))
    w = do("mlp_out", b.mlp(x))
    return do("resid_post", x + do("ln2_post_out", b.post_feedforward_layernorm(w)))


def _gpt2(b: nn.Module, do: Callable[[str, Tensor], Tensor], x: Tensor, past, mask, _, **__: Any):
    x = do("resid_pre", x)
    n = do("ln1_out", b.ln_1(x))
    x = x + do("attn_out", b.attn(n, past_key_values=past, attention_mask=mask)[0])
    x = do("resid_mid", x)
    x = x + do("mlp_out", b.mlp(do("ln2_out", b.ln_2(x))))
    return do("resid_post", x)


def _neox(b: nn.Module, do: Callable[[str, Tensor], Tensor], x: Tensor, **context: Any):
    x = do("resid_pre", x)
    a = do("attn_out", b.attention(do("ln1_out", b.input_layernorm(x)), **context)[0])
    m = do("mlp_out", b.mlp(do("ln2_out", b.post_attention_layernorm(x))))
    return do("resid_post", x + a + m)


def _neox_sequential(b: nn.Module, do: Callable[[str, Tensor], Tensor], x: Tensor, **context: Any):
    x = do("resid_pre", x)
    x = x + do("attn_out", b.attention(do("ln1_out", b.input_layernorm(x)), **context)[0])
    x = do("resid_mid", x)
    x = x + do("mlp_out", b.mlp(do("ln2_out", b.post_attention_layernorm(x))))
    return do("resid_post", x)


BLOCKS: dict[str, Callable[..., Tensor]] = {
    "gemma2": _sandwich,
    "gemma3": _sandwich,
    "olmo2": _post_norm,
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "gpt_neox_sequential": _neox_sequential,
    "granite": _granite,
}
BLOCK_LISTS = {"gpt2": "h"}


def by_hand(model: PreTrainedModel, family: str, maps: Maps, ids: Tensor | None = None) -> Tensor:
    """Return the logits of the forward pass with maps at block sites, embed and ln_final_out."""
    base = model.base_model
    blocks = getattr(base, BLOCK_LISTS.get(family, "layers"))
    embedded = model.get_input_embeddings()(tokens() if ids is None else ids)
    with _replaced(blocks, BLOCKS.get(family, _pre_norm), maps):
        x = base(inputs_embeds=_change(maps, "embed", None, embedded)).last_hidden_state
    logits: Tensor = model.lm_head(_change(maps, "ln_final_out", None, x))
    if family == "gemma2":
        return 30 * torch.tanh(logits / 30)
    return logits / 3 if family == "granite" else logits


@contextmanager
def _replaced(blocks: nn.ModuleList, forward: Callable[..., Tensor], maps: Maps) -> Iterator[None]:
    for layer, block in enumerate(blocks):
        do = partial(lambda layer, kind, x: _change(maps, kind, layer, x), layer)
        block.forward = partial(forward, block, do)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


# The inner sites by hand: weights of a copy of the model, rows counted out per family

LLAMA_READERS = {
    SiteKind.Q: "self_attn.q_proj",
    SiteKind.K: "self_attn.k_proj",
    SiteKind.V: "self_attn.v_proj",
    SiteKind.MLP_GATE: "mlp.gate_proj",
    SiteKind.MLP_UP: "mlp.up_proj",
}
QKV = (SiteKind.Q, SiteKind.K, SiteKind.V)
INNER = (*LLAMA_READERS, SiteKind.Z, SiteKind.MLP_ACT)


# How the linear layers of a block are called, by hand: a family whose names are not Llama's has a
# branch in ``reader`` and in ``writer``.
def reader(family: str, kind: SiteKind) -> tuple[str, list[int] | None]:
    """Return the module of a block, and the rows of its output, that a site is."""
    if family == "gpt2":  # [q | k | v], each 24 wide
        if kind is SiteKind.MLP_UP:
            return "mlp.c_fc", None
        start = 24 * QKV.index(kind)
        return "attn.c_attn", list(range(start, start + 24))
    if family.startswith("gpt_neox"):  # [q0 k0 v0 q1 k1 v1 …], each 8 wide
        if kind is SiteKind.MLP_UP:
            return "mlp.dense_h_to_4h", None
        grid = torch.arange(96).view(4, 3, 8)
        return "attention.query_key_value", grid[:, QKV.index(kind)].flatten().tolist()
    if family == "phi3":  # [q | k | v] of 32, 16, 16 and [gate | up] of 40 each
        start, size = {
            SiteKind.Q: (0, 32),
            SiteKind.K: (32, 16),
            SiteKind.V: (48, 16),
            SiteKind.MLP_GATE: (0, 40),
            SiteKind.MLP_UP: (40, 40),
        }[kind]
        name = "self_attn.qkv_proj" if kind in QKV else "mlp.gate_up_proj"
        return name, list(range(start, start + size))
    return LLAMA_READERS[kind], None


def writer(family: str, kind: SiteKind) -> str:
    attention = kind in (SiteKind.Z, SiteKind.ATTN_OUT)
    if family == "gpt2":
        return "attn.c_proj" if attention else "mlp.c_proj"
    if family.startswith("gpt_neox"):
        return "attention.dense" if attention else "mlp.dense_4h_to_h"
    return "self_attn.o_proj" if attention else "mlp.down_proj"


def rewrite(model: PreTrainedModel, family: str, site: Site, map_: AffineMap) -> None:
    """Change the weights of the live model so that they do what the map does at an inner site."""
    blocks = getattr(model.base_model, BLOCK_LISTS.get(family, "layers"))
    if site.kind in (SiteKind.Z, SiteKind.MLP_ACT):
        linear = blocks[site.layer].get_submodule(writer(family, site.kind))
        weight, bias = _weights(linear)
        full = _at_head(map_, site, weight.shape[1])
        _set_weights(linear, weight @ full.matrix(), bias + weight @ full.bias)
        return
    name, rows = reader(family, site.kind)
    linear = blocks[site.layer].get_submodule(name)
    weight, bias = _weights(linear)
    rows = list(range(weight.shape[0])) if rows is None else rows
    full = _at_head(map_, site, len(rows))
    weight[rows] = full.matrix() @ weight[rows]
    bias[rows] = full(bias[rows])
    _set_weights(linear, weight, bias)


def _at_head(map_: AffineMap, site: Site, width: int) -> AffineMap:
    if site.head is None:
        return map_
    start = site.head * map_.width
    return map_.scatter(torch.arange(start, start + map_.width), width)


def _weights(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """Return copies of the weight as [out, in] and of the bias, zeros where there is none."""
    conv1d = type(linear).__name__ == "Conv1D"
    weight = (linear.weight.T if conv1d else linear.weight).detach().clone()
    return weight, weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.clone()


def _set_weights(linear: nn.Module, weight: Tensor, bias: Tensor) -> None:
    conv1d = type(linear).__name__ == "Conv1D"
    linear.weight = nn.Parameter(weight.T.contiguous() if conv1d else weight)
    linear.bias = nn.Parameter(bias)


# Every family, every site


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_site(family: str, subject: Subject) -> None:
    model, layout = subject(family)
    base, allowed = logits_of(model), model_tolerance(model)
    assert distance(by_hand(model, family, {}), base) <= allowed
    sites = [site for site in layout.sites if site.kind not in INNER]
    maps = one_map_per_site(layout, sites)
    for site, map_ in maps.items():
        hooked = steered_logits(model, layout, [at(site, map_)])
        assert distance(hooked, base) > EFFECT, site
        assert distance(hooked, by_hand(model, family, {site: map_})) <= allowed, site
    together = steered_logits(model, layout, [at(site, map_) for site, map_ in maps.items()])
    assert distance(together, by_hand(model, family, maps)) <= allowed
    for site in sites:  # control: leaving any one site out shows
        fewer = {other: map_ for other, map_ in maps.items() if other != site}
        assert distance(together, by_hand(model, family, fewer)) > EFFECT, site


@pytest.mark.parametrize("family", FAMILIES)
def test_every_inner_site(family: str, subject: Subject) -> None:
    model, layout = subject(family)
    base, allowed = logits_of(model), model_tolerance(model)
    whole = [site for site in layout.sites if site.kind in INNER]
    heads = [dataclasses.replace(site, head=1) for site in whole if site.kind in (*QKV, "z")]
    assert {site.kind for site in heads} == {"q", "k", "v", "z"}
    maps = one_map_per_site(layout, [*whole, *heads])
    for site, map_ in maps.items():
        rewritten = copy.deepcopy(model)
        rewrite(rewritten, family, site, map_)
        hooked = steered_logits(model, layout, [at(site, map_)])
        assert distance(hooked, base) > EFFECT, site
        assert distance(hooked, logits_of(rewritten)) <= allowed, site
    rewritten = copy.deepcopy(model)
    for site, map_ in maps.items():
        if site.kind not in (SiteKind.Z, SiteKind.MLP_ACT):
            rewrite(rewritten, family, site, map_)
    for site, map_ in reversed(maps.items()):  # W ← W A: the last map comes next to the weight
        if site.kind in (SiteKind.Z, SiteKind.MLP_ACT):
            rewrite(rewritten, family, site, map_)
    together = steered_logits(model, layout, [at(site, map_) for site, map_ in maps.items()])
    assert distance(together, logits_of(rewritten)) <= allowed
    assert distance(together, hooked) > EFFECT


WRONG_KEYS = {  # the keys' rows, if the three outputs shared the layer in another way
    "gpt2": torch.arange(72).view(4, 3, 6)[:, 1].flatten().tolist(),  # head by head
    "gpt_neox": list(range(32, 64)),  # one after another
    "phi3": list(range(16)),  # keys first
}


@pytest.mark.parametrize("family", WRONG_KEYS)
def test_the_rows_of_a_fused_layer_have_one_order(
    family: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: with other rows the oracle of the test above disagrees."""
    model, layout = subject(family)
    site = Site(SiteKind.K, 1)
    map_ = random_map(EditKind.LINEAR, layout.width(site))
    hooked = steered_logits(model, layout, [at(site, map_)])
    module, right = reader(family, site.kind)
    for rows, agrees in ((right, True), (WRONG_KEYS[family], False)):
        monkeypatch.setitem(globals(), "reader", lambda *_, rows=rows: (module, rows))
        rewritten = copy.deepcopy(model)
        rewrite(rewritten, family, site, map_)
        error = distance(hooked, logits_of(rewritten))
        assert error <= model_tolerance(model) if agrees else error > EFFECT


@pytest.mark.parametrize("kind", MAP_KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_every_kind_of_edit(family: str, kind: EditKind, subject: Subject) -> None:
    model, layout = subject(family)
    sites = [Site(SiteKind.RESID_PRE, 1), Site(SiteKind.ATTN_OUT, 2), Site(SiteKind.EMBED)]
    map_ = random_map(kind, layout.hidden)
    hooked = steered_logits(model, layout, [Edit(kind, "test", tuple(sites), map_)])
    expected = by_hand(model, family, dict.fromkeys(sites, map_))
    assert distance(hooked, expected) <= model_tolerance(model)
    assert distance(hooked, logits_of(model)) > EFFECT


@pytest.mark.parametrize("family", FAMILIES)
def test_one_map_at_the_whole_stream(family: str, subject: Subject) -> None:
    model, layout = subject(family)
    map_ = random_map(EditKind.AFFINE, layout.hidden)
    edit = Edit(EditKind.AFFINE, "test", layout.stream, map_)
    hooked = steered_logits(model, layout, [edit])
    expected = by_hand(model, family, dict.fromkeys(layout.stream, map_))
    assert distance(hooked, expected) <= model_tolerance(model)
    without = by_hand(model, family, dict.fromkeys(layout.stream[:-1], map_))
    assert distance(hooked, without) > EFFECT


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_changes_no_bit(family: str, subject: Subject) -> None:
    model, layout = subject(family)
    every = [at(site, identity(layout.width(site))) for site in layout.sites]
    assert torch.equal(steered_logits(model, layout, every), logits_of(model))


def test_a_residual_gain_divides_the_write_at_resid_mid(tmp_path: Path) -> None:
    """Granite is Llama with multipliers: residual 0.4, embeddings 2, logits 1/3."""
    values = {**CONFIGS["llama"], "model_type": "granite", "residual_multiplier": 0.4}
    values |= {"embedding_multiplier": 2.0, "logits_scaling": 3.0}
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, **EAGER).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(tmp_path)
    family, header = family_named("llama"), header_of(tmp_path)
    own = {"attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling"}
    ungained = resolve(family, config_of(tmp_path), *header, assumed=own)
    branches = tuple(structs.replace(b, gain="residual_multiplier") for b in family.branches)
    gained = structs.replace(family, branches=branches)
    layout = resolve(gained, config_of(tmp_path), *header, assumed=own)
    maps = one_map_per_site(layout, [parse_site("resid_pre.1"), parse_site("resid_mid.1")])
    listed = [at(site, map_) for site, map_ in maps.items()]
    expected = by_hand(model, "granite", maps)
    assert distance(by_hand(model, "granite", {}), logits_of(model)) <= model_tolerance(model)
    assert distance(steered_logits(model, layout, listed), expected) <= model_tolerance(model)
    assert distance(steered_logits(model, ungained, listed), expected) > EFFECT  # control


def test_a_norm_that_two_branches_share_is_hooked_once(tiny_checkpoint, subject: Subject) -> None:
    """GPT-NeoX as GPT-J has it: by the table both branches read the first norm."""
    model, path = subject("gpt_neox")[0], tiny_checkpoint("gpt_neox")
    attn, mlp = family_named("gpt_neox").branches
    mlp = structs.replace(mlp, norm_in=attn.norm_in)
    family = structs.replace(family_named("gpt_neox"), branches=(attn, mlp))
    shapes, dtypes = header_of(path)
    left = {name: shape for name, shape in shapes.items() if "post_attention" not in name}
    layout = resolve(family, config_of(path), left, dtypes)
    site = parse_site("ln1_out.1")
    map_ = random_map(EditKind.LINEAR, layout.hidden)
    hooked = steered_logits(model, layout, [at(site, map_)])
    assert distance(hooked, by_hand(model, "gpt_neox", {site: map_})) <= model_tolerance(model)
    twice = by_hand(model, "gpt_neox", {site: map_.after(map_)})
    assert distance(hooked, twice) > EFFECT  # control


# Weight updates


UPDATABLE = ("attn_out", "mlp_out", "q", "k", "v", "mlp_gate", "mlp_up", "q.h1", "v.h1")


def update_at(layout: Layout, site: Site, inner: int, seed: int = 0) -> WeightUpdate:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(2, layout.width(site), generator=generator, dtype=torch.float64)
    right = torch.randn(2, inner, generator=generator, dtype=torch.float64) / inner**0.5
    return edits.update(left, right)


def add_to_weight(model: PreTrainedModel, family: str, site: Site, update: WeightUpdate) -> None:
    blocks = getattr(model.base_model, BLOCK_LISTS.get(family, "layers"))
    rows: list[int] | None = None
    if site.kind in (SiteKind.ATTN_OUT, SiteKind.MLP_OUT):
        name = writer(family, site.kind)
    else:
        name, rows = reader(family, site.kind)
    linear = blocks[site.layer].get_submodule(name)
    weight, bias = _weights(linear)
    rows = list(range(weight.shape[0])) if rows is None else rows
    if site.head is not None:
        size = len(update.left)
        rows = rows[site.head * size : (site.head + 1) * size]
    weight[rows] += update.left @ update.right
    _set_weights(linear, weight, bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_update_is_a_changed_weight(family: str, subject: Subject) -> None:
    model, layout = subject(family)
    base = logits_of(model)
    found = 0
    for kind in UPDATABLE:
        name, _, head = kind.partition(".")
        site = parse_site(f"{name}.1" + (f".{head}" if head else ""))
        if dataclasses.replace(site, head=None) not in layout.sites:
            continue
        if family in MIXTURES and site.kind is SiteKind.MLP_OUT:
            continue
        inner = {"attn_out": "z", "mlp_out": "mlp_act"}.get(name, "resid_pre")
        update = update_at(layout, site, layout.width(parse_site(f"{inner}.1")))
        changed = copy.deepcopy(model)
        add_to_weight(changed, family, site, update)
        hooked = steered_logits(model, layout, [at(site, update)])
        assert distance(hooked, base) > EFFECT, site
        assert distance(hooked, logits_of(changed)) <= model_tolerance(model), site
        found += 1
    assert found == {**dict.fromkeys(UNGATED, 8), **dict.fromkeys(MIXTURES, 6)}.get(family, 9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("into", "out"), [("mlp_act.1", "mlp_out.1"), ("ln1_out.1", "k.1")])
def test_an_update_sees_mapped_input_and_precedes_output_maps(
    family: str, into: str, out: str, subject: Subject
) -> None:
    model, layout = subject(family)
    update = update_at(layout, parse_site(out), layout.width(parse_site(into)))
    maps = one_map_per_site(layout, [parse_site(into), parse_site(out)])
    before, after = (at(site, map_) for site, map_ in maps.items())
    changed = copy.deepcopy(model)
    add_to_weight(changed, family, parse_site(out), update)
    expected = steered_logits(changed, layout, [before, after])
    hooked = steered_logits(model, layout, [after, at(out, update), before])
    assert distance(hooked, expected) <= model_tolerance(model)
    assert distance(steered_logits(model, layout, [after, before]), expected) > EFFECT


# Order, batches, caches, dtypes


@pytest.mark.parametrize("name", ["resid_post.1", "resid_mid.1", "z.1", "v.1", "mlp_act.0"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
def test_edits_at_one_site_compose_in_the_order_listed(
    family: str, name: str, subject: Subject
) -> None:
    model, layout = subject(family)
    width = layout.width(parse_site(name))
    first = random_map(EditKind.LINEAR, width, seed=1)
    second = random_map(EditKind.ERASE, width, seed=2)
    both = steered_logits(model, layout, [at(name, first), at(name, second)])
    one = steered_logits(model, layout, [at(name, second.after(first))])
    swapped = steered_logits(model, layout, [at(name, second), at(name, first)])
    assert distance(both, one) <= model_tolerance(model)
    assert distance(both, swapped) > EFFECT


def test_a_head_and_its_whole_site_keep_the_order_listed(subject: Subject) -> None:
    model, layout = subject("llama")
    whole = random_map(EditKind.LINEAR, layout.width(parse_site("z.1")), seed=1)
    head = random_map(EditKind.LINEAR, layout.width(parse_site("z.1.h2")), seed=2)
    wide = head.scatter(torch.arange(16, 24), 32)
    for listed, expected in (
        ([at("z.1", whole), at("z.1.h2", head)], wide.after(whole)),
        ([at("z.1.h2", head), at("z.1", whole)], whole.after(wide)),
    ):
        hooked = steered_logits(model, layout, listed)
        one = steered_logits(model, layout, [at("z.1", expected)])
        assert distance(hooked, one) <= model_tolerance(model)
        assert distance(steered_logits(model, layout, listed[::-1]), one) > EFFECT


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_at_different_sites_may_be_listed_in_any_order(family: str, subject: Subject) -> None:
    model, layout = subject(family)
    maps = one_map_per_site(layout, layout.sites)
    listed = [at(site, map_) for site, map_ in maps.items()]
    forward = steered_logits(model, layout, listed)
    assert torch.equal(steered_logits(model, layout, listed[::-1]), forward)
    assert distance(forward, logits_of(model)) > EFFECT


def test_two_names_of_one_point_apply_in_forward_order(subject: Subject) -> None:
    model, layout = subject("llama")
    post = random_map(EditKind.LINEAR, layout.hidden, seed=1)
    pre = random_map(EditKind.ERASE, layout.hidden, seed=2)
    listed = [at("resid_pre.2", pre), at("resid_post.1", post)]
    expected = steered_logits(model, layout, [at("resid_post.1", pre.after(post))])
    hooked = steered_logits(model, layout, listed)
    assert distance(hooked, expected) <= model_tolerance(model)
    other = steered_logits(model, layout, [at("resid_post.1", post.after(pre))])
    assert distance(hooked, other) > EFFECT


def every_site(layout: Layout) -> list[Edit]:
    """Return a moderate edit at every site, so that the steered model is another model."""
    return [
        at(site, edits.ablate(torch.randn(layout.width(site), dtype=torch.float64), strength=0.5))
        for site in layout.sites
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_rows(family: str, subject: Subject) -> None:
    model, layout = subject(family)
    listed = every_site(layout)
    both = steered_logits(model, layout, listed)
    singles = torch.cat(
        [steered_logits(model, layout, listed, row.unsqueeze(0)) for row in tokens()]
    )
    assert distance(both, singles) <= model_tolerance(model)
    # control: both rows are edited, not the first alone
    effects = (both - logits_of(model)).abs().amax(dim=(1, 2)) / both.abs().max()
    assert (effects > EFFECT).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_is_the_forward_pass_without(family: str, subject: Subject) -> None:
    model, layout = subject(family)
    listed = every_site(layout)
    prompt, new = tokens(length=6), 6

    def generate() -> Tensor:
        generated: Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
        )
        return generated

    with steered(model, layout, listed):
        generated, ids = generate(), prompt
        for _ in range(new):
            last = model(ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, ids)
    assert not torch.equal(generated, generate())  # effect: other tokens without the hooks


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_arithmetic_is_float32_cast_back_once(
    family: str, dtype: torch.dtype, subject: Subject
) -> None:
    model, (_, layout) = make_model(family, dtype=dtype), subject(family)
    map_ = random_map(EditKind.LINEAR, layout.hidden)
    block = model.get_submodule(layout.block_live.replace("{layer}", "1"))
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *call: seen.append(call[-1]))]
    before = []
    handles.append(block.register_forward_hook(lambda *call: before.append(call[-1].clone())))
    with steered(model, layout, [at("resid_post.1", map_)]):
        handles.append(block.register_forward_hook(lambda *call: seen.append(call[-1])))
        logits = logits_of(model)
    for handle in handles:
        handle.remove()
    assert logits.dtype is dtype
    assert seen[1].dtype is dtype
    assert torch.equal(seen[1], map_.to(torch.float32)(seen[0].float()).to(dtype))
    assert torch.equal(seen[0], before[0])  # what came in is as it was
    assert not torch.equal(seen[1], seen[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_the_error_of_a_narrow_dtype_is_its_rounding(
    family: str, dtype: torch.dtype, subject: Subject
) -> None:
    model, layout = subject(family)
    listed = every_site(layout)
    with double_precision():
        exact = steered_logits(model, layout, listed)
    narrow = steered_logits(make_model(family, dtype=dtype), layout, listed)
    # What a chain of float64 products may lose scales with the machine epsilon.
    scale = torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
    assert 0 < distance(narrow.double(), exact) <= model_tolerance(model) * scale


def test_hooks_write_to_no_tensor_of_the_model(subject: Subject) -> None:
    for family in ("llama", "gpt2", "mixtral"):
        model, layout = subject(family)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        steered_logits(model, layout, every_site(layout))
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_tuple_outputs_and_keyword_inputs(subject: Subject) -> None:
    """Blocks of other versions of transformers return tuples or take keywords: the same hooks."""
    model, layout = subject("llama")
    listed = [*every_site(layout), at("resid_mid.1", random_map(EditKind.OFFSET, 24))]
    expected = steered_logits(model, layout, listed)
    blocks = list(model.model.layers)
    linears = [block.mlp.down_proj for block in blocks]
    handles = []
    for module, name in [*((b, "hidden_states") for b in blocks), *((x, "input") for x in linears)]:
        move = partial(lambda name, m, args, kwargs: (args[1:], {**kwargs, name: args[0]}), name)
        handles.append(module.register_forward_pre_hook(move, with_kwargs=True))
    for block in blocks:
        handles.append(block.register_forward_hook(lambda m, args, output: (output, "cache")))
    with steered(model, layout, listed):
        for block in blocks:
            handles.append(block.register_forward_hook(_unpack))
        logits = logits_of(model)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits, expected)


def _unpack(module: nn.Module, args: Any, output: tuple[Tensor, str]) -> Tensor:
    assert output[1] == "cache"
    return output[0]


# The context


def hook_count(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_after_the_context(subject: Subject) -> None:
    model, layout = subject("gemma2")
    base, count = logits_of(model), hook_count(model)
    with steered(model, layout, every_site(layout)):
        assert hook_count(model) > count
        assert distance(logits_of(model), base) > EFFECT
    assert hook_count(model) == count
    assert torch.equal(logits_of(model), base)


def test_hooks_are_gone_after_an_error(subject: Subject) -> None:
    model, layout = subject("llama")
    base, count = logits_of(model), hook_count(model)
    with pytest.raises(ZeroDivisionError), steered(model, layout, every_site(layout)):
        raise ZeroDivisionError
    assert hook_count(model) == count
    wrong = Edit(EditKind.OFFSET, "short", (parse_site("mlp_out.2"),), identity(5))
    with pytest.raises(DirectionError), steered(model, layout, [*every_site(layout), wrong]):
        pass
    assert hook_count(model) == count
    assert torch.equal(logits_of(model), base)


def test_contexts_nest(subject: Subject) -> None:
    model, layout = subject("llama")
    first, second = (at("resid_mid.1", random_map(EditKind.LINEAR, 24, seed=i)) for i in (1, 2))
    expected = steered_logits(model, layout, [first, second])
    with steered(model, layout, [first]):
        nested = steered_logits(model, layout, [second])
    assert torch.equal(nested, expected)


# Errors


def refused(model: PreTrainedModel, layout: Layout, edit: Edit) -> Exception:
    with pytest.raises((UsageError, DirectionError, FamilyError)) as caught:
        with steered(model, layout, [edit]):
            pass
    return caught.value


def test_sites_that_a_model_does_not_have(subject: Subject) -> None:
    parallel = refused(*subject("gpt_neox"), at("resid_mid.1", identity(32)))
    assert isinstance(parallel, UsageError)
    assert parallel.what == "gpt_neox has no site resid_mid.1"
    assert refused(*subject("llama"), at("resid_pre.3", identity(24))).what == (
        "llama has no site resid_pre.3"
    )
    assert refused(*subject("olmo2"), at("ln1_out.0", identity(24))).what == (
        "olmo2 has no site ln1_out.0"
    )
    assert refused(*subject("mixtral"), at("mlp_act.0", identity(40))).what == (
        "mixtral has no site mlp_act.0"
    )
    assert refused(*subject("llama"), at("k.0.h2", identity(8))).what == (
        "k.0.h2 names head 2, but there are 2"
    )
    assert refused(*subject("llama"), at(Site(SiteKind.Q), identity(24))).what == (
        "llama has no site q"
    )


def test_an_edit_of_another_width(subject: Subject) -> None:
    edit = Edit(EditKind.ABLATE, "refusal", (parse_site("z.1.h2"),), identity(32))
    error = refused(*subject("llama"), edit)
    assert isinstance(error, DirectionError)
    assert error.what == "the map has width 32, but z.1.h2 is 8 wide"
    assert error.where == "ablate 'refusal' at z.1.h2"
    assert error.fix == "use a direction that was fitted on this model, at a site of that width"


def test_updates_that_no_weight_can_take(subject: Subject) -> None:
    model, layout = subject("llama")
    error = refused(model, layout, at("z.1", update_at(layout, parse_site("z.1"), 24)))
    assert isinstance(error, UsageError)
    assert error.what == "a weight update cannot stand at z.1"
    assert error.fix == "name one of attn_out, mlp_out, q, k, v, mlp_gate, mlp_up"
    error = refused(model, layout, at("mlp_out.1", update_at(layout, parse_site("mlp_out.1"), 24)))
    assert isinstance(error, DirectionError)
    assert error.what == "the update is 24 × 24, but the weight at mlp_out.1 is 24 × 40"
    model, layout = subject("mixtral")
    error = refused(model, layout, at("mlp_out.1", update_at(layout, parse_site("mlp_out.1"), 40)))
    assert isinstance(error, UsageError)
    assert error.what == ("a weight update cannot stand at mlp_out.1: no single module writes it")


def test_a_model_that_is_not_the_layouts(subject: Subject) -> None:
    layout = subject("llama")[1]
    other = refused(subject("gpt_neox")[0], layout, at("resid_pre.1", identity(24)))
    assert isinstance(other, FamilyError)
    assert (
        other.what == "the model has 3 blocks of width 32, but the layout describes 3 of width 24"
    )
    other = refused(subject("gpt2")[0], layout, at("resid_pre.1", identity(24)))
    assert other.what == "the model has no module model.layers.1"
    assert other.why == "a GPT2LMHeadModel is not laid out as the table says"


def test_a_model_in_training_and_an_edit_of_nothing(subject: Subject) -> None:
    model, layout = subject("llama")
    nothing = refused(model, layout, Edit(EditKind.OFFSET, "warmth", (), identity(24)))
    assert nothing.what == "the offset edit 'warmth' names no site"
    training = copy.deepcopy(model).train()
    assert refused(training, layout, at("resid_pre.1", identity(24))).what == (
        "the model is in training mode"
    )


@pytest.mark.gpu
def test_maps_follow_the_activation_to_its_device(subject: Subject) -> None:
    model, layout = subject("llama")
    listed = every_site(layout)
    expected = steered_logits(model, layout, listed)
    moved = copy.deepcopy(model).to("cuda")
    hooked = steered_logits(moved, layout, listed, tokens().to("cuda"))
    assert distance(hooked.cpu(), expected) <= model_tolerance(model)
