"""A merge is an artifact like any other: recorded, verified against PEFT, checked and published."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import factors_of, rewritten
from exporting import written
from harness import Base, base_at, edit, plan_of, vector
from peft_samples import base_of
from peft_samples import load as load_double
from peft_samples import trained as trained_randomly
from safetensors.torch import load_file, save_file
from test_merge import trained
from test_merge_kinds import make as adapted

from bake import edits as make
from bake.artifact.record import read_record
from bake.checkpoints import open_checkpoint
from bake.errors import (
    ExactnessBug,
    Inconclusive,
    InputError,
    UsageError,
    VerificationFailed,
)
from bake.jobs.planned import judged
from bake.merge.merge import merge_adapter
from bake.publish.preflight import Terms, preflight
from bake.seal.seal import check, seal
from bake.verify.files import write_report
from bake.verify.judgement import raise_unless_passed
from bake.verify.report import Report
from bake.verify.runtimes.registry import Runtimes
from bake.verify.verdict import FLOOR
from bake.verify.verification import Verification

Checkpoints = Callable[..., Path]
PROMPTS = [[5, 9, 4, 33, 7, 21, 8], [39, 3, 17, 6, 6], [11, 12, 13]]


def merged(base: Base, folder: Path, **options: Any) -> Path:
    """Train an adapter beside ``out`` and merge it."""
    adapter = trained(base, folder / "adapter", **options)
    return merge_adapter(adapter, base.checkpoint, folder / "out").path


def verify(out: Path, **options: Any) -> Report:
    return judged(Verification(out, prompts=PROMPTS, generate=2, **options))


def value(report: Report, name: str) -> float:
    return next(row.value for row in report.rows if row.name == name)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {}),
    "a tied embedding": ("llama", {"tied": True}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "biases": ("llama", {}, {"bias": "all"}),
    "a saved head": ("llama", {}, {"modules_to_save": ["lm_head"]}),
    "stored the other way": (
        "gpt2",
        {},
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "a scaled embedding": ("gemma", {"tied": False}, {"target_modules": ["embed_tokens"]}),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
@pytest.mark.parametrize("case", CASES)
def test_a_merge_equals_the_adapter_at_work(
    case: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    family, config, options = CASES[case]
    out = merged(base_at(tiny_checkpoint(family, **config)), tmp_path, **options)
    report = verify(out)
    raise_unless_passed(report)
    assert report.passed and report.exactness == "exact"
    effect = value(report, "effect: adapter at work − base")
    error = value(report, "plan: not rounded − adapter at work, in float64")
    assert effect > 1e-2 and error <= 1e-9 * effect
    assert value(report, "files: values off the plan") == 0
    controls = [row for row in report.rows if row.group.endswith("control")]
    for question in ("plan", "files"):
        kinds = [row.name.split(", ")[1] for row in controls if row.group == f"{question} control"]
        assert {"forgotten tensor", "flipped sign"} <= set(kinds)
    assert all(row.passed for row in controls)
    assert not any("hooked" in row.name or "baked" in row.name for row in report.rows)
    assert report.environment["peft"]


def test_half_precision_has_the_floor_of_its_dtype(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    out = merged(base_at(tiny_checkpoint("llama", dtype=torch.bfloat16)), tmp_path)
    report = verify(out)
    assert report.passed and report.dtype == "BF16"
    assert value(report, "plan: not rounded − adapter at work, in float64") <= 1e-9 * value(
        report, "effect: adapter at work − base"
    )
    # Rounding the merged weights costs something, about what rounding costs anywhere.
    lost = value(
        report, "lost in storage: KL(adapter at work ‖ stored) / KL(adapter at work ‖ base)"
    )
    floor = value(report, FLOOR)
    assert 0 < lost < 3 * floor < 0.05


ANYWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    "no attention": ("mamba", {"target_modules": ["in_proj", "x_proj"]}),
    "one matrix for three": ("bloom", {"target_modules": ["query_key_value"], "use_dora": True}),
    "both of a tied pair": (
        "opt",
        {"target_modules": ["embed_tokens", "fc1"], "modules_to_save": ["final_layer_norm"]},
    ),
    "stacked experts": (
        "qwen2_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    ),
}
"""Classes without a table, and kinds of adapters whose layers read the base's weights."""


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("case", ANYWHERE)
def test_a_merge_of_any_class_in_memory_and_streamed(case: str, tmp_path: Path) -> None:
    """Without a table; and streamed, where a layer's weight is there while its block runs."""
    architecture, options = ANYWHERE[case]
    base = base_of(architecture, case == "both of a tied pair", "plain", tmp_path / "bases")
    made = trained_randomly(
        base, tmp_path / "adapter", {"r": 2, "lora_alpha": 4, **options}, random.Random(0)
    )
    assert made is not None
    merge_adapter(made, open_checkpoint(base.path), tmp_path / "out")
    reports = [verify(tmp_path / "out", streamed=streamed) for streamed in (False, True)]
    for report in reports:
        raise_unless_passed(report)
        effect = value(report, "effect: adapter at work − base")
        error = value(report, "plan: not rounded − adapter at work, in float64")
        assert effect > 1e-2 and error <= 1e-9 * effect
        controls = [row for row in report.rows if row.group.endswith("control")]
        assert len(controls) > 4 and all(row.passed for row in controls)
        # The stream between the blocks, without a table that says where it is.
        sites = ["resid_pre.0", "resid_pre.1", "resid_post.1"]
        assert report.layers["sites"] == sites
        moved, left = report.layers["effect"], report.layers["plan, not rounded"]
        assert all(one <= 1e-9 * max(moved) for one in left) and moved[-1] > 1e-3
        assert (moved[0] > 0) == (case == "both of a tied pair")
    one, two = ({row.name: row.value for row in report.rows} for report in reports)
    assert one.keys() - two.keys() == {"same greedy tokens"} or one.keys() == two.keys()
    # Where a tensor lies in memory decides on some machines in which order products add up.
    same = {n: pytest.approx(one[n], rel=1e-9) for n in two if n.startswith(("effect", "control"))}
    assert same and {name: two[name] for name in same} == same


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_of_the_adapter_is_streamed_over(tied: bool, tmp_path: Path) -> None:
    """``save_embedding_layers`` stores one whole: of a tied pair PEFT loads it into both."""
    base = base_of("llama", tied, "plain", tmp_path / "bases")
    model = load_double(base.path)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    adapter = adapted(base, tmp_path / "adapter", model, True, target_modules=["q_proj"])
    merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "out")
    for streamed in (False, True):
        raise_unless_passed(verify(tmp_path / "out", streamed=streamed))


