"""Relocation in every family that is widened, against hooks, in float64.

The double is the baked model itself, whose norms divide by the lengths that the hooked stream has
(``lengths``): it has to be the hooked model. Random weights have large shares along any direction,
so that how much is lost without the double says nothing of trained models.
"""

import runpy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from harness import RELATIVE, Base, bake, base_at, edit, logits, plain_logits, plan_of, vector
from lengths import recorded, seeing
from test_relocation import distance, edit_of, only_widened

from bake import edits
from bake.affine import AffineMap
from bake.edits import Edit, EditKind, WeightUpdate
from bake.jobs.planned import judged
from bake.plan import Exactness, Plan
from bake.plan.types import TensorUpdate
from bake.sites import parse_site
from bake.verify.precision import double_precision
from bake.verify.verification import Verification

WIDENED = tuple(family for family in tiny.FAMILIES if tiny.TABLES[family].widen is not None)
SLOTLESS = ("mistral", "mixtral", "qwen3", "gemma", "gemma2", "gemma3", "olmo2", "phi3")
"""No writer of a block's end has a bias, or a norm follows it."""
COMPUTED = ("llama", "mistral", "mixtral", "qwen2", "smollm3", "phi3", "gemma", "qwen3")
"""Behind a block its gated layer computes the edit, and not even lengths are lost."""
ALLOW = frozenset({"widen"})
ROOT = Path(__file__).parents[1]


def asked_of(base: Base, name: str) -> list[Edit]:
    """Return edits that have no exact fold, by a name."""
    width = base.layout.hidden
    sequence = [
        edit(base, "ablate", edits.ablate(vector(width, layer)), f"resid_post.{layer}")
        for layer in range(3)
    ]
    last = base.layout.stream[-1]
    offset = edit(base, "offset", edits.offset(3 * vector(width, 5)), "resid_post.1")
    return {
        "offset": lambda: [offset],
        "offsets": lambda: [offset, edit(base, "offset", edits.offset(vector(width)), str(last))],
        "ablation": lambda: [edit(base, "linear", edit_of("ablation", width), "resid_post.1")],
        "affine": lambda: [edit(base, "linear", edit_of("affine", width), "resid_post.0")],
        "eraser": lambda: [edit(base, "linear", edit_of("eraser", width), "resid_post.1")],
        "set": lambda: [
            edit(base, "affine", edits.affine(vector(width, 11), alpha=2.0), "resid_post.1")
        ],
        "half": lambda: [edit(base, "linear", edit_of("half", width), "resid_post.1")],
        "sequence": lambda: sequence,
        "mixed": lambda: [
            edit(base, "linear", edit_of("affine", width), "resid_post.0"),
            offset,
            edit(base, "linear", edit_of("half", width), str(last)),
        ],
    }[name]()


def losses(base: Base, asked: Sequence[Edit], plan: Plan, out: Path) -> tuple[float, float]:
    """Return what of the effect a baked model loses, as it is and as the double."""
    model = tiny.load(bake(base, plan, out, allow=ALLOW))
    lengths = recorded(base, list(asked))
    hooked = lengths[""]
    effect = distance(hooked, plain_logits(base))
    with torch.no_grad(), double_precision():
        own = model(tiny.tokens(), use_cache=False).logits
        with seeing(model, lengths):
            double = model(tiny.tokens(), use_cache=False).logits
    return distance(own, hooked) / effect, distance(double, hooked) / effect


