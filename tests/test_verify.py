"""The comparison itself: what is right passes, what is not fails, and dtypes cost what they do."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from harness import Base, bake, base_at, edit, plan_of, vector
from safetensors.torch import load_file, save_file

from bake import edits as make
from bake.cli import main
from bake.edits import Edit
from bake.errors import BakeError, ExactnessBug, Inconclusive, InputError
from bake.jobs.planned import judged
from bake.verify.judgement import raise_unless_passed
from bake.verify.report import Report
from bake.verify.verification import Verification

EXACT = "plan: not rounded − hooked, in float64"
LOST = "lost in storage"


def row(report: Report, name: str) -> float:
    return next(row.value for row in report.rows if row.name.startswith(name))


def edits_of(base: Base) -> list[Edit]:
    """An ablation, of the stream where the family folds that, else of modules; and a scale."""
    hidden, family = base.layout.hidden, base.layout.family.name
    at = ["attn_out.*", "mlp_out.*"] if family in tiny.POST_NORM else ["resid"]
    return [
        edit(base, "ablate", make.ablate(vector(hidden)), at),
        edit(base, "scale", make.scale(1 + 0.2 * vector(hidden, 1)), "ln_final_out"),
    ]


def baked(base: Base, out: Path) -> Path:
    return bake(base, plan_of(base, edits_of(base)), out)


DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Of each kind of tensor one; what is stored in bfloat16 loses most, and is measured for all.
EVERY_DTYPE = ("llama", "gemma2", "gpt2", "mixtral")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_plan_is_exact_whatever_it_is_stored_in(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Unrounded within 1e-9 of the effect in every dtype; what storage costs shrinks with it."""
    lost = {}
    for dtype in DTYPES if family in EVERY_DTYPE else DTYPES[2:]:
        base_path = tiny_checkpoint(family, dtype=dtype)
        base = Base(base_path, _open(base_path), None, tiny.layout_of(base_path))  # type: ignore[arg-type]
        out = baked(base, tmp_path / str(dtype))
        report = judged(Verification(out, base=str(base_path), generate=4))
        assert report.passed, report.rows
        assert [answer.verdict for answer in report.answers] == ["passed"] * 3
        # Every kind of broken bake is told from it, whatever the weights are stored in.
        controls = [found for found in report.rows if found.group.endswith("control")]
        assert len(controls) >= 8 and all(found.passed for found in controls), controls
        effect = row(report, "effect")
        assert effect > 0.1
        assert row(report, EXACT) <= 1e-9 * effect
        assert row(report, "files: values off the plan") == 0
        lost[dtype] = row(report, LOST)
    assert lost[torch.bfloat16] < 0.05
    if len(lost) == 1:
        return
    # KL is of second order: it falls by the square of the ratio of machine epsilons, 2^32, and in
    # float64 to what a sum of probabilities rounds.
    assert lost[torch.float64] < 1e-14
    assert lost[torch.float64] * 2**8 < lost[torch.float32]
    assert lost[torch.float32] * 2**16 < lost[torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float64, 1e-14), (torch.float32, 1e-9), (torch.bfloat16, 0.01)]
)
def test_the_quickstart_loses_no_more_than_what_it_is_stored_in_rounds(
    dtype: torch.dtype, most: float, tmp_path: Path
) -> None:
    recipes = Path(__file__).parents[1] / "recipes"
    shutil.copytree(recipes / "quickstart", tmp_path / "quickstart")
    shutil.copy(recipes / "quickstart.toml", tmp_path)
    model = tmp_path / "quickstart" / "model"
    for shard in model.glob("*.safetensors"):
        tensors = {name: value.to(dtype) for name, value in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    out = tmp_path / "out"
    run = CliRunner().invoke
    made = run(main, ["export", str(tmp_path / "quickstart.toml"), "--out", str(out), "-q"])
    assert made.exit_code == 0, made.output
    report = judged(Verification(out, longest=16, generate=0))
    assert report.passed, report.rows
    assert row(report, EXACT) <= 1e-9 * row(report, "effect")
    assert row(report, LOST) <= most
    # A copy in a narrower dtype would not keep the next one's promise: the numbers are told apart.
    floors = {torch.float64: 0.0, torch.float32: 1e-14, torch.bfloat16: 1e-9}
    assert row(report, LOST) >= floors[dtype]


def _open(path: Path):  # type: ignore[no-untyped-def]
    from bake.checkpoints import open_checkpoint

    return open_checkpoint(path)


def test_an_edit_without_effect_is_no_pass(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    nothing = [edit(base, "ablate", make.ablate(vector(24), strength=0.0), "resid")]
    report = judged(
        Verification(bake(base, plan_of(base, nothing), tmp_path / "out"), base=str(base.path))
    )
    assert report.verdict == "inconclusive"
    with pytest.raises(Inconclusive, match="the edit has no effect") as caught:
        raise_unless_passed(report)
    assert caught.value.exit_code == 7


def test_a_changed_weight_fails(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama"))
    out = baked(base, tmp_path / "out")
    (shard,) = (s for s in out.glob("*.safetensors") if "model.norm.weight" in load_file(s))
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, shard, metadata={"format": "pt"})
    report = judged(Verification(out, base=str(base.path)))
    assert not report.passed
    with pytest.raises(BakeError) as caught:
        raise_unless_passed(report)
    assert caught.value.exit_code == 1
    assert "was changed after the export" in str(caught.value)


def test_a_wrong_fold_is_a_defect_with_its_own_exit_code(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    plan = plan_of(base, edits_of(base))
    report = judged(
        Verification(bake(base, replace(plan, biases=()), tmp_path / "out"), base=str(base.path))
    )
    with pytest.raises(ExactnessBug, match="the plan says EXACT") as caught:
        raise_unless_passed(report)
    assert caught.value.exit_code == 6


def test_another_base_is_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = base_at(tiny_checkpoint("llama"))
    other = tiny_checkpoint("llama", tied=True)
    out = bake(base, plan_of(base, edits_of(base)), tmp_path / "out")
    record = json.loads((out / "bake.json").read_text(encoding="utf-8"))
    record["base"]["digest"] = base.checkpoint.digest()
    (out / "bake.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match="is not the base that the artifact was made from"):
        judged(Verification(out, base=str(other)))
    assert judged(Verification(out, base=str(base.path))).passed


@pytest.mark.parametrize("content", ["", "{}", '{"kind": 1, "plan": [], "base": {}}', "[1]"])
def test_a_folder_without_a_record_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "bake.json").write_text(content)
    with pytest.raises(InputError, match="no artifact of bake"):
        judged(Verification(tmp_path))