def test_experts(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("mixtral"))
    plan = plan_of(base, [edit(base, "ablate", make.ablate(vector(24)), "resid")])
    adapter = written("lora", plan, base.checkpoint, tmp_path / "adapter").path
    out = merge_adapter(adapter, base.checkpoint, tmp_path / "out").path
    assert verify(out).passed


def test_the_record_says_what_was_merged(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama", tied=True))
    out = merged(base, tmp_path, target_modules=["q_proj", "embed_tokens"])
    record = json.loads((out / "bake.json").read_text())
    assert record["kind"] == "merge"
    assert (out / record["base"]["path"]).resolve() == base.path.resolve()
    assert record["base"]["digest"] == base.checkpoint.digest()
    assert (out / record["adapter"]["path"]).resolve() == (tmp_path / "adapter").resolve()
    assert record["adapter"]["config"]["r"] == 3
    # Places are told from the artifact; nothing names a folder of the machine that merged.
    assert str(base.path) not in json.dumps(record)
    parts = [(tmp_path / "adapter" / name).read_bytes() for name in ("adapter_config.json",)]
    parts.append((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes())
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    assert record["adapter"]["sha256"] == hashlib.sha256(digests).hexdigest()
    plan = record["plan"]
    assert (plan["exactness"], plan["family"]) == ("exact", "llama")
    changed = {row["name"]: row for row in plan["tensors"]}
    assert set(changed) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)),
    }
    assert changed["lm_head.weight"]["sides"] == ["copied"] and changed["lm_head.weight"]["created"]
    assert changed["model.embed_tokens.weight"]["sides"] == ["update"]
    assert plan["config"] == [{"key": "tie_word_embeddings", "old": True, "new": False}]
    assert plan["notes"] == ["the output head is untied from the embedding"]
    assert plan["created_bytes"] == base.checkpoint.tensors["model.embed_tokens.weight"].nbytes
    assert set(record["files"]) == {path.name for path in out.iterdir() if path.name != "bake.json"}


