"""Which carrier holds which edit, in which runtime, and what is advised instead.

The expected verdicts are written by hand, from the runtimes' sources.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import NO_BIAS
from harness import Base, base_at, edit, plan_of, vector

from bake import edits as make
from bake.errors import InexactPlan, UsageError
from bake.families import load_families
from bake.families.table import ADAPTABLE
from bake.outputs.lora import export_lora
from bake.plan import Exactness, Plan
from bake.plan.carriers import CARRIERS, carrier_findings, carrier_runtimes

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


ALL_BUT_VECTOR = {"checkpoint", "lora", "gguf-lora"}
TABLE = [
    ("llama", NO_BIAS, "ablate", "resid", ALL_BUT_VECTOR),
    ("llama", {**NO_BIAS, "tied": True}, "ablate", "resid", {"checkpoint", "lora"}),
    ("llama", {**NO_BIAS, "tied": True}, "ablate", "attn_out.1", ALL_BUT_VECTOR),
    ("llama", {}, "ablate", "resid", {"checkpoint"}),
    ("llama", NO_BIAS, "offset", "resid_post.1", {"checkpoint", "control-vector"}),
    ("llama", NO_BIAS, "offset", "resid_post.0", {"checkpoint"}),
    ("llama", NO_BIAS, "offset", "embed", ALL_BUT_VECTOR),
    ("llama", NO_BIAS, "scale", "ln1_out.1", {"checkpoint"}),
    ("qwen2", {}, "offset", "resid_post.1", {"control-vector"}),
    ("qwen2", {}, "offset", "resid_post.0", set()),
    ("gemma2", {"attention_bias": False}, "ablate", "mlp_out.1", ALL_BUT_VECTOR),
    ("gemma2", {}, "offset", "resid_post.2", {"control-vector"}),
    ("gemma", {"attention_bias": False}, "ablate", "resid", {"checkpoint", "lora"}),
    ("gpt2", {}, "ablate", "ln2_out.1", ALL_BUT_VECTOR),
    ("gpt2", {}, "ablate", "resid", {"checkpoint"}),
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
                named = {c for c in CARRIERS if f"--to {c}" in finding.remedy}
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


def test_recast_is_no_adapter(tiny_checkpoint: Checkpoints) -> None:
    base = base_at(tiny_checkpoint("mistral"))
    of = plan(base, "offset", "resid_post.1", allow=["recast"])
    assert fits(of) == {"checkpoint", "control-vector"}
    assert "down_proj.bias" in carrier_findings(of, "lora")[0].reason


def verdicts(of: Plan, carrier: str) -> dict[str, str]:
    return {v.runtime: v.status for v in carrier_runtimes(of, carrier)}


def test_runtimes_of_an_embedding_adapter(tiny_checkpoint: Checkpoints) -> None:
    """vLLM takes one only for classes that name their embedding."""
    expected = {
        "llama": "loads",
        "phi3": "loads",
        "qwen3": "loads",
        "olmo2": "loads",
        "qwen2": "refused",
        "mistral": "refused",
        "gemma": "refused",
        "gemma2": "refused",
        "gpt2": "refused",
        "gpt_neox": "refused",
        "mixtral": "loads",
    }
    for family, status in expected.items():
        of = plan(base_at(tiny_checkpoint(family, tied=False)), "offset", "embed")
        if family == "gpt2":
            assert "takes no adapters" in next(
                v.reason for v in carrier_runtimes(of, "lora") if v.runtime == "vllm"
            )
        assert verdicts(of, "lora")["vllm"] == status, family


def test_scaled_embedding_under_vllm(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Its general backend would leave √d off the adapter's rows, and say nothing."""
    base = base_at(tiny_checkpoint("gemma", attention_bias=False))
    of = plan(base, "ablate", "resid", targets=["vllm"])
    assert verdicts(of, "lora") == {"transformers": "loads", "vllm": "refused"}
    with pytest.raises(InexactPlan, match="as lora: impossible") as error:
        export_lora(of, base.checkpoint, tmp_path / "out", record={})
    assert "leaves the embedding's multiplier off" in str(error.value.why)
    # The control: without the target, and without the embedding, the adapter is fine.
    assert "lora" in fits(plan(base, "ablate", "resid"))
    assert "lora" in fits(plan(base, "ablate", "attn_out.*", targets=["vllm"]))


def test_tied_heads(tiny_checkpoint: Checkpoints) -> None:
    base = base_at(tiny_checkpoint("llama", tied=True, **NO_BIAS))
    of = plan(base, "ablate", "resid")
    (verdict,) = carrier_runtimes(of, "gguf-lora")
    assert verdict.status == "refused" and "the process aborts" in verdict.reason
    assert verdicts(of, "lora") == {"transformers": "loads", "vllm": "loads"}
    assert verdicts(plan(base, "ablate", "ln_final_out"), "lora")["vllm"] == "refused"


def test_a_table_that_says_nothing_is_unknown(tiny_checkpoint: Checkpoints) -> None:
    from dataclasses import replace

    base = base_at(tiny_checkpoint("llama", **NO_BIAS))
    of = plan(base, "offset", "resid_post.1", targets=["vllm"])
    silent = {
        name: replace(runtime, lora=None, control_vector=None)
        for name, runtime in of.layout.family.runtimes.items()
    }
    family = replace(of.layout.family, runtimes=silent)
    of = replace(of, layout=replace(of.layout, family=family))
    assert verdicts(of, "lora")["vllm"] == "unknown"
    assert verdicts(of, "control-vector")["llama.cpp"] == "unknown"
    assert "control-vector" not in fits(of)


def test_runtimes_that_do_not_read_a_carrier_are_not_named(tiny_checkpoint: Checkpoints) -> None:
    of = plan(base_at(tiny_checkpoint("llama", **NO_BIAS)), "ablate", "resid")
    assert carrier_runtimes(of, "checkpoint") == of.runtimes
    assert set(verdicts(of, "lora")) == {"transformers", "vllm"}
    assert set(verdicts(of, "gguf-lora")) == set(verdicts(of, "control-vector")) == {"llama.cpp"}


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


def test_shipped_tables_say_what_adapters_may_change() -> None:
    for family in load_families():
        for runtime in family.runtimes.values():
            assert runtime.lora is not None and set(runtime.lora) <= set(ADAPTABLE)
        assert family.runtimes["llama.cpp"].control_vector is True
