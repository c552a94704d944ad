"""Edits that a gated layer computes from what a norm has divided: the hook itself, in float64."""

from collections.abc import Callable
from dataclasses import replace
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
    orthogonal,
    plain_logits,
    plan_of,
    vector,
)
from test_relocation import distance, edit_of, without_lengths

from bake import edits
from bake.checkpoints.gguf.codec import decode, encode
from bake.checkpoints.gguf.types import type_named
from bake.edits import Edit
from bake.plan import Exactness, Plan
from bake.plan.quotient import ERROR, GATES, MEANT, MOST, Computed, Gate
from bake.sites import SiteKind
from bake.verify.precision import double_precision

ALLOW = frozenset({"widen"})
FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "smollm3", "phi3", "gemma", "qwen3")


def off(base: Base, asked: list[Edit], plan: Plan, out: Path) -> float:
    """Return how far a baked model is from the hooks, of their effect."""
    hooked = logits(base.model, base, asked)
    with torch.no_grad(), double_precision():
        baked = tiny.load(bake(base, plan, out, allow=ALLOW))(tiny.tokens(), use_cache=False).logits
    return distance(baked, hooked) / distance(hooked, plain_logits(base))


@pytest.mark.parametrize("name", GATES)
def test_neurons_give_back_what_a_norm_divided_by(name: str) -> None:
    gate = GATES[name]

    def error(gate: Gate, root: torch.Tensor, shares: torch.Tensor) -> float:
        seen = (shares * -gate.act(-gate.scales / root.unsqueeze(1))).sum(1)
        return float((seen / root - 1).abs().max())

    root = torch.logspace(-10, 10, 2000, 2.0, dtype=torch.float64)
    assert (float(root[0]), float(root[-1])) == MEANT
    shares = gate.shares
    assert error(gate, root, shares) <= ERROR
    inside = root[(root > 2.0**-7) & (root < 2.0**9)]
    assert error(gate, inside, shares) <= RELATIVE
    # Fewer neurons an octave ripple; the last one stands for all below it; all of them end.
    sparse = replace(gate, density=gate.density // 2)
    assert error(sparse, inside, sparse.shares) > 1e3 * RELATIVE
    assert error(gate, root, gate.scales * float(shares[0] / gate.scales[0])) > 10 * ERROR
    assert error(gate, 2.0**4 * root, shares) > 0.1


@pytest.mark.parametrize(("stored", "most"), [("F16", 2.0**-11), ("Q8_0", 2.0**-7)])
def test_neurons_of_small_streams_outlive_the_types_of_gguf(stored: str, most: float) -> None:
    """Types whose scales are float16 keep the edit of all its size, for a small stream as well."""
    width, gate, kind = 256, GATES["silu"], type_named(stored)
    rows, nothing = vector(width).unsqueeze(0), torch.zeros(width, dtype=torch.float64)
    rows = rows / rows.norm()
    made = Computed(-rows.T, rows, nothing, gate, frozenset({0}))
    up = made.read(SiteKind.MLP_UP, gate.count, nothing + 1, gate.count)
    down = made.write(1.0, gate.count)
    stream = vector(width, 1) + 2 * rows[0]
    stream = stream / stream.pow(2).mean().sqrt()

    def error(scale: float) -> float:
        first, last = (
            decode(encode(factor * w.left @ w.right, kind, "w"), kind, "w").to(torch.float64)
            for factor, w in ((scale, up), (1 / scale, down))
        )
        root = torch.logspace(-6, 8, 8, 2.0, dtype=torch.float64).unsqueeze(1)
        added = ((first @ stream) * gate.act(-gate.scales / root)) @ last.T
        wanted = root * (rows @ stream) * -rows
        return float(((added - wanted).norm(dim=1) / wanted.norm(dim=1)).max())

    assert error(1.0) <= most
    # Sixteen times smaller, what the last ones read is rounded away.
    assert stored == "F16" or error(2.0**-4) > 0.1


CASES = [
    *((family, "affine", "resid_post.1") for family in FAMILIES),
    *(("llama", name, "resid_post.1") for name in ("subspace", "eraser", "half")),
    ("mistral", "affine", "resid_pre.1"),
    ("qwen2", "affine", "resid_post.2"),
]


@pytest.mark.parametrize(("family", "name", "site"), CASES)
def test_a_computed_edit_is_the_hook(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, name: str, site: str
) -> None:
    base = base_at(tiny_checkpoint(family))
    asked = [edit(base, "linear", edit_of(name, base.layout.hidden), site)]
    plan = plan_of(base, asked, allow=ALLOW)
    assert plan.exactness is Exactness.RELOCATED and plan.widened
    assert "neurons" in plan.findings[0].reason
    assert off(base, asked, plan, tmp_path / "out") <= RELATIVE
    # No bias slot is opened for a constant.
    assert not plan.biases or base.layout.flags.get("mlp_bias", True)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_every_part_of_a_computed_edit_is_needed(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    base = base_at(tiny_checkpoint(family))
    asked = [edit(base, "linear", edit_of("affine", base.layout.hidden), "resid_post.1")]
    plan = plan_of(base, asked, allow=ALLOW)
    assert base.layout.family.widen is not None
    eps = base.layout.family.widen.eps
    old = base.checkpoint.config[eps]
    assert isinstance(old, float)
    plainly = old * base.layout.hidden / plan.layout.hidden
    broken = {
        "eps": replace(
            plan,
            config=tuple(replace(c, new=plainly) if c.key == eps else c for c in plan.config),
        )
    }
    for update in plan.tensors:
        own = update.name == base.layout.embed or "layers.1.mlp" in update.name
        if update.outputs and own:
            broken[f"maps of {update.name}"] = _with(plan, update.name, outputs=())
        if update.added is not None:
            broken[f"neurons of {update.name}"] = _with(plan, update.name, added=None)
    assert len(broken) == (6 if family == "llama" else 5), list(broken)
    for index, (name, one) in enumerate(broken.items()):
        found = off(base, asked, one, tmp_path / str(index))
        assert found > 10 * RELATIVE, (name, found)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_every_expert_computes_an_edit_and_their_weights_sum_to_one(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    base = base_at(tiny_checkpoint(family))
    asked = [edit(base, "linear", edit_of("affine", base.layout.hidden), "resid_post.1")]
    plan = plan_of(base, asked, allow=ALLOW)
    written = [u for u in plan.tensors if u.added is not None]
    assert len(written) == 3 * base.layout.dims["experts"]  # of every expert, and of no router
    assert off(base, asked, plan, tmp_path / "out") <= RELATIVE
    last = _with(plan, written[-1].name, added=None)
    assert off(base, asked, last, tmp_path / "last") > 1e-3


def test_experts_whose_weights_need_not_sum_to_one_compute_nothing(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    base = base_at(tiny_checkpoint("qwen3_moe", norm_topk_prob=False))
    asked = [edit(base, "linear", edit_of("affine", base.layout.hidden), "resid_post.1")]
    plan = plan_of(base, asked, allow=ALLOW)
    assert plan.exactness is Exactness.RELOCATED and not plan.computes


def _with(plan: Plan, name: str, **changes: object) -> Plan:
    tensors = [replace(u, **changes) if u.name == name else u for u in plan.tensors]  # type: ignore[arg-type]
    return replace(plan, tensors=tuple(tensors))


def test_edits_at_many_sites_share_neurons_and_the_dimension(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Another affine edit behind every block, two of them behind one, and one at a resid_mid."""
    base = base_at(tiny_checkpoint("mistral"))
    width = base.layout.hidden
    asked = [
        edit(base, "affine", edits.affine(vector(width, i), alpha=0.5), f"resid_post.{i % 3}")
        for i in range(4)
    ]
    plan = plan_of(base, asked, allow=ALLOW)
    assert plan.layout.dims["inner"] == base.layout.dims["inner"] // 64 * 64 + 128 + 64
    assert off(base, asked, plan, tmp_path / "out") <= RELATIVE
    assert off(base, asked, plan_of(base, asked[:3], allow=ALLOW), tmp_path / "fewer") > 1e-3
    # Beside an edit that lives in another frame, which lengths see and this one does not.
    asked = [edit(base, "ablate", edits.ablate(vector(width, 7)), "resid_mid.1"), asked[2]]
    plan = plan_of(base, asked, allow=ALLOW)
    wide = tiny.load(bake(base, plan, tmp_path / "both", allow=ALLOW))
    with torch.no_grad(), double_precision(), without_lengths(wide, width):
        baked = wide(tiny.tokens(), use_cache=False).logits
    with without_lengths(base.model, width):
        hooked, plain = logits(base.model, base, asked), logits(base.model, base)
        one = logits(base.model, base, asked[:1])
    assert distance(baked, hooked) <= RELATIVE * distance(hooked, plain)
    assert distance(one, hooked) > 1e-3 * distance(hooked, plain)


def rotation(base: Base, seed: int, *, whole: bool = False, at: str = "resid_post.1") -> Edit:
    """Return a rotation in a plane, or of the whole stream."""
    width = base.layout.hidden
    plane = torch.stack([vector(width, seed), vector(width, seed + 1)])
    map_ = edits.rotate_plane(plane, degrees=40)
    return edit(base, "rotate", edits.rotate(orthogonal(width, seed)) if whole else map_, at)


def test_hooks_at_one_site_are_carried_and_computed_side_by_side(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Rotations turn the frame, before and behind what neurons compute, and stay exact."""
    base = base_at(tiny_checkpoint("mistral"))
    one, other = (
        edit(base, "affine", edits.affine(vector(base.layout.hidden, i), alpha=0.5), "resid_post.1")
        for i in range(2)
    )
    asked = [rotation(base, 3, whole=True), one, rotation(base, 5), other, rotation(base, 7)]
    plan = plan_of(base, asked, allow=ALLOW)
    exact, made = Exactness.EXACT, Exactness.RELOCATED
    assert [found.exactness for found in plan.findings] == [exact, made, exact, made, exact]
    assert off(base, asked, plan, tmp_path / "out") <= RELATIVE
    for index in range(len(asked)):
        assert loss(base, asked, asked[:index] + asked[index + 1 :]) > 1e-3, index


def loss(base: Base, asked: list[Edit], others: list[Edit]) -> float:
    """Return how far some hooks are from others, of their effect."""
    hooked = logits(base.model, base, asked)
    return distance(logits(base.model, base, others), hooked) / distance(hooked, plain_logits(base))


@pytest.mark.parametrize("first", ["one by one", "at once", "behind"])
def test_what_is_more_than_neurons_are_added_for_is_relocated_besides(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, first: str
) -> None:
    base = base_at(tiny_checkpoint("mistral"))
    width = base.layout.hidden
    single = [
        edit(base, "affine", edits.affine(vector(width, i), alpha=0.5), "resid_post.1")
        for i in range(MOST + 1)
    ]
    many = torch.stack([vector(width, 20 + seed) for seed in range(MOST + 1)])
    whole = edit(base, "ablate", edits.ablate(many), "resid_post.1")
    asked = {
        "one by one": single,
        "at once": [whole, single[0]],
        "behind": [single[0], rotation(base, 5), whole],
    }[first]
    plan = plan_of(base, asked, allow=ALLOW)
    assert plan.exactness is Exactness.RELOCATED and plan.widened
    reasons = [found.reason for found in plan.findings]
    assert any("neurons" in reason for reason in reasons)
    assert any("the norms see" in reason for reason in reasons)
    wide = tiny.load(bake(base, plan, tmp_path / "out", allow=ALLOW))
    with torch.no_grad(), double_precision(), without_lengths(wide, width):
        baked = wide(tiny.tokens(), use_cache=False).logits
    with without_lengths(base.model, width):
        hooked, plain = logits(base.model, base, asked), logits(base.model, base)
        fewer = logits(base.model, base, asked[1:]), logits(base.model, base, asked[:-1])
    assert distance(baked, hooked) <= RELATIVE * distance(hooked, plain)
    assert min(distance(one, hooked) for one in fewer) > 1e-3 * distance(hooked, plain)


@pytest.mark.parametrize(("power", "good"), [(-7, True), (7, True), (13, False)])
def test_the_size_of_the_stream_does_not_matter_within_what_is_meant(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, power: int, good: bool
) -> None:
    model = tiny.make_model("llama", seed=3)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 2.0**power / model.model.embed_tokens.weight.std()
        for block in model.model.layers:
            block.self_attn.o_proj.weight *= 2.0**power
            block.mlp.down_proj.weight *= 2.0**power
    tiny.write_checkpoint(model, tmp_path / "base")
    base = base_at(tmp_path / "base")
    map_ = edits.affine(vector(base.layout.hidden), alpha=2.0**power)
    asked = [edit(base, "affine", map_, "resid_post.1")]
    found = off(base, asked, plan_of(base, asked, allow=ALLOW), tmp_path / "out")
    assert (found <= 10 * ERROR) == good, found


def test_what_no_gated_layer_computes_is_relocated_otherwise(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    width, direction = base.layout.hidden, vector(base.layout.hidden)
    many = torch.stack([vector(width, seed) for seed in range(MOST + 1)])
    scaled = edit(base, "scale", edits.scale(1 + 0.1 * direction.abs()), "ln2_out.1")
    whole = edit(base, "ablate", edits.ablate(direction), "resid_post.1")
    cases = {
        "rank": [edit(base, "ablate", edits.ablate(many), "resid_post.1")],
        "site": [edit(base, "ablate", edits.ablate(direction), "resid_mid.1")],
        "norm": [scaled, whole],
    }
    for name, asked in cases.items():
        plan = plan_of(base, asked, allow=ALLOW)
        assert plan.exactness is Exactness.RELOCATED and plan.widened, name
        assert not any(update.added is not None for update in plan.tensors), name
        assert "the norms see" in plan.findings[-1].reason, name
    for options in ({"dtype": torch.float16}, {"rms_norm_eps": 0.0}):
        other = base_at(tiny_checkpoint("llama", **options))
        asked = [edit(other, "ablate", edits.ablate(direction), "resid_post.1")]
        plan = plan_of(other, asked, allow=ALLOW)
        assert plan.exactness is Exactness.RELOCATED and plan.widened
        assert not any(update.added is not None for update in plan.tensors)


def test_where_a_runtime_computes_in_float16_is_said_of_neurons_alone(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    def said(**options: object) -> dict[str, bool]:
        base = base_at(tiny_checkpoint("llama", **options))
        asked = [edit(base, "linear", edit_of("affine", base.layout.hidden), "resid_post.1")]
        plan = plan_of(base, asked, allow=ALLOW)
        return {v.runtime: "not in float16" in v.reason for v in plan.runtimes}

    found = said(dtype=torch.float32)
    assert all(found[name] for name in ("transformers", "vllm", "llama.cpp"))
    # Relocated where weights are stored so, it is served in float16 as well.
    assert not any(said(dtype=torch.float16).values())


def test_what_neurons_compute_is_no_number_in_float16(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The verdicts are true: gates overflow, where those of the relocated edit do not."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        base = base_at(tiny_checkpoint("llama", dtype=dtype))
        asked = [edit(base, "linear", edit_of("affine", base.layout.hidden), "resid_post.1")]
        out = bake(base, plan_of(base, asked, allow=ALLOW), tmp_path / str(dtype), allow=ALLOW)
        with torch.no_grad():
            found[dtype] = tiny.load(out).to(torch.float16)(tiny.tokens(), use_cache=False).logits
    assert not bool(found[torch.float32].isfinite().all())
    assert bool(found[torch.float16].isfinite().all())
