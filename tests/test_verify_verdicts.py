"""What passes and what does not: controls, files, nulling and approximate plans, interruptions."""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import programs
import pytest
import tiny
import torch
from harness import Base, bake, base_at, edit, plan_of, vector
from safetensors.torch import load_file, save_file
from test_verify import baked, edits_of, row

from bake import edits as make
from bake.checkpoints import open_checkpoint
from bake.checkpoints.hashes import sha256_of
from bake.checkpoints.planned import base_rows
from bake.errors import Inconclusive, InputError, UsageError, VerificationFailed
from bake.jobs.planned import judged
from bake.outputs.checkpoint import planned_model
from bake.verify import collect, moved, runner, store, verdict
from bake.verify.artifact import changed_files, open_baked
from bake.verify.controls import Control, Spoiling, groups_of, values
from bake.verify.judgement import raise_unless_passed
from bake.verify.metrics import compare_logits, largest_difference
from bake.verify.report import Report
from bake.verify.rows import Row
from bake.verify.runs import Trace
from bake.verify.store import QUESTION, Store
from bake.verify.verification import Verification


def rows(report: Report, group: str) -> dict[str, Row]:
    return {found.name: found for found in report.rows if found.group == group}


# --- controls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["F64", "BF16"])
def test_controls_of_every_kind_fail(
    dtype: torch.dtype, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A tied model with biases gives occasion for each way to break it, in any storage type."""
    base = base_at(tiny_checkpoint("llama", tied=True, square=True, dtype=dtype))
    report = judged(Verification(baked(base, tmp_path / "out"), base=str(base.path)))
    assert report.passed
    kinds = {"forgotten tensor", "flipped sign", "wrong axis", "forgotten bias"}
    plan, files = rows(report, "plan control"), rows(report, "files control")
    assert {name.split(", ")[1] for name in plan} == {*kinds, "tied head"}
    assert {name.split(", ")[1] for name in files} == {*kinds, "tied head", "wrong block"}
    assert f"control: plan, tied head, {base.layout.unembed.weight}" in plan
    assert len(plan) == 5 and len(files) == 5 * 2 + 1
    assert all(found.passed and found.value > 1e3 * found.limit for found in plan.values())
    assert all(found.passed and found.value > 1.5 for found in files.values())


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"attention_bias": False, "mlp_bias": False}), ("mistral", {})],
)
def test_a_bias_that_is_zero_is_no_control(
    family: str, options: dict[str, bool], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A Llama gets bias slots in every layer for one offset: all but one of them hold zeros."""
    base = base_at(tiny_checkpoint(family, dtype=torch.float32, **options))
    edits = [edit(base, "offset", make.offset(vector(base.layout.hidden)), ["resid_post.1"])]
    plan = plan_of(base, edits, allow=["recast"])
    assert sum(bias.is_zero() for bias in plan.biases) > 1
    out = bake(base, plan, tmp_path / "out", allow=frozenset({"recast"}))
    said: list[str] = []
    report = judged(Verification(out, base=str(base.path), remark=said.append))
    assert report.verdict == "passed", report.answers
    assert sum("control: forgotten bias" in line for line in said) == 1, "a zero was forgotten"
    (told,) = rows(report, "plan control").values()
    assert "forgotten bias" in told.name and told.value > 1e3 * told.limit


def test_an_expert_that_no_token_is_sent_to_is_no_control(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Of forty experts the first prompts reach a few: a mistake in another one cannot be seen.

    The first prompts are run among others once, and alone with a broken plan: prompts of several
    lengths, so that they are padded otherwise.
    """
    base = base_at(tiny_checkpoint("mixtral", num_local_experts=40, dtype=torch.float32))
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), ["mlp_out.*"])]
    out = bake(base, plan_of(base, edits), tmp_path / "out")
    prompts = [[5], [6, 7], list(range(1, 40)), list(range(2, 30))]
    said: list[str] = []
    asked = Verification(out, base=str(base.path), prompts=prompts, generate=0, remark=said.append)
    report = judged(asked)
    assert report.verdict == "passed", report.answers
    plan = rows(report, "plan control")
    assert all(found.passed for found in plan.values())
    # The effect: some were tried that nothing came of.
    assert sum("control: forgotten tensor" in line or "flipped" in line for line in said) > 2


def test_a_control_is_the_bake_that_it_says(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", tied=True, square=True))
    out = baked(base, tmp_path / "out")
    after, layout = open_checkpoint(out), base.layout
    planned = planned_model(plan_of(base, edits_of(base)), base.checkpoint).tensors
    writer, head, embed = layout.branches[0].writes[0], layout.unembed.weight, layout.embed
    name, bias = writer.weight, writer.bias.name

    def result(name: str, start: int, stop: int) -> torch.Tensor:
        found = after.read_rows(name, start, stop).double()
        return found.reshape(found.shape[0], -1)

    spoiling = Spoiling(
        planned, partial(base_rows, base.checkpoint, planned), result, (head, embed)
    )
    before, good = base.checkpoint.read(name), after.read(name)

    def broken(kind: str, tensor: str) -> torch.Tensor:
        return values(spoiling, Control(kind, tensor))()

    assert torch.equal(broken("forgotten tensor", name), before) and not torch.equal(before, good)
    assert torch.allclose(broken("flipped sign", name) - before, before - good)
    assert torch.allclose(broken("wrong axis", name) - before, (good - before).T)
    assert not torch.allclose(good - before, (good - before).T)
    assert torch.equal(broken("forgotten bias", bias), base.checkpoint.read(bias))
    assert torch.equal(broken("tied head", head), after.read(embed))
    shifted = broken("wrong block", name)
    assert torch.equal(shifted[0], good[0].roll(1)) and torch.equal(shifted[1:], good[1:])
    groups = groups_of(planned, base.checkpoint.tensors.__contains__, (head, embed), "sha256:0")
    again = groups_of(planned, base.checkpoint.tensors.__contains__, (head, embed), "sha256:0")
    assert groups == again
    assert {control.kind for group in groups for control in group} == {
        "forgotten tensor",
        "flipped sign",
        "wrong axis",
        "forgotten bias",
        "tied head",
        "wrong block",
    }


def test_a_control_that_is_not_told_makes_it_inconclusive() -> None:
    found = (
        Row("plan", 1e-12, 1e-9, True, "", "plan"),
        Row("control: flipped sign, w", 1e-12, 1e-9, False, "must be larger", "plan control"),
        Row("values", 0.0, 0.0, True, "", "files"),
        Row("control: w", 3.0, 1.0, True, "must be larger", "files control"),
    )
    report = Report("out", "base", "sha256:0", "exact", "F64", found, {})
    assert [answer.verdict for answer in report.answers] == ["inconclusive", "passed", "not asked"]
    with pytest.raises(Inconclusive, match="control: flipped sign, w") as caught:
        raise_unless_passed(report)
    assert caught.value.exit_code == 7
    # With a control that is told it passes, and with none at all it does not.
    told = (found[0], replace(found[1], value=1.0, passed=True), *found[2:])
    assert replace(report, rows=told).verdict == "passed"
    assert replace(report, rows=(found[0], *found[2:])).verdict == "inconclusive"
    # A limit that is missed is a failure, whatever else is open.
    missed = replace(found[2], value=1.0, passed=False)
    assert replace(report, rows=(*found[:2], missed, found[3])).verdict == "failed"


def test_one_wrong_value_is_found(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Two units in the last place of one value of one tensor, which no logit would show."""
    base = base_at(tiny_checkpoint("llama", dtype=torch.bfloat16))
    out = baked(base, tmp_path / "out")
    file = out / "model.safetensors"
    name = base.layout.branches[1].writes[0].weight
    for steps, held in ((0, True), (2, False)):
        tensors = load_file(file)
        value = tensors[name][3, 5]
        tensors[name][3, 5] = value * (1 + steps * 2.0**-7)
        save_file(tensors, file, metadata={"format": "pt"})
        record = json.loads((out / "bake.json").read_text(encoding="utf-8"))
        record["files"][file.name] = sha256_of(file)
        (out / "bake.json").write_text(json.dumps(record), encoding="utf-8")
        report = judged(Verification(out, base=str(base.path), generate=0))
        assert (report.answers[1].verdict == "passed") is held
        assert row(report, "files: values off the plan") == (0 if held else 1)
    # A tensor that the plan leaves alone is held to its bytes.
    tensors[base.layout.branches[1].reads[0].weight][0, 0] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    report = judged(Verification(out, base=str(base.path), generate=0))
    assert row(report, "files: tensors that were to stay") == 1


# --- files -------------------------------------------------------------------------------------


def test_the_floor_is_drawn_further_where_it_decides(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three draws for files that lose no more than they do, twelve for others; both are judged."""
    base = base_at(tiny_checkpoint("mixtral", dtype=torch.bfloat16))
    out = baked(base, tmp_path / "out")
    drawn: list[int] = []

    def counted(run: runner.Runner, number: int) -> Trace:
        drawn.append(number)
        return moved.moved(run, number)

    monkeypatch.setattr(collect, "moved", counted)
    sound = judged(Verification(out, base=str(base.path)))
    assert sound.passed and drawn == [0, 1, 2]
    drawn.clear()
    tensors = load_file(out / "model.safetensors")
    spoilt = {n: 1.05 * t if "q_proj" in n else t for n, t in tensors.items()}
    save_file(spoilt, out / "model.safetensors", metadata={"format": "pt"})
    report = judged(Verification(out, base=str(base.path)))
    (lost,) = [row for row in report.rows if row.name == verdict.LOST]
    assert drawn == list(range(12)) and lost.passed is False


def test_files_are_held_to_their_digests(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    out = baked(base, tmp_path / "out")
    assert changed_files(open_baked(out)) == ()
    (out / "notes.txt").write_text("a file that came later")
    assert changed_files(open_baked(out)) == ()
    (out / "generation_config.json").unlink()
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert set(changed_files(open_baked(out)) or ()) == {
        "generation_config.json",
        "model.safetensors",
    }
    record = json.loads((out / "bake.json").read_text(encoding="utf-8"))
    record["files"] = {"../secret": "0"}
    (out / "bake.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match=r"names the file \.\./secret, outside the artifact"):
        changed_files(open_baked(out))
    del record["files"]
    (out / "bake.json").write_text(json.dumps(record), encoding="utf-8")
    assert changed_files(open_baked(out)) is None


# --- plans that are not exact ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["F64", "BF16"])
@pytest.mark.parametrize("family", tiny.POST_NORM)
def test_a_nulling_plan_leaves_its_edit_nothing_to_do(
    family: str, dtype: torch.dtype, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint(family, dtype=dtype))
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), "resid")]
    plan = plan_of(base, edits, allow=["nulling"])
    out = bake(base, plan, tmp_path / "out", allow=frozenset({"nulling"}))
    report = judged(Verification(out, base=str(base.path)))
    assert report.exactness == "nulling"
    assert report.passed, report.rows
    fixed = next(found for found in report.rows if found.name.startswith("plan: max |h(x) − x|"))
    assert fixed.passed and fixed.value < 1e-9
    # The function is another one than the hooked one, and that is said, not judged.
    lost = next(found for found in report.rows if found.name.startswith("lost in storage"))
    assert lost.passed is None and 0 < lost.value < 1
    controls = rows(report, "plan control")
    assert len(controls) >= 2 and all(found.passed for found in controls.values())
    assert not any("tied head" in name for name in controls)


def test_a_relocated_plan_is_held_to_the_share_of_the_effect_that_it_loses(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    # One of 24 directions is much of what norms see; the constant makes the effect large beside it.
    edits = [
        edit(base, "affine", make.affine(vector(base.layout.hidden), alpha=2.0), "resid_mid.0")
    ]
    allow = frozenset({"relocate"})
    out = bake(base, plan_of(base, edits, allow=allow), tmp_path / "out", allow=allow)
    asked = Verification(out, base=str(base.path), generate=0)
    report = judged(asked)
    assert report.exactness == "relocated"
    share = row(report, "plan: KL(hooked ‖ not rounded)")
    assert 1e-3 < share < 0.01 and report.passed, report.rows
    assert not any(found.name.startswith("plan: not rounded") for found in report.rows)
    controls = rows(report, "plan control")
    assert len(controls) >= 3 and all(found.passed for found in controls.values())
    assert not judged(replace(asked, most_kl=share / 1.5)).passed
    # What loses no more of the edit than is allowed says nothing, if a broken plan does not either.
    blind = judged(replace(asked, most_kl=50.0))
    assert blind.verdict == "inconclusive"


def test_an_approximate_plan_is_held_to_the_number_that_is_asked_for(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.bfloat16))
    out = baked(base, tmp_path / "out")
    record = json.loads((out / "bake.json").read_text(encoding="utf-8"))
    record["plan"]["exactness"] = "approximate"
    (out / "bake.json").write_text(json.dumps(record), encoding="utf-8")
    report = judged(Verification(out, base=str(base.path), generate=0))
    share = row(report, "lost in storage")
    assert 0 < share < 0.05 and report.passed  # five per cent where nobody asks for another
    asked = Verification(out, base=str(base.path), generate=0, most_kl=2 * share)
    assert judged(asked).passed
    failed = judged(replace(asked, most_kl=share / 2))
    assert failed.answers[2].verdict == "failed"
    with pytest.raises(VerificationFailed, match="lost in storage"):
        raise_unless_passed(failed)
    # A number that the base model keeps as well says nothing.
    assert judged(replace(asked, most_kl=1.5)).verdict == "inconclusive"


# --- numbers -----------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    """Two tokens of two logits: log 1/4 and log 3/4 against even odds, and no difference."""
    third = torch.tensor(3.0).log().double()
    reference = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    other = torch.stack([torch.stack([torch.zeros_like(third), third]), reference[1]])
    both = compare_logits(
        reference,
        {"other": other, "same": reference},
        hidden={"other": (reference, other.flip(1)), "same": (reference + 1, reference + 1)},
    )
    found = both["other"]
    numbers = found.metrics
    assert numbers.max_dlogit == pytest.approx(float(third))
    assert numbers.mean_dlogit == pytest.approx(float(third) / 4)
    assert numbers.max_dlogprob == pytest.approx(0.6931471805599453)  # ½ against ¼
    # ½ log(½ / ¼) + ½ log(½ / ¾)
    assert found.kl == pytest.approx((0.14384103622589045, 0.0))
    assert numbers.mean_kl == pytest.approx(0.14384103622589045 / 2)
    assert numbers.same_top == 0.5
    assert largest_difference(reference, other) == numbers.max_dlogit
    same = both["same"].metrics
    assert (same.max_dlogit, same.max_kl, same.same_top) == (0.0, 0.0, 1.0)
    assert same.cosine == pytest.approx(1.0)


def test_leaks_vanish_where_the_direction_is_ablated(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama"))
    edits = [edit(base, "ablate", make.ablate(vector(24)), ["attn_out.*", "mlp_out.1"], "mood")]
    report = judged(
        Verification(bake(base, plan_of(base, edits), tmp_path / "out"), base=str(base.path))
    )
    cells = {(leak["writer"], leak["layer"]): leak for leak in report.leaks}
    assert set(cells) == {("attn", 0), ("attn", 1), ("attn", 2), ("mlp", 1)}
    for leak in report.leaks:
        assert leak["concept"] == "mood"
        assert leak["before"] > 0.01
        assert leak["after"] < 1e-12


def test_what_an_affine_edit_sets_is_no_leak(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The component that every token is given is told from one that depends on the token."""
    base = base_at(tiny_checkpoint("llama"))
    edits = [edit(base, "affine", make.affine(vector(24), alpha=0.5), ["attn_out.1"], "mood")]
    out = bake(base, plan_of(base, edits), tmp_path / "out")
    (leak,) = judged(Verification(out, base=str(base.path))).leaks
    size = 0.5 * float(vector(24).norm())
    assert leak["after"] == pytest.approx(size) and leak["constant"] == pytest.approx(size)
    assert 0.01 < leak["before"] < 0.9 * size


def test_the_floor_and_the_effect_are_beside_every_layer(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.bfloat16))
    report = judged(Verification(baked(base, tmp_path / "out"), base=str(base.path), generate=4))
    sites = report.layers["sites"]
    assert sites == ["resid_pre.0", "resid_pre.1", "resid_pre.2", "resid_post.2"]
    columns = (report.layers[k] for k in ("effect", "plan, not rounded", "stored in bfloat16"))
    for effect, error, stored in zip(*columns, strict=True):
        # A bfloat16 has 8 bits: what it loses is about 2⁻⁶ of the effect, and the plan nothing.
        assert error < 1e-9 * effect
        assert 1e-6 * effect < stored < effect / 10
    assert 0 <= row(report, "same greedy tokens") <= 1
    assert len(report.kl) == report.prompts["tokens"] + report.prompts["answers"]
    assert report.prompts["answers"] == 4 * report.prompts["prompts"]
    assert report.prompts["source"] == "random"
    assert 0 < report.timing["forward"] < report.timing["total"]


# --- interruptions -----------------------------------------------------------------------------


def test_an_interrupted_verification_is_taken_up(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    out, kept = baked(base, tmp_path / "out"), tmp_path / "kept"
    whole = judged(Verification(out, base=str(base.path), generate=3))
    real, runs = runner.run, []

    def interrupting(*args: object, **options: object) -> object:
        if len(runs) == 5:
            raise KeyboardInterrupt
        runs.append(args)
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "WORTH_KEEPING", 0.0)
    monkeypatch.setattr(runner, "run", interrupting)
    with pytest.raises(KeyboardInterrupt):
        judged(Verification(out, base=str(base.path), generate=3, resume=kept))
    assert len(list(kept.glob("*.safetensors"))) == 5 + 2  # and two texts
    monkeypatch.setattr(runner, "run", lambda *a, **o: runs.append(a) or real(*a, **o))
    done: list[str] = []
    report = judged(
        Verification(out, base=str(base.path), generate=3, resume=kept, remark=done.append)
    )
    assert "base model in float64" not in done and "stored model in float32" in done
    assert [(a.name, a.value) for a in report.rows] == [(b.name, b.value) for b in whole.rows]
    assert report.layers == whole.layers
    for ours, theirs in zip(report.leaks, whole.leaks, strict=True):
        # One product over tensors at other addresses may round its last bit otherwise.
        assert ours["after"] == pytest.approx(theirs["after"], rel=1e-6)
    assert not kept.exists()


def test_a_run_of_a_moment_is_made_again(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is the test above, where everything is worth keeping."""
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    out, kept = baked(base, tmp_path / "out"), tmp_path / "kept"

    def interrupted(*args: object, **options: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judged(Verification(out, base=str(base.path), generate=3, resume=kept))
    assert kept.is_dir() and not list(kept.glob("*.safetensors"))


KILLED = """
import os, signal, sys
from pathlib import Path
from bake.verify import collect, moved, runner, store, verdict
from bake.jobs.planned import judged
from bake.verify.verification import Verification
real, runs = runner.run, []
def run(*args, **options):
    if len(runs) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    runs.append(args)
    return real(*args, **options)
runner.run, store.WORTH_KEEPING = run, 0.0
judged(Verification(Path(sys.argv[1]), base=sys.argv[2], streamed=sys.argv[4] == "True",
                    generate=0, resume=Path(sys.argv[3])))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
@pytest.mark.parametrize("streamed", [False, True])
def test_a_verification_that_was_killed_is_taken_up(
    streamed: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    out, kept = baked(base, tmp_path / "out"), tmp_path / "kept"
    arguments = [str(out), str(base.path), str(kept), str(streamed)]
    done = programs.run(KILLED, *arguments)
    assert done.returncode == -signal.SIGKILL
    assert len(list(kept.glob("*.safetensors"))) == 4
    said: list[str] = []
    options = {"base": str(base.path), "streamed": streamed, "generate": 0}
    report = judged(Verification(out, resume=kept, remark=said.append, **options))  # type: ignore[arg-type]
    assert "base model in float64" not in said and "stored model in float32" in said
    whole = judged(Verification(out, **options))  # type: ignore[arg-type]
    assert [(a.name, a.value) for a in report.rows] == [(b.name, b.value) for b in whole.rows]
    assert report.passed and not kept.exists()


def test_a_run_that_was_cut_short_on_disk_is_run_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "kept", {})
    store.save("a", {"x": torch.ones(200)}, 60.0)
    (file,) = (tmp_path / "kept").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert store.load("a") is None
    # Another verification of the same artifact ends first, and clears the folder.
    Store(tmp_path / "kept", {}).clear()
    store.save("b", {"x": torch.ones(2)}, 60.0)
    assert store.load("b") is not None
    store.clear()
    store.clear()
    assert not (tmp_path / "kept").exists()


def test_another_question_starts_anew(tmp_path: Path) -> None:
    store = Store(tmp_path / "kept", {"prompts": 1})
    store.save("a", {"x": torch.ones(2)}, 60.0)
    found = Store(tmp_path / "kept", {"prompts": 1}).load("a")
    assert found is not None and found[1] == 60.0
    assert Store(tmp_path / "kept", {"prompts": 2}).load("a") is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        Store(tmp_path / "other", {})
    assert (tmp_path / "other" / "letter.txt").exists()
    assert not (tmp_path / "other" / QUESTION).exists()


def test_a_model_too_large_for_memory_is_streamed(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What holds copies of files is to be had: a machine that reads much has little free."""
    from bake.verify import memory as module

    base: Base = base_at(tiny_checkpoint("llama", dtype=torch.float32))
    need = -(-16 * sum(p.numel() for p in base.model.parameters()) >> 10)
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(module, "MEMINFO", meminfo)
    said: list[str] = []
    out = baked(base, tmp_path / "out")
    asked = Verification(out, base=str(base.path), remark=said.append)
    meminfo.write_text(f"MemTotal: {9 * need} kB\nMemFree: 1 kB\nMemAvailable: {need - 1} kB\n")
    report = judged(asked)
    assert report.passed and "one block" in report.environment["device"]
    assert sum("no greedy text: the model in float64 takes" in line for line in said) == 1
    assert not any(line.startswith("greedy") for line in said)
    said.clear()
    meminfo.write_text(f"MemTotal: {9 * need} kB\nMemFree: 1 kB\nMemAvailable: {need} kB\n")
    report = judged(asked)
    assert report.passed and report.environment["device"] == "cpu"
    assert any(line.startswith("greedy") for line in said)
    meminfo.unlink()
    assert not module.too_large(base.checkpoint)  # a system that does not say
