"""The plan as a value: pure, deterministic, and outspoken about what it does and refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from harness import Base, bake, base_at, edit, matrix, orthogonal, plan_of, vector
from msgspec import structs
from torch import Tensor

from bake import edits as make
from bake.edits import Edit, EditKind
from bake.errors import DirectionError, InexactPlan, UsageError
from bake.families import parse_family, resolve
from bake.plan import Exactness, Plan, compile_plan
from bake.plan.record import plan_record
from bake.sites import parse_site

ROOT = Path(__file__).parents[1]


def finding(plan: Plan) -> str:
    (found,) = plan.findings
    return f"{found.exactness}: {found.reason} | {found.remedy}"


def verdict(plan: Plan, runtime: str) -> tuple[str, str]:
    return next((v.status, v.reason) for v in plan.runtimes if v.runtime == runtime)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_plan_reads_no_weight(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """Shapes are enough, but for norms, and those only where an edit meets them."""
    base = base_at(tiny_checkpoint(family))
    read: list[str] = []

    def gain(name: str) -> Tensor:
        read.append(name)
        return base.checkpoint.read(name).to(torch.float64)

    hidden = base.layout.hidden
    edits = [
        edit(base, "offset", make.offset(vector(hidden)), "resid_pre.0"),
        edit(base, "ablate", make.ablate(vector(hidden)), ["attn_out.*", "mlp_out.*"]),
        edit(base, "ablate", make.ablate(vector(base.layout.dims["head_dim"])), "z.1.h0"),
    ]
    compile_plan(edits, base.layout, gain=gain, config=base.checkpoint.config)
    assert read == []
    edits.append(edit(base, "scale", make.scale(vector(hidden)), "ln_final_out"))
    compile_plan(edits, base.layout, gain=gain, config=base.checkpoint.config)
    norm = base.layout.final_norm
    assert set(read) <= {norm.weight, norm.bias}
    assert read


def test_the_digest_stands_for_the_content(tiny_checkpoint: Callable[..., Path]) -> None:
    base = base_at(tiny_checkpoint("llama"))
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), "resid")]
    other = [edit(base, "ablate", make.ablate(vector(base.layout.hidden, 1)), "resid")]
    first, again = plan_of(base, edits), plan_of(base, edits)
    assert first.digest == again.digest
    assert first.digest.startswith("sha256:")
    assert plan_of(base, other).digest != first.digest
    assert plan_record(first) == plan_record(again)


def test_an_identity_changes_nothing(tiny_checkpoint: Callable[..., Path]) -> None:
    base = base_at(tiny_checkpoint("llama"))
    edits = [edit(base, "scale", make.scale(torch.ones(base.layout.hidden)), "attn_out.*")]
    plan = plan_of(base, edits)
    assert (plan.tensors, plan.biases, plan.config, plan.created_bytes) == ((), (), (), 0)
    assert finding(plan) == "exact: the map is the identity: nothing changes | None"


@pytest.mark.parametrize(
    ("family", "form", "at", "said"),
    [
        ("llama", "ablate", "resid_post.1", "carries the edited component from resid_mid.1"),
        ("llama", "half", "resid", "not idempotent (A² − A = 2.5e-01)"),
        ("llama", "linear", "resid_post.1", "not idempotent"),
        ("gpt2", "rotate", "resid_post.1", "transformer.h.0.ln_1 is a LayerNorm"),
        ("gemma2", "rotate", "resid_post.1", "which does not turn"),
        ("gemma2", "ablate", "resid", 'or allow = ["nulling"]'),
        ("qwen2", "offset", "resid_post.1", "model.layers.1.mlp.down_proj is built without bias"),
        ("qwen2", "offset", "resid_post.1", 'allow = ["recast"]'),
        ("qwen3", "offset", "resid_post.1", "as a llama.cpp control vector"),
        ("qwen3", "offset", "mlp_up.1", "use an edit without a constant"),
        ("mixtral", "offset", "resid_post.1", "3 experts write together"),
        ("olmo2", "offset", "resid_post.1", "a norm follows it"),
        ("gemma2", "offset", "ln1_post_out.1", "the map adds a constant"),
        ("gemma2", "ablate", "ln1_post_out.1", "the map is not diagonal"),
        ("llama", "offset", "ln_final_out", "builds lm_head without a bias"),
    ],
)
def test_a_refusal_says_why_and_what_to_do(
    family: str, form: str, at: str, said: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    base = base_at(tiny_checkpoint(family))
    width = base.layout.width(parse_site("resid_pre.0" if at == "resid" else at))
    maps = {
        "ablate": make.ablate(vector(width)),
        "half": make.ablate(vector(width), strength=0.5),
        "linear": make.linear(matrix(width)),
        "rotate": make.rotate(orthogonal(width)),
        "offset": make.offset(vector(width)),
    }
    kind = "ablate" if form == "half" else form
    plan = plan_of(base, [edit(base, kind, maps[form], at)])
    assert plan.exactness is Exactness.IMPOSSIBLE
    assert any(said in f"{f.reason} | {f.remedy}" for f in plan.findings), plan.findings


def test_a_non_idempotent_eraser_is_refused_on_the_stream(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """LEACE with a constrained trace returns one: exact at modules, impossible on the stream."""
    base = base_at(tiny_checkpoint("llama"))
    width = base.layout.hidden
    left, right = vector(width, 1), vector(width, 2)
    eraser = make.erase((left / (left @ right) * 0.97).unsqueeze(1), right.unsqueeze(0))
    stream = plan_of(base, [edit(base, "erase", eraser, "resid")])
    assert "not idempotent" in finding(stream)
    modules = plan_of(base, [edit(base, "erase", eraser, ["attn_out.*", "mlp_out.*"])])
    assert modules.exactness is Exactness.EXACT


def shifted(base: Base, at: str) -> Plan:
    return plan_of(base, [edit(base, "offset", make.offset(vector(base.layout.hidden)), at)])


@pytest.mark.parametrize(
    ("family", "options", "at", "vllm", "llama_cpp"),
    [
        ("llama", {}, "resid_post.1", "exact", "exact"),
        # vLLM builds Qwen3's o_proj without bias and drops the tensor in silence.
        ("qwen3", {}, "attn_out.1", "refused", "refused"),
        # q, k, v alone are fine in vLLM: the companion zero of o_proj may be dropped.
        ("qwen3", {"attention_bias": False}, "ln1_out.1", "exact", "refused"),
        ("gemma", {"attention_bias": False}, "attn_out.1", "refused", "refused"),
        # llama.cpp loads no head of its own for either Gemma, vLLM one for the first.
        ("gemma", {"attention_bias": False}, "embed", "exact", "refused"),
        ("gemma2", {"attention_bias": False}, "embed", "refused", "refused"),
        ("gemma2", {"attention_bias": False}, "attn_out.1", "exact", "refused"),
        # Its sources take it, and no test has served a Pythia in either.
        ("gpt_neox", {}, "resid_post.1", "exact", "exact"),
        ("mixtral", {}, "embed", "exact", "exact"),
        # The base's own bias is dropped or refused, whatever the edit.
        ("qwen3", {}, "embed", "refused", "refused"),
    ],
)
def test_runtimes_are_judged(
    family: str,
    options: dict[str, bool],
    at: str,
    vllm: str,
    llama_cpp: str,
    tiny_checkpoint: Callable[..., Path],
) -> None:
    plan = shifted(base_at(tiny_checkpoint(family, **options)), at)
    assert plan.exactness is Exactness.EXACT
    assert verdict(plan, "transformers")[0] == "exact"
    assert (verdict(plan, "vllm")[0], verdict(plan, "llama.cpp")[0]) == (vllm, llama_cpp)


def test_a_target_that_would_drop_the_edit_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("qwen3"))
    edits = [edit(base, "offset", make.offset(vector(base.layout.hidden)), "attn_out.1")]
    wanted = plan_of(base, edits, targets=["transformers", "vllm"])
    with pytest.raises(InexactPlan, match=r"(?s)vllm would not serve.*drops .*o_proj\.bias"):
        bake(base, wanted, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert bake(base, plan_of(base, edits), tmp_path / "out").exists()


def test_a_target_that_nobody_has_run_is_served_all_the_same(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Read and not run is no refusal; a table that says nothing is one."""
    base = base_at(tiny_checkpoint("llama"))
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), "resid")]
    plan = plan_of(base, edits, targets=["mlx-lm"])
    status, reason = verdict(plan, "mlx-lm")
    assert status == "not tested"
    assert reason.startswith("read, not run (MLX-LM models/llama.py")
    assert bake(base, plan, tmp_path / "out").exists()
    others = {n: r for n, r in base.layout.family.runtimes.items() if n != "mlx-lm"}
    family = structs.replace(base.layout.family, runtimes=others)
    silent = replace(base, layout=replace(base.layout, family=family))
    plan = plan_of(silent, edits, targets=["mlx-lm"])
    assert verdict(plan, "mlx-lm") == ("not tested", "the table 'llama' says nothing of it")
    with pytest.raises(InexactPlan, match=r"(?s)mlx-lm would not serve.*says nothing of it"):
        bake(silent, plan, tmp_path / "other")
    assert bake(silent, plan_of(silent, edits), tmp_path / "other").exists()


