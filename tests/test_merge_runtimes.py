"""What the runtimes make of a merged checkpoint: what a plan says of an exported one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from adapters import NO_BIAS
from click.testing import CliRunner
from harness import base_at, edit, plan_of, vector
from peft_samples import ARCHITECTURES, base_of
from test_merge import trained
from test_merge_kinds import make as adapted

from bake import edits as make
from bake.artifact.record import read_record
from bake.artifact.schema import RuntimeVerdict
from bake.cli import main
from bake.merge.merge import merge_adapter

Said = dict[str, tuple[str, str]]


def said(verdicts: tuple[RuntimeVerdict, ...]) -> Said:
    return {one.runtime: (one.status, one.reason) for one in verdicts if one.reads}


PLAIN = {"gemma": {"attention_bias": False}, "qwen3": {"attention_bias": False}, "llama": NO_BIAS}
"""Without the biases that some programs drop."""


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]])
def test_a_merge_is_served_as_an_export_is(
    family: str, targets: list[str], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A head of its own is what programs drop: where the adapter unties it, and an edit does."""
    base = base_at(tiny_checkpoint(family, tied=True, **PLAIN[family]))
    adapter = trained(base, tmp_path / "adapter", target_modules=targets)
    out = merge_adapter(adapter, base.checkpoint, tmp_path / "out").path
    found = said(read_record(out).plan.runtimes)
    site = "attn_out.1" if targets == ["q_proj"] else "resid"
    like = plan_of(base, [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), site)])
    assert found == said(like.runtimes)
    drops = family == "gemma" and targets == ["embed_tokens"]
    assert ("an output head that differs" in found["llama.cpp"][1]) == drops
    assert (found["llama.cpp"][0] == "refused") == drops


def test_they_are_told(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("gemma", tied=True, **PLAIN["gemma"]))
    adapter = trained(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    arguments = ["merge", str(adapter), str(base.path), "--out", str(tmp_path / "out")]
    done = CliRunner(env={"COLUMNS": "400"}).invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "refused: " in done.output
    assert "an output head that differs from the embedding" in done.output


@pytest.mark.filterwarnings("ignore")
def test_of_a_class_without_a_table_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    monkeypatch.setitem(ARCHITECTURES, "codegen", {"model_type": "codegen", **sizes})
    base = base_of("codegen", True, "plain", tmp_path / "bases")
    adapter = adapted(base, tmp_path / "a", target_modules=["qkv_proj"])
    from bake.checkpoints import open_checkpoint

    out = merge_adapter(adapter, open_checkpoint(base.path), tmp_path / "out").path
    verdicts = read_record(out).plan.runtimes
    assert {one.status for one in verdicts} == {"not tested"}
    assert all(
        "no table describes it" in one.reason and "CodeGenForCausalLM" in one.reason
        for one in verdicts
    )
