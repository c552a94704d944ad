"""Deliberately broken bakes: each trap that tools fall into, shown to miss the tolerance."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from harness import RELATIVE, Base, bake, base_at, edit, matrix, measure, plan_of, vector

from bake import edits as make
from bake.affine import AffineMap, LowRankMap
from bake.edits import Edit
from bake.errors import InputError
from bake.jobs.planned import judged
from bake.plan import PartMap, Plan, TensorUpdate
from bake.verify.verification import Verification

MISSES = 1e-4  # a broken bake misses by this share of the effect: five orders above the tolerance


def ablation(base: Base) -> list[Edit]:
    return [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), "resid")]


ABLATABLE = tuple(family for family in tiny.FAMILIES if family not in tiny.POST_NORM)


def assert_caught(base: Base, edits: Sequence[Edit], good: Plan, broken: Plan, out: Path) -> None:
    """The good plan passes where the broken one fails, by far."""
    sound = measure(base, edits, bake(base, good, out / "good"))
    assert sound.error <= RELATIVE * sound.effect
    wrong = measure(base, edits, bake(base, broken, out / "broken"))
    assert wrong.error > MISSES * wrong.effect


def without(plan: Plan, name: str) -> Plan:
    kept = tuple(update for update in plan.tensors if update.name != name)
    assert len(kept) == len(plan.tensors) - 1, name
    return replace(plan, tensors=kept)


@pytest.mark.parametrize("family", ABLATABLE)
def test_a_forgotten_writer_is_caught(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(family))
    edits = ablation(base)
    plan = plan_of(base, edits)
    for branch in (base.layout.branches[0], base.layout.branches[-1]):
        name = branch.writes[0].weight
        assert_caught(base, edits, plan, without(plan, name), tmp_path / name)


@pytest.mark.parametrize("family", ABLATABLE)
def test_a_flipped_sign_is_caught(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(family))
    edits = ablation(base)
    plan = plan_of(base, edits)
    first = next(update for update in plan.tensors if update.outputs)
    flipped = PartMap(None, _negated(first.outputs[0].map))
    tensors = tuple(replace(u, outputs=(flipped,)) if u is first else u for u in plan.tensors)
    assert_caught(base, edits, plan, replace(plan, tensors=tensors), tmp_path)


def _negated(map_: AffineMap) -> AffineMap:
    assert isinstance(map_, LowRankMap)
    return LowRankMap(-map_.left, map_.right, map_.bias)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2", "gpt_neox"])
def test_forgotten_writer_biases_are_caught(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(family))
    edits = ablation(base)
    plan = plan_of(base, edits)
    assert plan.biases
    assert_caught(base, edits, plan, replace(plan, biases=()), tmp_path)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "phi3", "gpt_neox", "mixtral"])
def test_a_head_that_stays_tied_is_caught(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(family, tied=True))
    edits = ablation(base)
    plan = plan_of(base, edits)
    tied = replace(
        without(plan, base.layout.unembed.weight),
        config=tuple(c for c in plan.config if c.key != "tie_word_embeddings"),
    )
    assert_caught(base, edits, plan, tied, tmp_path)


def test_forgotten_positions_are_caught(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("gpt2"))
    edits = ablation(base)
    plan = plan_of(base, edits)
    assert_caught(base, edits, plan, without(plan, "transformer.wpe.weight"), tmp_path)


def test_a_forgotten_router_is_caught(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The router reads the norm's output as the experts do."""
    base = base_at(tiny_checkpoint("mixtral"))
    edits = [edit(base, "linear", make.linear(matrix(base.layout.hidden)), "ln2_out.1")]
    plan = plan_of(base, edits)
    router = "model.layers.1.block_sparse_moe.gate.weight"
    assert_caught(base, edits, plan, without(plan, router), tmp_path)


