"""Which carrier holds which edit, in which runtime, and what is advised instead.

The expected verdicts are written by hand, from the runtimes' sources.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import tiny
import torch
from adapters import NO_BIAS, logits_of, peft_warnings
from exporting import written
from harness import RELATIVE, Base, base_at, edit, logits, plan_of, vector
from msgspec import structs

from bake import edits as make
from bake.artifact import CARRIERS, KINDS
from bake.errors import InexactPlan, UsageError
from bake.families import DESCRIBED, RUNTIMES, load_families
from bake.families.runtime import Adaptable
from bake.plan import ConfigChange, Exactness, Plan, compile_plan
from bake.plan.carriers import carrier_findings, carrier_runtimes, refuse
from bake.verify.runtimes.registry import RUNTIMES as ASKED

TESTS = Path(__file__).parent
Checkpoints = Callable[..., Path]
EXACT, IMPOSSIBLE = Exactness.EXACT, Exactness.IMPOSSIBLE


def plan(base: Base, kind: str, at: str, **options: object) -> Plan:
    n = base.layout.hidden
    maps = {
        "ablate": make.ablate(vector(n)),
        "offset": make.offset(vector(n)),
        "scale": make.scale(vector(n)),
    }
    return plan_of(base, [edit(base, kind, maps[kind], at)], **options)  # type: ignore[arg-type]


def fits(of: Plan) -> set[str]:
    return {c for c in CARRIERS if all(f.exactness is EXACT for f in carrier_findings(of, c))}


ALL_BUT_VECTOR = {"checkpoint", "lora", "gguf-lora", "gguf"}
TABLE = [
    ("llama", NO_BIAS, "ablate", "resid", ALL_BUT_VECTOR),
    ("llama", {**NO_BIAS, "tied": True}, "ablate", "resid", ALL_BUT_VECTOR),
    ("llama", {**NO_BIAS, "tied": True}, "ablate", "attn_out.1", ALL_BUT_VECTOR),
    ("llama", {}, "ablate", "resid", {"checkpoint", "gguf"}),
    ("llama", NO_BIAS, "offset", "resid_post.1", {"checkpoint", "control-vector", "gguf"}),
    ("llama", NO_BIAS, "offset", "resid_post.0", {"checkpoint", "gguf"}),
    ("llama", NO_BIAS, "offset", "embed", ALL_BUT_VECTOR),
    ("llama", NO_BIAS, "scale", "ln1_out.1", {"checkpoint", "gguf"}),
    ("qwen2", {}, "offset", "resid_post.1", {"control-vector"}),
    ("qwen2", {}, "offset", "resid_post.0", set()),
    # llama.cpp has no slot for the bias.
    ("qwen3", {"attention_bias": False}, "offset", "attn_out.1", {"checkpoint"}),
    ("gemma2", {"attention_bias": False}, "ablate", "mlp_out.1", ALL_BUT_VECTOR),
    ("gemma2", {}, "offset", "resid_post.2", {"control-vector"}),
    ("gemma", {"attention_bias": False}, "ablate", "resid", {"checkpoint", "lora"}),
    ("gemma", {"attention_bias": False}, "ablate", "ln_final_out", {"checkpoint", "lora"}),
    ("gpt2", {}, "ablate", "ln2_out.1", ALL_BUT_VECTOR),
    ("gpt2", {}, "ablate", "resid", {"checkpoint", "gguf"}),
    ("mixtral", {}, "ablate", "resid", ALL_BUT_VECTOR),
    ("olmo2", {}, "ablate", "resid", set()),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: " ".join(map(str, row[:4])))
def test_which_carrier_holds_what(
    row: tuple[str, dict[str, object], str, str, set[str]], tiny_checkpoint: Checkpoints
) -> None:
    family, options, kind, at, expected = row
    of = plan(base_at(tiny_checkpoint(family, **options)), kind, at)
    assert fits(of) == expected
    for carrier in CARRIERS:
        for finding in carrier_findings(of, carrier):
            assert finding.reason
            assert (finding.exactness is IMPOSSIBLE) == (carrier not in expected)
            if finding.exactness is IMPOSSIBLE:
                # The remedy names the carriers that do hold the edit, and no other.
                assert finding.remedy
                named = {c for c in CARRIERS if re.search(rf"--to {c}(?![\w-])", finding.remedy)}
                assert named == expected


def test_findings_belong_to_their_edits(tiny_checkpoint: Checkpoints) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    n = base.layout.hidden
    of = plan_of(
        base,
        [
            edit(base, "ablate", make.ablate(vector(n)), ["attn_out.*"], "a"),
            edit(base, "offset", make.offset(vector(n, 1)), "resid_post.2", "b"),
            edit(base, "scale", make.scale(vector(n)), "ln1_out.1", "a"),
        ],
    )
    lora = carrier_findings(of, "lora")
    assert [(f.kind, f.concept, f.exactness) for f in lora] == [
        ("ablate", "a", EXACT),
        ("offset", "b", IMPOSSIBLE),
        ("scale", "a", IMPOSSIBLE),
    ]
    assert "down_proj.bias" in lora[1].reason and "input_layernorm" in lora[2].reason
    vector_findings = carrier_findings(of, "control-vector")
    assert [f.exactness for f in vector_findings] == [IMPOSSIBLE, EXACT, IMPOSSIBLE]


def test_several_findings_of_one_edit_stay_together(tiny_checkpoint: Checkpoints) -> None:
    """Two edits of one name, the first refused at several sites for several reasons."""
    base = base_at(tiny_checkpoint("mistral"))
    n = base.layout.hidden
    of = plan_of(
        base,
        [
            edit(base, "offset", make.offset(vector(n)), ["resid_mid.1", "resid_post.1"]),
            edit(base, "offset", make.offset(vector(n)), "resid_post.2"),
        ],
    )
    assert len(of.findings) == 3
    found = carrier_findings(of, "lora")
    assert [str(f.sites[0]) for f in found] == ["resid_mid.1", "resid_post.2"]
    assert "1 more such reason" in found[0].reason and "more" not in found[1].reason


def test_edits_that_cannot_be_told_apart(tiny_checkpoint: Checkpoints) -> None:
    """Each of them is refused; none is taken for exact because another has its finding."""
    base = base_at(tiny_checkpoint("mistral"))
    twice = [edit(base, "offset", make.offset(vector(24)), "resid_post.1")] * 2
    ways = [
        edit(base, "offset", make.offset(vector(24)), ["resid_post.1", "resid_mid.1"]),
        edit(base, "offset", make.offset(vector(24)), ["resid_mid.1", "resid_post.1"]),
    ]
    for edits in (twice, ways, ways[::-1]):
        found = carrier_findings(plan_of(base, edits), "lora")
        assert [f.exactness for f in found] == [IMPOSSIBLE, IMPOSSIBLE]


OVERLAPPING = [
    (["resid_post.0", "resid_post.1"], 0.5, "2.5e-01"),
    (["resid_post.1"], 0.2, "1.6e-01"),
]


@pytest.mark.parametrize("rows", [OVERLAPPING, OVERLAPPING[::-1]], ids=["wide first", "last"])
def test_edits_of_one_concept_at_overlapping_sites_have_their_own_findings(
    rows: list[tuple[list[str], float, str]], tiny_checkpoint: Checkpoints
) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    of = plan_of(
        base, [edit(base, "ablate", make.ablate(vector(24), strength=s), at) for at, s, _ in rows]
    )
    assert [f.edit for f in of.findings] == [0, 1]
    for carrier in CARRIERS:
        found = carrier_findings(of, carrier)
        assert [f.edit for f in found] == [0, 1]
        assert [[str(site) for site in f.sites] for f in found] == [at for at, _, _ in rows]
        if carrier != "control-vector":  # which holds no ablation, wherever it is
            assert [
                f"A² − A = {error})" in f.reason for f, (*_, error) in zip(found, rows, strict=True)
            ] == [True, True]
            assert all("more such reasons" not in f.reason for f in found)


@pytest.mark.parametrize("order", [1, -1])
def test_a_possible_and_an_impossible_edit_of_one_concept(
    order: int, tiny_checkpoint: Checkpoints
) -> None:
    """At one site, of one kind and concept: only the direction and the strength differ."""
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    whole = edit(base, "ablate", make.ablate(vector(24)), "resid")
    half = edit(base, "ablate", make.ablate(vector(24, 1), strength=0.5), "resid_post.1")
    of = plan_of(base, [whole, half][::order])
    for carrier in ("checkpoint", "lora", "gguf-lora", "gguf"):
        found = carrier_findings(of, carrier)
        assert [f.exactness for f in found] == [EXACT, IMPOSSIBLE][::order]
        assert [f.sites for f in found] == [whole.sites, half.sites][::order]


def test_what_blocks_one_edit_leaves_its_neighbours_alone(tiny_checkpoint: Checkpoints) -> None:
    """Edits that meet at one layer: the carrier lacks what one of them needs, and no other does."""
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    ablation = edit(base, "ablate", make.ablate(vector(24)), "mlp_out.1")
    push = edit(base, "offset", make.offset(vector(24, 1)), "resid_post.1")
    turn = edit(base, "rotate", make.reflect(vector(24, 2)), "resid_post.1")
    for edits, reason in (
        ([ablation, push], "creates model.layers.1.mlp"),
        ([turn, ablation], "norm"),
    ):
        found = carrier_findings(plan_of(base, edits), "lora")
        blocked = edits.index(ablation) ^ 1
        assert [f.exactness is IMPOSSIBLE for f in found] == [i == blocked for i in (0, 1)]
        assert reason in found[blocked].reason
        assert "--to lora" not in str(found[blocked].remedy)
    # The control: an ablation after the offset moves the constant, and is as fine without it.
    late = edit(base, "ablate", make.ablate(vector(24)), "resid")
    assert [f.exactness for f in carrier_findings(plan_of(base, [push, late]), "lora")] == [
        IMPOSSIBLE,
        EXACT,
    ]


def test_updates_know_their_edits(tiny_checkpoint: Checkpoints) -> None:
    base = base_at(tiny_checkpoint("llama", tied=True, **NO_BIAS))
    of = plan_of(
        base,
        [
            edit(base, "ablate", make.ablate(vector(24)), "embed"),
            edit(base, "ablate", make.ablate(vector(24, 1)), ["mlp_out.1", "resid_post.2"][:1]),
            edit(base, "offset", make.offset(vector(24, 2)), "resid_post.1"),
            edit(base, "scale", make.scale(vector(24, 3)), "ln1_out.1"),
        ],
    )
    changed = {update.name: update.edits for update in of.tensors}
    assert changed == {
        "model.embed_tokens.weight": (0,),
        "lm_head.weight": (0,),  # a copy of the base's embedding, for the sake of the edited one
        "model.layers.1.mlp.down_proj.weight": (1,),
        "model.layers.1.input_layernorm.weight": (3,),
    }
    assert {bias.name: bias.edits for bias in of.biases if not bias.is_zero()} == {
        "model.layers.1.mlp.down_proj.bias": (2,)
    }
    turned = plan_of(base, [edit(base, "rotate", make.reflect(vector(24)), "resid_post.1")])
    assert {update.edits for update in turned.tensors} == {(0,)}


@pytest.mark.parametrize(
    ("family", "options"),
    [*((name, {}) for name in tiny.FAMILIES), ("gpt_neox", {"attention_bias": False})],
)
def test_every_update_has_an_edit(
    family: str, options: dict[str, bool], tiny_checkpoint: Checkpoints
) -> None:
    """What has none would block no edit: an obstacle in it would be passed over in silence."""
    base = base_at(tiny_checkpoint(family, **options))
    n = base.layout.hidden
    direction = vector(n) - vector(n).mean()
    maps = {
        "ablate": make.ablate(direction),
        "affine": make.affine(direction, mean=vector(n, 1)),
        "offset": make.offset(direction),
        "rotate": make.reflect(direction),
        "linear": make.linear(torch.diag(vector(n)) + 1),
    }
    for kind, map_ in maps.items():
        for at in ("resid", "resid_post.1", "embed", "ln1_out.1", "ln_final_out", "attn_out.1"):
            if at == "ln1_out.1" and family == "olmo2":  # no norm before a branch
                continue
            of = plan_of(base, [edit(base, kind, map_, at)], allow=["recast", "nulling"])
            assert all(update.edits == (0,) for update in of.tensors), (kind, at)
            assert all(bias.edits == (0,) for bias in of.biases if not bias.is_zero()), (kind, at)


def test_recast_is_no_adapter(tiny_checkpoint: Checkpoints) -> None:
    base = base_at(tiny_checkpoint("mistral"))
    of = plan(base, "offset", "resid_post.1", allow=["recast"])
    # A GGUF of it is made by llama.cpp's converter, from the checkpoint.
    assert fits(of) == {"checkpoint", "control-vector", "gguf"}
    assert "down_proj.bias" in carrier_findings(of, "lora")[0].reason


def test_a_change_of_the_declaration_alone_is_no_adapter(tiny_checkpoint: Checkpoints) -> None:
    of = plan(base_at(tiny_checkpoint("llama", **NO_BIAS)), "ablate", "resid")
    assert fits(of) == ALL_BUT_VECTOR
    for key, carriers in (
        ("hidden_act", {"checkpoint", "gguf"}),
        ("tie_word_embeddings", ALL_BUT_VECTOR),
    ):
        assert fits(replace(of, config=(ConfigChange(key, None, 1),))) == carriers


def verdicts(of: Plan, carrier: str) -> dict[str, str]:
    return {v.runtime: v.status for v in carrier_runtimes(of, carrier)}


def why(of: Plan, carrier: str, runtime: str) -> str:
    return next(v.reason for v in carrier_runtimes(of, carrier) if v.runtime == runtime)


def read_by(of: Plan, carrier: str) -> set[str]:
    return {v.runtime for v in carrier_runtimes(of, carrier) if v.reads}


def test_every_runtime_is_judged_in_every_carrier(tiny_checkpoint: Checkpoints) -> None:
    of = plan(base_at(tiny_checkpoint("llama", **NO_BIAS)), "ablate", "resid")
    assert carrier_runtimes(of, "checkpoint") == of.runtimes
    for carrier in CARRIERS:
        found = carrier_runtimes(of, carrier)
        assert tuple(v.runtime for v in found) == RUNTIMES
        assert all(v.reason for v in found)
    assert read_by(of, "checkpoint") == set(RUNTIMES) - {"peft"}
    assert read_by(of, "lora") == {"transformers", "peft", "vllm", "sglang"}
    assert read_by(of, "gguf-lora") == read_by(of, "gguf") == {"llama.cpp", "ollama"}
    assert read_by(of, "control-vector") == {"llama.cpp"}


def test_verify_asks_only_runtimes_that_read_the_artifact() -> None:
    """Every kind of the registry names the runtime as a reader, and is a kind."""
    for name, runtime in ASKED.items():
        assert runtime.name == name and runtime.serves
        assert all(name in KINDS[kind].readers for kind in runtime.serves), name
    # The control: a runtime that reads no adapter may not be asked for one.
    assert "llama.cpp" not in KINDS["lora"].readers


def test_a_matrix_by_hand(tiny_checkpoint: Checkpoints) -> None:
    """Exact is what was run, refused what the sources refuse or lose; nothing else is promised."""
    of = plan(base_at(tiny_checkpoint("llama", **NO_BIAS)), "ablate", "resid")
    none = dict.fromkeys(RUNTIMES, "refused")
    unread = {"transformers": "not tested", "sglang": "not tested"}
    exact, read = "exact", "not tested"
    assert verdicts(of, "checkpoint") == {
        "transformers": exact, "peft": "refused", "vllm": exact, "llama.cpp": exact,
        "sglang": read, "ollama": read, "mlx-lm": read,
    }  # fmt: skip
    assert verdicts(of, "lora") == {
        "transformers": exact, "peft": exact, "vllm": exact, "llama.cpp": "refused",
        "sglang": read, "ollama": "refused", "mlx-lm": "refused",
    }  # fmt: skip
    assert verdicts(of, "gguf-lora") == {**none, "llama.cpp": exact, "ollama": read}
    assert verdicts(of, "gguf") == {**none, **unread, "llama.cpp": exact, "ollama": read}
    assert verdicts(of, "control-vector") == none
    assert why(of, "control-vector", "llama.cpp").startswith(
        "a control-vector cannot hold the edit"
    )
    coded = {v.runtime: v.status for v in carrier_runtimes(of, "gguf", codes=True)}
    assert coded == {**verdicts(of, "gguf"), "llama.cpp": "approximate"}


def test_an_edit_that_is_not_the_hooked_one_is_approximate(tiny_checkpoint: Checkpoints) -> None:
    base = base_at(tiny_checkpoint("gemma3", attention_bias=False, tied=False))
    of = plan(base, "ablate", "resid", allow=["nulling"])
    assert of.exactness is Exactness.NULLING
    assert verdicts(of, "checkpoint")["transformers"] == "approximate"
    assert verdicts(of, "lora")["peft"] == "approximate"
    assert "not the hooked one" in why(of, "checkpoint", "transformers")
    assert verdicts(plan(base, "ablate", "mlp_out.1"), "checkpoint")["transformers"] == "exact"


def test_runtimes_of_an_embedding_adapter(tiny_checkpoint: Checkpoints) -> None:
    """vLLM takes one only for classes that name their embedding."""
    expected = {
        "llama": "exact",
        "phi3": "exact",
        "qwen3": "exact",
        "olmo2": "exact",
        "qwen2": "refused",
        "mistral": "refused",
        "gemma": "refused",
        "gemma2": "refused",
        "gemma3": "refused",
        "gpt2": "refused",
        "gpt_neox": "refused",
        "mixtral": "not tested",
    }
    for family, status in expected.items():
        options = {"attention_bias": False} if family == "qwen3" else {}
        of = plan(base_at(tiny_checkpoint(family, tied=False, **options)), "offset", "embed")
        if family == "gpt2":
            assert "takes no adapters" in why(of, "lora", "vllm")
        assert verdicts(of, "lora")["vllm"] == status, family


def test_a_base_that_a_runtime_does_not_serve_whole(tiny_checkpoint: Checkpoints) -> None:
    """The adapter may be fine; the base beside it is another model there."""
    base = base_at(tiny_checkpoint("qwen3", tied=False))
    of = plan(base, "ablate", "mlp_out.1", targets=["vllm"])
    assert "silently drops model.layers.0.self_attn.o_proj.bias, which the base has" in why(
        of, "lora", "vllm"
    )
    assert verdicts(of, "gguf-lora")["llama.cpp"] == "refused"
    assert verdicts(of, "control-vector")["llama.cpp"] == "refused"
    assert verdicts(of, "lora")["peft"] == "exact"
    with pytest.raises(InexactPlan, match="the target vllm would not serve this lora"):
        refuse(of, "lora")
    refuse(plan(base, "ablate", "mlp_out.1"), "lora")


def test_scaled_embedding_under_vllm(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Its general backend would leave √d off the adapter's rows, and say nothing."""
    base = base_at(tiny_checkpoint("gemma", attention_bias=False))
    of = plan(base, "ablate", "resid", targets=["vllm"])
    assert verdicts(of, "lora")["peft"] == "exact"
    assert verdicts(of, "lora")["vllm"] == "refused"
    with pytest.raises(InexactPlan, match="target vllm would not serve this lora") as error:
        written("lora", of, base.checkpoint, tmp_path / "out")
    assert "leaves the embedding's multiplier off" in str(error.value.why)
    assert not (tmp_path / "out").exists()
    # The control: without the target, and without the embedding, the adapter is fine.
    refuse(plan(base, "ablate", "resid"), "lora")
    refuse(plan(base, "ablate", "attn_out.*", targets=["vllm"]), "lora")