CASES = [
    *((family, "affine") for family in WIDENED if family not in ("llama", "mistral", "qwen2")),
    *((family, "offset") for family in SLOTLESS),
    *(("gemma2", name) for name in ("ablation", "eraser", "half", "sequence", "mixed", "offsets")),
    *(("olmo2", name) for name in ("half", "mixed")),
    *(("gpt_neox", name) for name in ("eraser", "sequence", "half", "mixed")),
    ("qwen3", "mixed"),
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_nothing_but_lengths_is_lost(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, name: str
) -> None:
    base = base_at(tiny_checkpoint(family))
    asked = asked_of(base, name)
    # What is asked for has no exact fold.
    assert plan_of(base, asked).exactness is Exactness.IMPOSSIBLE
    plan = plan_of(base, asked, allow=ALLOW)
    assert plan.exactness is Exactness.RELOCATED, plan.findings
    # An offset that a bias takes is as good as ever.
    assert {finding.exactness for finding in plan.findings} <= {
        Exactness.RELOCATED,
        Exactness.EXACT,
    }
    own, double = losses(base, asked, plan, tmp_path / "out")
    assert double <= RELATIVE
    if family in COMPUTED:
        assert own <= RELATIVE
    else:
        assert own > 1e3 * RELATIVE  # lengths are


@pytest.mark.parametrize("site", ["mlp_out.0", "attn_out.0", "q.1"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "qwen3"])
def test_a_ready_update_beside_it_stays_what_it_is(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, site: str
) -> None:
    """What it writes has a mean, and its weight gets wider, centred or another row besides."""
    base, place = base_at(tiny_checkpoint(family)), parse_site(site)
    width = base.layout.width(place)
    writes = [b.writes[0] for b in base.layout.branches if b.output_site == place]
    inner = writes[0].shape[1 - writes[0].output_axis] if writes else base.layout.hidden
    left, right = torch.outer(vector(width), vector(2)), torch.outer(vector(2, 1), vector(inner))
    update = Edit(EditKind.UPDATE, "u", (place,), WeightUpdate(0.3 * left, right))
    asked = [update, *asked_of(base, "set")]
    plan = plan_of(base, asked, allow=ALLOW)
    assert plan.exactness is Exactness.RELOCATED and plan.widened
    assert losses(base, asked, plan, tmp_path / "out")[1] <= RELATIVE
    forgotten = plan_of(base, asked[1:], allow=ALLOW)
    assert losses(base, asked, forgotten, tmp_path / "forgotten")[1] > 1e-3


def without(plan: Plan, name: str, **changes: object) -> Plan:
    """Return a plan in which one tensor is made otherwise."""
    tensors = tuple(
        replace(update, **changes) if update.name == name else update  # type: ignore[arg-type]
        for update in plan.tensors
    )
    assert any(update.name == name for update in tensors)
    return replace(plan, tensors=tensors)


def plain_norm(base: Base, plan: Plan, name: str) -> Plan:
    """Return a plan in which a norm is only widened."""
    (gain,) = [u.replacement for u in only_widened(base).tensors if u.name == name]
    wide = plan.layout.shapes[name]
    assert gain is not None and gain.shape == wide
    return without(plan, name, replacement=gain)


def test_every_part_of_an_edit_behind_norms_is_needed(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("gemma2"))
    asked = asked_of(base, "affine")
    plan = plan_of(base, asked, allow=ALLOW)
    block, tensors = "model.layers.2", {update.name: update for update in plan.tensors}
    assert losses(base, asked, plan, tmp_path / "sound")[1] <= RELATIVE

    def table(update: TensorUpdate) -> Plan:
        (part,) = [part for part in update.outputs if not part.map.is_linear()]
        bare = replace(part, map=part.map.without_bias())
        kept = tuple(bare if one is part else one for one in update.outputs)
        return without(plan, update.name, outputs=kept)

    broken = {
        "reader": without(plan, f"{block}.self_attn.q_proj.weight", input=None),
        "head": without(plan, "lm_head.weight", input=None),
        "row": without(plan, f"{block}.mlp.down_proj.weight", outputs=()),
        "gain": plain_norm(base, plan, f"{block}.post_attention_layernorm.weight"),
        "constant": table(tensors["model.embed_tokens.weight"]),
        "bias": replace(
            plan,
            biases=tuple(
                replace(b, outputs=()) if b.name == f"{block}.self_attn.o_proj.bias" else b
                for b in plan.biases
            ),
        ),
    }
    for name, one in broken.items():
        assert losses(base, asked, one, tmp_path / name)[1] > 1e3 * RELATIVE, name


def test_every_part_of_an_edit_behind_layer_norms_is_needed(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("gpt2"))
    asked = asked_of(base, "affine")
    plan = plan_of(base, asked, allow=ALLOW)
    assert losses(base, asked, plan, tmp_path / "sound")[1] <= RELATIVE
    block = "transformer.h.0"
    broken = {
        "reader": without(plan, f"{block}.mlp.c_fc.weight", input=None),
        "writer": without(plan, f"{block}.mlp.c_proj.weight", outputs=()),
        "uncentred": without(plan, "transformer.h.2.mlp.c_proj.weight", outputs=()),
        "placed": without(plan, f"{block}.attn.c_attn.weight", placed=None),
        "positions": without(plan, "transformer.wpe.weight", outputs=()),
    }
    gone = f"{block}.ln_2.bias"
    broken["norm"] = plain_norm(base, plan, gone)
    for name, one in broken.items():
        assert losses(base, asked, one, tmp_path / name)[1] > 1e3 * RELATIVE, name


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_an_edit_at_every_later_site_needs_no_dimension_of_its_own(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    base = base_at(tiny_checkpoint(family))
    sites = ("resid_post.1", "resid_mid.2", "resid_post.2")
    asked = [edit(base, "ablate", edits.ablate(vector(base.layout.hidden)), sites)]
    plan = plan_of(base, asked, allow=ALLOW)
    assert plan.exactness is Exactness.RELOCATED
    assert losses(base, asked, plan, tmp_path / "out")[1] <= RELATIVE
    # One dimension keeps what writers leave out; a single site has one for what they write.
    gains = [
        u.replacement
        for u in plan.tensors
        if u.name.endswith("2.post_feedforward_layernorm.weight")
    ]
    (gain,) = gains
    offset = base.layout.family.norm.gain_offset
    assert gain is not None and int((gain + offset == 0).sum()) == 1
    assert not bool((gain + offset > 1e3).any())


def test_a_bias_slot_is_nearer_than_a_dimension(tiny_checkpoint: Callable[..., Path]) -> None:
    """An offset is exact where a bias takes it or a recast gives one, and never widens then."""
    for family, allow, exactness in (
        ("llama", ALLOW, Exactness.EXACT),
        ("gpt2", ALLOW, Exactness.EXACT),
        ("qwen2", ALLOW | {"recast"}, Exactness.EXACT),
        ("qwen2", ALLOW, Exactness.RELOCATED),
        ("qwen3", ALLOW | {"recast"}, Exactness.RELOCATED),
    ):
        base = base_at(tiny_checkpoint(family))
        plan = plan_of(base, asked_of(base, "offset"), allow=allow)
        assert plan.exactness is exactness, family
        assert plan.widened == (exactness is Exactness.RELOCATED)


def test_the_finding_says_what_a_constant_costs(tiny_checkpoint: Callable[..., Path]) -> None:
    base = base_at(tiny_checkpoint("gemma2"))
    asked = asked_of(base, "offset")
    (finding,) = plan_of(base, asked).findings
    assert finding.remedy is not None and 'allow = ["widen"]' in finding.remedy
    (finding,) = plan_of(base, asked, allow=ALLOW).findings
    size = float((3 * vector(base.layout.hidden, 5)).norm())
    assert f"{size:.3g} long" in finding.reason and "resid_post.1" in finding.reason


def test_in_place_a_layer_norm_wants_an_edit_that_does_not_see_the_mean(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base, allow = base_at(tiny_checkpoint("gpt_neox")), frozenset({"relocate"})
    direction = vector(base.layout.hidden)
    asked = [edit(base, "ablate", edits.ablate(direction), "resid_post.1")]
    (finding,) = plan_of(base, asked, allow=allow).findings
    assert finding.exactness is Exactness.IMPOSSIBLE
    assert finding.remedy is not None and "widen" in finding.remedy
    blind = [edit(base, "ablate", edits.ablate(direction - direction.mean()), "resid_post.1")]
    plan = plan_of(base, blind, allow=allow)
    assert plan.exactness is Exactness.RELOCATED and not plan.widened
    baked = logits(tiny.load(bake(base, plan, tmp_path / "out", allow=allow)), base)
    hooked = logits(base.model, base, blind)
    # The share of the norms in a random model, and what is left of the edit: 2⁻⁶.
    assert distance(baked, hooked) < 0.3 * distance(hooked, plain_logits(base))


def test_the_page_has_the_table_of_the_tables() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_relocation_table.py"))
    page = (ROOT / "docs" / "relocation.md").read_text(encoding="utf-8")
    assert made["page"](page) == page, "run python docs/make_relocation_table.py"


def test_the_page_and_its_picture_show_what_was_measured() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_relocation_figures.py"))
    page = (ROOT / "docs" / "relocation.md").read_text(encoding="utf-8")
    assert made["page"](page) == page, "run python docs/make_relocation_figures.py"
    rows = made["rows"]()
    drawn = made["PICTURE"].read_text(encoding="utf-8")
    assert drawn == made["picture"](rows), "run python docs/make_relocation_figures.py"
    # Another figure would be seen in both.
    block, kind, dtype = next(iter(rows))
    other = rows | {(block, kind, dtype): {**rows[block, kind, dtype], "lost": [1.0, 1.0]}}
    assert made["picture"](other) != drawn and made["table"](other) not in page


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_the_table_says_is_what_the_plan_does(
    tiny_checkpoint: Callable[..., Path], family: str
) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_relocation_table.py"))
    base, table = base_at(tiny_checkpoint(family)), tiny.TABLES[family]
    direction = vector(base.layout.hidden)

    def says(verb: str, map_: AffineMap, allow: set[str]) -> Exactness:
        return plan_of(base, [edit(base, verb, map_, "resid_post.1")], allow=allow).exactness

    blind = says("ablate", edits.ablate(direction - direction.mean()), {"relocate"})
    found = says("ablate", edits.ablate(direction), {"relocate"})
    word = made["in_place"](table)
    assert (blind is Exactness.RELOCATED) == (not word.startswith("no"))
    assert (found is Exactness.RELOCATED) == (word == "yes")
    found = says("ablate", edits.ablate(direction), {"widen"})
    assert (found is Exactness.RELOCATED) == made["wider"](table).startswith("yes")
    word, offset = made["constant"](table), edits.offset(direction)
    for needs, expected in (
        (set(), word == "a bias, exactly"),
        ({"recast"}, word.startswith("a bias, exactly")),
        ({"widen", "recast"}, word != "no"),
    ):
        assert (says("offset", offset, needs) is not Exactness.IMPOSSIBLE) == expected, needs


def test_an_artifact_whose_edit_is_computed_is_verified(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("mistral", dtype=torch.float32))
    plan = plan_of(base, asked_of(base, "set"), allow=ALLOW)
    out = bake(base, plan, tmp_path / "out", allow=ALLOW)
    report = judged(Verification(out, base=str(base.path), generate=0, most_kl=1e-6))
    assert report.exactness == "relocated" and report.passed, report.rows


@pytest.mark.parametrize(("family", "name"), [("gemma2", "offset"), ("gpt_neox", "set")])
def test_a_widened_artifact_is_verified(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, name: str
) -> None:
    base = base_at(tiny_checkpoint(family, dtype=torch.float32))
    plan = plan_of(base, asked_of(base, name), allow=ALLOW)
    out = bake(base, plan, tmp_path / "out", allow=ALLOW)
    # Random models have a large share of the stream along any direction.
    report = judged(Verification(out, base=str(base.path), generate=0, most_kl=0.3))
    assert report.exactness == "relocated" and report.passed, report.rows
    strict = Verification(out, base=str(base.path), generate=0, most_kl=1e-6)
    assert judged(strict).verdict == "failed"