def test_a_base_on_the_hub_is_recorded_by_id_and_commit(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base, commit = base_at(tiny_checkpoint("llama")), "c0ffee" + "0" * 34
    fetched = replace(base.checkpoint, source="owner/name@main", revision=commit)
    adapter = trained(base, tmp_path / "adapter")
    out = merge_adapter(adapter, fetched, tmp_path / "out").path
    told = json.loads((out / "bake.json").read_text())["base"]
    assert (told["model"], told["revision"], told["path"]) == ("owner/name", commit, None)
    found = read_record(out).base
    assert found.on_hub and found.pinned and found.repo == "owner/name"


def spoiled(out: Path, name: str, factor: float) -> None:
    """Scale a weight, and let the record say that it was exported so."""
    path = out / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] * factor
    save_file(tensors, path, metadata={"format": "pt"})
    record = json.loads((out / "bake.json").read_text())
    record["files"]["model.safetensors"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (out / "bake.json").write_text(json.dumps(record))


def test_what_is_wrong_fails(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama"))
    out = merged(base, tmp_path)
    other = trained(base, tmp_path / "other", r=2)
    elsewhere = base_at(tiny_checkpoint("llama", attention_bias=False))
    with pytest.raises(InputError, match="is not the base that the artifact was made from"):
        verify(out, base=str(elsewhere.path))
    with pytest.raises(InputError, match="this is not the adapter that was merged"):
        verify(out, adapter=other)
    with pytest.raises(UsageError, match="a merge needs no table"):
        verify(out, family=tmp_path / "table.toml")
    with pytest.raises(UsageError, match="peft loads no merge"):
        verify(out, runtimes=Runtimes(("peft",)))
    (tmp_path / "adapter").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="the adapter that was merged is not there"):
        verify(out)
    assert verify(out, adapter=tmp_path / "moved").passed
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(out / "model.safetensors")
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationFailed, match="changed after the export"):
        raise_unless_passed(verify(out, adapter=tmp_path / "moved"))
    spoiled(out, name, 1.0)
    with pytest.raises(ExactnessBug, match="files: values off the plan") as error:
        raise_unless_passed(verify(out, adapter=tmp_path / "moved"))
    assert error.value.exit_code == 6


def test_an_adapter_that_does_nothing_proves_nothing(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    adapter = trained(base, tmp_path / "adapter")
    zeros = {name: 0 * tensor for name, tensor in factors_of(adapter).items()}
    nothing = rewritten(adapter, tmp_path / "nothing", zeros)
    out = merge_adapter(nothing, base.checkpoint, tmp_path / "out").path
    with pytest.raises(Inconclusive, match="the edit has no effect"):
        raise_unless_passed(verify(out))


def test_a_merge_in_a_runtime(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    out = merged(base_at(tiny_checkpoint("llama", tied=True)), tmp_path)
    report = verify(out, runtimes=Runtimes(("transformers",)))
    raise_unless_passed(report)
    (record,) = report.runtimes
    assert record["status"] == "passed"
    rows = [row for row in report.rows if row.group == "runtime"]
    assert len(rows) == 2 and all(row.passed for row in rows)


def test_checked_and_published_like_an_export(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama"))
    out = merged(base, tmp_path)
    record = read_record(out)
    assert (record.kind, len(record.plan.changed)) == ("merge", 6)
    terms = Terms(no_card=True)
    problems = preflight(out, terms).problems
    assert [problem.where for problem in problems] == ["verify.json"]
    write_report(verify(out), out, plots=False, html=False)
    assert preflight(out, terms).problems == ()
    seal(out)
    found = check(out, base=base.path)
    assert found.problems == () and found.unverified is None
    statement = json.loads((out / "bake" / "provenance.json").read_text())
    dependencies = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert {"adapter adapter", "base"} == {entry["name"] for entry in dependencies}
    # The control: a tensor that the merge leaves alone, changed.
    spoiled(out, "model.layers.1.self_attn.k_proj.weight", 1.5)
    assert any("sealed" in str(p) or "lists" in str(p) for p in check(out).problems)
    seal_again = shutil.copytree(out, tmp_path / "again")
    for name in ("SHA256SUMS", "bake/provenance.json"):
        (seal_again / name).unlink()
    seal(seal_again)
    found = check(seal_again, base=base.path)
    assert any("k_proj.weight differs from the base" in str(p) for p in found.problems)
