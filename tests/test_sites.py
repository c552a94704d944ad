"""Names of sites: parsing inverts printing, order is the forward pass's, errors say what to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bake.errors import UsageError
from bake.sites import (
    GLOBAL_KINDS,
    HEAD_KINDS,
    STREAM_KINDS,
    Site,
    SiteKind,
    expand,
    parse_site,
    span,
    summary,
)

LAYERS = 4
STREAM = tuple(
    parse_site(f"resid_{kind}.{layer}") for layer in range(4) for kind in ("mid", "post")
)
STREAM = (parse_site("resid_pre.0"), *STREAM)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    kind = draw(st.sampled_from(SiteKind))
    layer = None if kind in GLOBAL_KINDS else draw(st.integers(0, 200))
    head = draw(st.none() | st.integers(0, 200)) if kind in HEAD_KINDS else None
    return Site(kind, layer, head)


def names(found: tuple[Site, ...]) -> list[str]:
    return [str(site) for site in found]


def select(patterns: str | list[str], layers: int = LAYERS) -> list[str]:
    return names(expand(patterns, layers=layers, stream=STREAM))


@given(sites())
def test_parsing_inverts_printing(site: Site) -> None:
    assert parse_site(str(site)) == site


@given(sites(), sites())
def test_different_sites_have_different_names(one: Site, other: Site) -> None:
    assert (str(one) == str(other)) == (one == other)


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("embed", Site(SiteKind.EMBED)),
        ("resid_post.12", Site(SiteKind.RESID_POST, 12)),
        ("z.3.h5", Site(SiteKind.Z, 3, 5)),
        ("ln_final_out", Site(SiteKind.LN_FINAL_OUT)),
    ],
)
def test_names_by_hand(text: str, site: Site) -> None:
    assert parse_site(text) == site
    assert str(site) == text


def test_every_kind_is_in_the_order_of_a_forward_pass() -> None:
    one_block = [
        "resid_pre.0", "ln1_out.0", "q.0", "k.0", "v.0", "z.0", "attn_out.0", "ln1_post_out.0",
        "ln3_out.0", "extra_out.0", "ln3_post_out.0", "resid_mid.0",
        "ln2_out.0", "mlp_gate.0", "mlp_up.0", "mlp_act.0", "mlp_out.0",
        "ln2_post_out.0", "resid_post.0",
    ]  # fmt: skip
    second = [name.replace(".0", ".1") for name in one_block]
    ordered = ["embed", *one_block, *second, "ln_final_out"]
    assert {parse_site(name).kind for name in ordered} == set(SiteKind)
    shuffled = sorted(ordered)
    assert shuffled != ordered
    assert [str(s) for s in sorted(map(parse_site, shuffled), key=lambda s: s.order)] == ordered


def test_a_site_comes_before_its_heads_and_layers_count_as_numbers() -> None:
    ordered = ["z.2", "z.2.h0", "z.2.h9", "z.2.h10", "attn_out.2", "z.10"]
    found = sorted(map(parse_site, sorted(ordered)), key=lambda site: site.order)
    assert names(tuple(found)) == ordered


@given(sites(), sites())
def test_order_is_total(one: Site, other: Site) -> None:
    assert (one.order == other.order) == (one == other)


def test_stream_kinds_are_those_of_the_stream() -> None:
    assert {kind for kind in SiteKind if kind.startswith("resid")} == set(STREAM_KINDS)


# Selections


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        ("resid", names(STREAM)),
        ("attn_out.*", ["attn_out.0", "attn_out.1", "attn_out.2", "attn_out.3"]),
        ("mlp_out.1-2", ["mlp_out.1", "mlp_out.2"]),
        ("mlp_out.3-3", ["mlp_out.3"]),
        ("z.1-2.h5", ["z.1.h5", "z.2.h5"]),
        ("z.*.h0", ["z.0.h0", "z.1.h0", "z.2.h0", "z.3.h0"]),
        ("ln_final_out", ["ln_final_out"]),
        ("hidden_states[0]", ["resid_pre.0"]),
        ("hidden_states[1]", ["resid_post.0"]),
        ("hidden_states[3]", ["resid_post.2"]),
        ("hidden_states[-2]", ["resid_post.2"]),
        ("hidden_states[-4]", ["resid_post.0"]),
        ("hidden_states[-5]", ["resid_pre.0"]),
        (["mlp_out.2", "embed", "attn_out.0"], ["mlp_out.2", "embed", "attn_out.0"]),
        (["q.1", "q.0-2", "q.1"], ["q.1", "q.0", "q.2"]),
        (["resid_post.3", "resid"], ["resid_post.3", *names(STREAM[:-1])]),
    ],
)  # fmt: skip
def test_selections(patterns: str | list[str], found: list[str]) -> None:
    assert select(patterns) == found


@given(st.integers(1, 40), st.data())
def test_a_range_is_its_layers(layers: int, data: st.DataObject) -> None:
    last = data.draw(st.integers(0, layers - 1))
    first = data.draw(st.integers(0, last))
    one_by_one = [f"mlp_out.{layer}" for layer in range(first, last + 1)]
    assert select(f"mlp_out.{first}-{last}", layers) == one_by_one == select(one_by_one, layers)
    if (first, last) == (0, layers - 1):
        assert select("mlp_out.*", layers) == one_by_one


@given(st.integers(1, 60), st.data())
def test_hidden_states_count_the_embedding_as_zero(layers: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(1, layers - 1)) if layers > 1 else 0
    (name,) = select(f"hidden_states[{index}]", layers)
    assert name == (f"resid_post.{index - 1}" if index else "resid_pre.0")


# Errors: what is wrong, and what to write instead


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("resid_pst.3", "unknown site 'resid_pst.3'", "did you mean 'resid_post'?"),
        ("attnout.*", "unknown site 'attnout.*'", "did you mean 'attn_out'?"),
        ("residual", "unknown site 'residual'", "did you mean 'resid'?"),
        ("resid.3", "unknown site 'resid.3'", "did you mean 'resid'?"),
        ("blocks.3", "unknown site 'blocks.3'", "the sites are resid, embed, resid_pre, ln1_out"),
        ("", "unknown site ''", "the sites are resid, embed"),
        ("Q.1", "unknown site 'Q.1'", "the sites are resid"),
        ("resid_post", "'resid_post' names no layer", "write resid_post.14, resid_post.*"),
        ("z.h3", "'z.h3' names no layer", "write z.14, z.* or z.8-20"),
        ("embed.3", "'embed.3' names a layer, but the model has one embed", "write embed"),
        ("embed.x", "cannot read the site 'embed.x'", "write embed"),
        ("ln_final_out.*", "a layer, but the model has one ln_final_out", "write ln_final_out"),
        ("mlp_out.3.h1", "'mlp_out.3.h1' names a head, but mlp_out has none", "q, k, v, z"),
        ("embed.h1", "'embed.h1' names a head, but embed has none", "heads go with q, k, v, z"),
        ("resid_post.x", "cannot read the site 'resid_post.x'", "write resid_post.14"),
        ("resid_post.-1", "cannot read the site 'resid_post.-1'", "write resid_post.14"),
        ("resid_post.1.5", "cannot read the site 'resid_post.1.5'", "resid_post.8-20"),
        ("z.3.5", "cannot read the site 'z.3.5'", "and z.3.h5 for one head"),
        ("z.\u0663", "cannot read the site", "write z.14"),  # an Arabic digit is no digit here
        (f"z.{'9' * 5000}", "cannot read the site", "write z.14"),
        (" embed", "unknown site ' embed'", "did you mean 'embed'?"),
        ("embed\n", "unknown site", "did you mean 'embed'?"),
    ],
)  # fmt: skip
def test_what_is_no_site(text: str, what: str, fix: str) -> None:
    for read in (parse_site, select):
        with pytest.raises(UsageError) as caught:
            read(text)
        assert what in caught.value.what
        assert fix in str(caught.value.fix)
        assert "embed.14" not in str(caught.value.fix)


@pytest.mark.parametrize("text", ["resid_post.*", "resid_post.1-2", "z.*.h3", "q.2-2"])
def test_one_site_is_no_selection(text: str) -> None:
    assert select(text)
    with pytest.raises(UsageError, match="several sites where one is meant") as caught:
        parse_site(text)
    assert caught.value.fix == "name one layer"


@pytest.mark.parametrize(
    ("patterns", "what", "fix"),
    [
        ("mlp_out.4", "'mlp_out.4' names layer 4, but the model has 4 blocks", "from 0 to 3"),
        ("z.2-9.h1", "'z.2-9.h1' names layer 9, but the model has 4 blocks", "from 0 to 3"),
        (["embed", "q.7"], "'q.7' names layer 7", "from 0 to 3"),
        ("mlp_out.3-1", "'mlp_out.3-1' counts layers downwards", "write mlp_out.1-3"),
        ("z.3-1.h2", "'z.3-1.h2' counts layers downwards", "write z.1-3.h2"),
        ("hidden_states[-1]", "is no residual-stream site", "resid_post.3 (before the norm)"),
        ("hidden_states[4]", "is no residual-stream site", "ln_final_out (after it)"),
        ("hidden_states[5]", "is out of range: the model has 4 blocks", "to hidden_states[3]"),
        ("hidden_states[-6]", "is out of range: the model has 4 blocks", "hidden_states[0] to"),
        ([], "the selection of sites is empty", 'at = "resid"'),
    ],
)
def test_selections_that_fit_no_model(patterns: str | list[str], what: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        select(patterns)
    assert what in caught.value.what
    assert fix in str(caught.value.fix)


def test_the_last_hidden_state_is_refused_with_the_reason() -> None:
    with pytest.raises(UsageError) as caught:
        select("hidden_states[-1]")
    assert caught.value.why == "transformers takes the last hidden state after the final norm"
    assert caught.value.exit_code == 2


def test_numbers_and_sites_in_few_words() -> None:
    assert span([3, 0, 5, 4, 3]) == "0,3-5"
    assert span([7]) == "7"
    sites = [parse_site(text) for text in ("z.0.h1", "z.1.h1", "embed", "resid_post.3")]
    assert summary(sites) == "z.0-1.h1, embed, resid_post.3"