def test_a_square_matrix_on_the_wrong_axis_is_caught(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", square=True))
    edits = ablation(base)
    plan = plan_of(base, edits)
    name = base.layout.branches[0].writes[0].weight
    tensors = tuple(replace(u, output_axis=1) if u.name == name else u for u in plan.tensors)
    assert_caught(base, edits, plan, replace(plan, tensors=tensors), tmp_path)


def test_conv1d_on_the_axis_of_a_linear_layer_is_caught(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """GPT-2's attn.c_proj is square: nothing but the result shows the wrong side."""
    base = base_at(tiny_checkpoint("gpt2"))
    edits = ablation(base)
    plan = plan_of(base, edits)
    name = base.layout.branches[0].writes[0].weight
    assert "c_proj" in name
    tensors = tuple(replace(u, output_axis=0) if u.name == name else u for u in plan.tensors)
    assert_caught(base, edits, plan, replace(plan, tensors=tensors), tmp_path)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_a_forgotten_embedding_multiplier_is_caught(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(family))
    edits = [edit(base, "offset", make.offset(vector(base.layout.hidden)), "resid_pre.0")]
    plan = plan_of(base, edits)
    unscaled = replace(base, layout=replace(base.layout, embed_multiplier=1.0))
    assert_caught(base, edits, plan, plan_of(unscaled, edits), tmp_path)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_a_gain_without_its_offset_is_caught(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Gemma's norms multiply by 1 + weight: scaling the weight alone is another map."""
    base = base_at(tiny_checkpoint(family))
    edits = [edit(base, "scale", make.scale(vector(base.layout.hidden)), "ln1_out.1")]
    plan = plan_of(base, edits)
    (update,) = plan.tensors
    weight = base.checkpoint.read(update.name)
    wrong = replace(update, replacement=vector(base.layout.hidden) * weight)
    assert_caught(base, edits, plan, replace(plan, tensors=(wrong,)), tmp_path)


def test_a_constant_in_both_writers_is_caught(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    shift = make.offset(vector(base.layout.hidden))
    edits = [edit(base, "offset", shift, "resid_post.1")]
    twice = [edit(base, "offset", shift, ["attn_out.1", "mlp_out.1"])]
    assert_caught(base, edits, plan_of(base, edits), plan_of(base, twice), tmp_path)


def test_an_offset_in_the_wrong_place_is_caught(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """At the embedding, in the attention's bias, or wrapped around to the last layer."""
    base = base_at(tiny_checkpoint("llama"))
    shift = make.offset(vector(base.layout.hidden))
    cases = {
        "resid_post.1": ["resid_pre.0", "resid_mid.1", "resid_post.0", "resid_post.2"],
        "resid_pre.0": ["resid_post.2"],  # layer −1 is the last layer of a Python list
    }
    for meant, others in cases.items():
        edits = [edit(base, "offset", shift, meant)]
        for other in others:
            wrong = plan_of(base, [edit(base, "offset", shift, other)])
            assert_caught(base, edits, plan_of(base, edits), wrong, tmp_path / f"{meant}-{other}")


def test_a_displacement_of_heads_as_output_bias_is_caught(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """An offset of z has to pass o_proj before it is a bias of o_proj."""
    base = base_at(tiny_checkpoint("llama", square=True))
    shift = make.offset(vector(base.layout.hidden))
    edits = [edit(base, "offset", shift, "z.1")]
    wrong = plan_of(base, [edit(base, "offset", shift, "attn_out.1")])
    assert_caught(base, edits, plan_of(base, edits), wrong, tmp_path)


def test_the_constant_of_an_affine_edit_at_every_write_is_caught(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    map_ = make.affine(vector(base.layout.hidden), alpha=1.0)
    edits = [edit(base, "affine", map_, "resid")]
    plan = plan_of(base, edits)
    # Naively, every writer's bias gets the constant as well.
    biases = tuple(replace(bias, addend=map_.bias) for bias in plan.biases)
    assert_caught(base, edits, plan, replace(plan, biases=biases), tmp_path)


@pytest.mark.parametrize("recast", [False, True])
def test_biases_without_their_flag_are_caught(
    recast: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers drops them with a warning and serves exactly the base model."""
    family, flags = ("qwen2", {}) if recast else ("llama", {"mlp_bias": False})
    base = base_at(tiny_checkpoint(family, **flags))
    edits = [edit(base, "offset", make.offset(vector(base.layout.hidden)), "resid_post.1")]
    plan = plan_of(base, edits, allow=["recast"])
    forgot = replace(plan, config=tuple(c for c in plan.config if c.key != "mlp_bias"))
    out = bake(base, forgot, tmp_path / "out")
    with pytest.raises(InputError, match=r"unexpected_keys.*mlp.down_proj.bias"):
        judged(Verification(out, base=str(base.path)))


def test_a_flag_without_companion_zeros_is_caught(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers fills the missing biases in with a warning; vLLM leaves them uninitialised."""
    base = base_at(tiny_checkpoint("llama", mlp_bias=False))
    edits = [edit(base, "offset", make.offset(vector(base.layout.hidden)), "resid_post.1")]
    plan = plan_of(base, edits)
    lone = replace(plan, biases=tuple(bias for bias in plan.biases if not bias.is_zero()))
    out = bake(base, lone, tmp_path / "out")
    with pytest.raises(InputError, match=r"missing_keys.*mlp.gate_proj.bias"):
        judged(Verification(out, base=str(base.path)))


def test_an_update_of_nothing_changes_nothing(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A tensor that the plan names and leaves alone keeps its bytes: a control of the controls."""
    base = base_at(tiny_checkpoint("llama"))
    plan = plan_of(base, ablation(base))
    name = base.layout.branches[0].writes[0].weight
    shape = base.layout.shapes[name]
    idle = replace(plan, tensors=(TensorUpdate(name, name, shape, 0),), biases=(), config=())
    out = bake(base, idle, tmp_path / "out")
    before, after = tiny.tensors_of(base.path), tiny.tensors_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