def test_a_wrong_width_is_named(tiny_checkpoint: Callable[..., Path]) -> None:
    base = base_at(tiny_checkpoint("llama"))
    edits = [edit(base, "ablate", make.ablate(vector(16)), "resid", name="mood")]
    with pytest.raises(DirectionError, match=r"'mood' has width 16, but resid_pre\.0 has 24"):
        plan_of(base, edits)


@pytest.mark.parametrize(
    ("family", "at", "said"),
    [
        ("mixtral", "mlp_act.0", "mixtral has no site mlp_act.0"),
        ("gpt_neox", "resid_mid.0", "gpt_neox has no site resid_mid.0"),
        ("llama", "ln1_post_out.0", "llama has no site ln1_post_out.0"),
        ("llama", "k.0.h2", "k.0.h2 names head 2, but there are 2"),
    ],
)
def test_a_site_that_the_model_lacks_is_named(
    family: str, at: str, said: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    base = base_at(tiny_checkpoint(family))
    with pytest.raises(UsageError, match=said):
        plan_of(base, [edit(base, "ablate", make.ablate(vector(24)), at)])


@pytest.mark.parametrize(
    ("at", "left", "right", "said"),
    [
        ("resid_post.1", 24, 24, "an update cannot stand at resid_post.1"),
        ("z.1", 32, 24, "an update cannot stand at z.1"),
        ("z.1.h0", 8, 24, "an update cannot stand at z.1.h0"),
        ("q.1.h0", 32, 24, r"the update at q.1.h0 is \[32, 24\], but the weight is \[8, 24\]"),
        (
            "mlp_out.1",
            24,
            24,
            r"the update at mlp_out.1 is \[24, 24\], but the weight is \[24, 40\]",
        ),
    ],
)
def test_an_update_needs_a_weight_of_its_shape(
    at: str, left: int, right: int, said: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    update = make.update(vector(left), vector(right))
    with pytest.raises((UsageError, DirectionError), match=said):
        plan_of(base, [edit(base, "update", update, at)])


def test_an_update_of_experts_names_no_weight(tiny_checkpoint: Callable[..., Path]) -> None:
    base = base_at(tiny_checkpoint("mixtral"))
    update = make.update(vector(24), vector(40))
    with pytest.raises(UsageError, match="names no single weight: it has 3"):
        plan_of(base, [edit(base, "update", update, "mlp_out.1")])


def test_only_the_edit_with_a_constant_is_to_blame(tiny_checkpoint: Callable[..., Path]) -> None:
    base = base_at(tiny_checkpoint("mistral"))
    hidden = base.layout.hidden
    edits = [
        edit(base, "ablate", make.ablate(vector(hidden)), "attn_out.0"),
        edit(base, "offset", make.offset(vector(hidden, 1)), "resid_mid.0"),
    ]
    plan = plan_of(base, edits)
    assert [f.exactness for f in plan.findings] == [Exactness.EXACT, Exactness.IMPOSSIBLE]


def test_a_linear_edit_is_to_blame_for_the_constant_that_it_moves(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """What an offset adds, a later site takes away again, and that takes a bias as well."""
    base = base_at(tiny_checkpoint("qwen2"))
    edits = [
        edit(base, "ablate", make.ablate(vector(base.layout.hidden)), "resid"),
        edit(base, "offset", make.offset(vector(base.layout.hidden)), "resid_pre.0"),
    ]
    plan = plan_of(base, edits)
    first, second = plan.findings
    assert (first.exactness, second.exactness) == (Exactness.IMPOSSIBLE, Exactness.EXACT)
    assert first.sites == (parse_site("resid_mid.0"),)
    assert "o_proj is built without bias" in first.reason
    # The control: with nothing added there is nothing to take away.
    assert plan_of(base, edits[:1]).exactness is Exactness.EXACT
    slots = base_at(tiny_checkpoint("llama"))
    assert plan_of(slots, edits).exactness is Exactness.EXACT


def test_each_edit_is_refused_at_its_own_site(tiny_checkpoint: Callable[..., Path]) -> None:
    """Two constants meet in one layer without a bias; a linear edit beside them needs none."""
    base = base_at(tiny_checkpoint("llama"))
    own = base.layout.width(parse_site("mlp_up.1"))
    row = next(r for r in base.layout.branches[3].reads if r.module.endswith("up_proj"))
    never = replace(row, bias=replace(row.bias, state="never"))
    branches = list(base.layout.branches)
    reads = tuple(never if r is row else r for r in branches[3].reads)
    branches[3] = replace(branches[3], reads=reads)
    layout = replace(base.layout, branches=tuple(branches))
    edits = [
        edit(base, "offset", make.offset(vector(own)), "mlp_up.1", "late"),
        edit(base, "affine", make.affine(vector(24), mean=vector(24, 1)), "ln2_out.1", "early"),
        edit(base, "ablate", make.ablate(vector(own)), "mlp_up.1", "late"),
    ]
    plan = plan_of(replace(base, layout=layout), edits)
    assert [(f.edit, f.exactness) for f in plan.findings] == [
        (0, Exactness.IMPOSSIBLE),
        (1, Exactness.IMPOSSIBLE),
        (2, Exactness.EXACT),
    ]
    assert [f.sites for f in plan.findings] == [e.sites for e in edits]
    assert all("up_proj without a bias" in f.reason for f in plan.findings[:2])


def test_a_turned_norm_bias_without_a_slot_is_refused(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """A LayerNorm's bias moves into its readers under a rotation; some have no bias for it."""
    base = base_at(tiny_checkpoint("gpt_neox", attention_bias=False))
    table = base.layout.family
    text = (ROOT / "bake/families/gpt_neox.toml").read_text(encoding="utf-8")
    text = text.replace('bias = "attention_bias"', 'bias = "never"')
    must = "[must]\nattention_bias = [false]\n"
    own = parse_family(text.replace("[flags]\nattention_bias = true\n", must), "own.toml")
    assert own.architectures == table.architectures
    shapes, dtypes = tiny.header_of(base.path)
    layout = resolve(own, base.checkpoint.config, shapes, dtypes)
    width = layout.hidden
    direction = vector(width)
    edits = [
        edit(base, "rotate", make.reflect(direction - direction.mean()), "resid_post.1"),
    ]
    plan = plan_of(replace(base, layout=layout), edits)
    assert plan.exactness is Exactness.IMPOSSIBLE
    assert all("query_key_value without a bias" in f.reason for f in plan.findings)


def test_an_edit_without_sites_is_no_edit(tiny_checkpoint: Callable[..., Path]) -> None:
    base = base_at(tiny_checkpoint("llama"))
    edits = [Edit(EditKind.ABLATE, "mood", (), make.ablate(vector(24)))]
    with pytest.raises(UsageError, match="'mood' names no site"):
        plan_of(base, edits)