def test_adapters_of_a_rank_that_vllm_does_not_take(
    tiny_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    two = make.ablate(torch.stack([vector(24), vector(24, 1)]))
    of = plan_of(base, [edit(base, "ablate", two, "attn_out.1")])
    assert verdicts(of, "lora")["vllm"] == "exact"
    monkeypatch.setattr("bake.plan.carriers.VLLM_RANKS", (1,))
    assert verdicts(of, "lora")["vllm"] == "refused"
    assert "rank up to 1, and this one has 2" in why(of, "lora", "vllm")
    assert verdicts(of, "lora")["peft"] == "exact"


def test_tied_heads(tiny_checkpoint: Checkpoints) -> None:
    base = base_at(tiny_checkpoint("llama", tied=True, **NO_BIAS))
    of = plan(base, "ablate", "resid")
    # Over a copy of the base's GGUF with a head of its own, which the plan says.
    assert verdicts(of, "gguf-lora")["llama.cpp"] == "exact"
    (finding,) = carrier_findings(of, "gguf-lora")
    assert "over a copy of the base's GGUF (--gguf)" in finding.reason
    inner = plan(base, "ablate", "attn_out.1")
    for other, carrier in ((of, "lora"), (of, "checkpoint"), (inner, "gguf-lora")):
        assert "--gguf" not in carrier_findings(other, carrier)[0].reason
    # Its loader of Gemma has no head of its own.
    gemma = plan(base_at(tiny_checkpoint("gemma", attention_bias=False)), "ablate", "resid")
    assert verdicts(gemma, "gguf-lora")["llama.cpp"] == "refused"
    assert "the process aborts" in why(gemma, "gguf-lora", "llama.cpp")
    assert verdicts(of, "lora")["peft"] == verdicts(of, "lora")["vllm"] == "exact"
    assert verdicts(plan(base, "ablate", "ln_final_out"), "lora")["vllm"] == "refused"


def test_a_table_that_says_nothing(tiny_checkpoint: Checkpoints) -> None:
    """Not tested, and for a target an error: nobody knows what would be lost."""
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    of = plan(base, "ablate", "attn_out.1", targets=["vllm"])
    refuse(of, "lora")
    silent = {
        name: structs.replace(runtime, lora=None, control_vector=None)
        for name, runtime in of.layout.family.runtimes.items()
    }
    family = structs.replace(of.layout.family, runtimes=silent)
    of = replace(of, layout=replace(of.layout, family=family))
    assert verdicts(of, "lora")["vllm"] == "not tested"
    with pytest.raises(InexactPlan, match="says nothing of adapters in vllm"):
        refuse(of, "lora")
    assert "control-vector" not in fits(of)


def test_a_table_of_the_core_tier(tiny_checkpoint: Checkpoints) -> None:
    """What it says nothing of is not tested, and an error only where a recipe wants it."""
    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    assert base.layout.family.tier == "served"
    core = structs.replace(base.layout.family, runtimes={}, gguf=None)
    assert core.tier == "core"
    base = replace(base, layout=replace(base.layout, family=core))
    of = plan(base, "ablate", "attn_out.1")
    assert fits(of) == {"checkpoint", "lora"}
    for carrier in fits(of):
        judged = verdicts(of, carrier)
        assert judged["transformers"] == "exact"
        assert {judged[name] for name in DESCRIBED} <= {"not tested", "refused"}
        assert judged["vllm"] == "not tested"
        refuse(of, carrier)
    wanted = plan(base, "ablate", "attn_out.1", targets=["vllm"])
    with pytest.raises(InexactPlan, match="says nothing of"):
        refuse(wanted, "lora")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_transformers_loads_an_adapter_by_itself(
    family: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """``load_adapter`` of the model, as the matrix says of every shipped table."""
    base = base_at(tiny_checkpoint(family, **tiny.unbiased(family)))
    n = base.layout.hidden
    if biased_writers(base):
        at: str | list[str] = ["ln1_out.1", "ln2_out.1"]
    elif family in tiny.POST_NORM:
        at = ["attn_out.*", "ln_final_out"]
    else:
        at = "resid"
    edits = [edit(base, "ablate", make.ablate(vector(n)), at)]
    of = plan_of(base, edits)
    run = tiny.TABLES[family].run
    for name in ("transformers", "peft"):
        assert verdicts(of, "lora")[name] == ("exact" if "lora" in run[name] else "not tested")
    out = written("lora", of, base.checkpoint, tmp_path / "out").path
    with peft_warnings():
        model = tiny.load(base.path)
        model.load_adapter(str(out))
        served = logits_of(model)
    hooked = logits(base.model, base, edits)
    effect = float((hooked - logits(base.model, base)).abs().max())
    assert effect > 0.1
    assert float((served - hooked).abs().max()) <= RELATIVE * effect


def biased_writers(base: Base) -> bool:
    """Whether the writers keep biases when every flag is closed."""
    writers = [writer for branch in base.layout.branches for writer in branch.writes]
    return any(writer.bias.state == "present" for writer in writers)


def test_unknown_carrier(tiny_checkpoint: Checkpoints) -> None:
    of = plan(base_at(tiny_checkpoint("llama", **NO_BIAS)), "ablate", "resid")
    with pytest.raises(UsageError, match="there is no carrier 'lora2'"):
        carrier_findings(of, "lora2")
    with pytest.raises(UsageError, match="there is no carrier 'onnx'"):
        carrier_runtimes(of, "onnx")


def test_findings_read_no_weight(
    tiny_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = plan(base_at(tiny_checkpoint("llama", **NO_BIAS)), "ablate", "resid")
    for name in ("read", "read_rows"):
        monkeypatch.setattr(f"bake.checkpoints.Checkpoint.{name}", lambda *_: pytest.fail("read"))
    before = torch.random.get_rng_state()
    assert [carrier_findings(of, c) for c in CARRIERS] == [
        carrier_findings(of, c) for c in CARRIERS
    ]
    assert torch.equal(before, torch.random.get_rng_state())


def test_shipped_tables_say_what_every_runtime_does() -> None:
    assert len(tiny.FAMILIES) >= 13
    for family in (tiny.TABLES[name] for name in tiny.FAMILIES):
        assert set(family.runtimes) == set(DESCRIBED)
        for name in ("vllm", "llama.cpp"):
            adaptable = family.runtimes[name].lora
            assert adaptable is not None and set(adaptable) <= set(get_args(Adaptable))
        assert family.runtimes["llama.cpp"].control_vector is True
        for name, runtime in family.runtimes.items():
            assert re.match(r"(vLLM|llama\.cpp|SGLang|Ollama|MLX-LM) ", runtime.source), name


def grid() -> Iterator[tuple[str, set[str], set[str]]]:
    """Yield each family of the runtime tests' table, with the carriers run in vLLM and llama.cpp.

    Read from the text: those tests need the runtimes, and this one none.
    """
    tree = ast.parse((TESTS / "runtimes" / "test_grid.py").read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert defined >= {
        "test_checkpoint_in_vllm",
        "test_adapter_in_vllm",
        "test_converted_checkpoint_in_llamacpp",
        "test_edited_gguf_in_llamacpp",
        "test_gguf_adapter_in_llamacpp",
        "test_control_vector_in_llamacpp",
    }
    values = (n.value for n in tree.body if isinstance(n, ast.Assign) and is_named(n, "CASES"))
    cases = next(values)
    assert isinstance(cases, ast.Dict)
    for key, case in zip(cases.keys, cases.values, strict=True):
        assert isinstance(key, ast.Constant) and isinstance(case, ast.Call)
        options = {word.arg for word in case.keywords}
        if "recast" in options:  # served as another family, whose own row runs it
            continue
        vllm = {"checkpoint"} | (set() if "refused" in options else {"lora"})
        llama_cpp = {"checkpoint", "gguf", "gguf-lora", "control-vector"}
        yield key.value.lower().replace(" ", "").replace("-", ""), vllm, llama_cpp


def is_named(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def test_the_tables_call_run_what_the_tests_run() -> None:
    ran = {name: (vllm, llama_cpp) for name, vllm, llama_cpp in grid()}
    assert ran.keys() <= {name.replace("_", "") for name in tiny.FAMILIES}
    for family in load_families():
        vllm, llama_cpp = ran.get(family.name.replace("_", ""), (set(), set()))
        assert {name: set(carriers) for name, carriers in family.run.items()} == {
            # Every family, by default: tests/test_families.py and above, test_core_families.py.
            "transformers": {"checkpoint", "lora"},
            "peft": {"lora"},
            "vllm": vllm,
            "llama.cpp": llama_cpp,
            "sglang": set(),
            "ollama": set(),
            "mlx-lm": set(),
        }


# --- the tables of the documentation -------------------------------------------------------------

NAMES = {
    "checkpoints": [(name, "checkpoint") for name in RUNTIMES if name != "peft"],
    "adapters": [
        *((name, "lora") for name in ("transformers", "peft", "vllm", "sglang")),
        *((name, "gguf-lora") for name in ("llama.cpp", "ollama")),
    ],
}


def documented(table: str) -> dict[str, list[str]]:
    """Return the rows between a table's marks in docs/carriers.md, by their first cell."""
    text = (TESTS.parent / "docs" / "carriers.md").read_text(encoding="utf-8")
    lines = text.partition(f"<!-- {table} -->")[2].partition("<!-- end -->")[0].strip().splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["family", *(name for name, _ in NAMES[table])]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.parametrize("table", NAMES)
def test_the_documented_matrix_is_that_of_the_tables(
    table: str, tiny_checkpoint: Checkpoints
) -> None:
    found = {}
    for family in tiny.FAMILIES:
        base = base_at(tiny_checkpoint(family, **tiny.unbiased(family)))
        linear = ["attn_out.*", "mlp_out.*"]
        if biased_writers(base):
            linear = ["ln1_out.1", "ln2_out.1"]
        config = dict(base.checkpoint.config)
        rope = config.get("rope_parameters", {})
        if "rope_theta" in rope:  # where checkpoints on the Hub have it
            config["rope_theta"] = rope["rope_theta"]
        of = compile_plan(
            [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), linear)],
            base.layout,
            gain=lambda name, base=base: base.checkpoint.read(name).to(torch.float64),
            config=config,
        )
        judged = [(verdicts(of, carrier), name) for name, carrier in NAMES[table]]
        found[family] = [by_name[name] for by_name, name in judged]
    rows = "\n".join(f"| {' | '.join([name, *row])} |" for name, row in found.items())
    assert documented(table) == found, rows
