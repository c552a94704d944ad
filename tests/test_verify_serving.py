"""The artifact in a runtime's own process: passed, failed or missed, and never confused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from exporting import written
from harness import Base, bake, base_at, edit, plan_of, vector
from safetensors.torch import load_file, save_file
from test_verify import baked, edits_of, row

from bake import edits as make
from bake.cli import main
from bake.errors import UsageError, VerificationFailed
from bake.jobs.planned import judged
from bake.process import RuntimeFailed, RuntimeMissing, find, run_script
from bake.verify import serving
from bake.verify.agreement import agreement
from bake.verify.judgement import raise_unless_passed
from bake.verify.report import Report
from bake.verify.rows import Row
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.hf import TRANSFORMERS
from bake.verify.runtimes.registry import RUNTIMES, Runtimes
from bake.verify.runtimes.request import RuntimeRequest
from bake.verify.served_rows import ServedRun
from bake.verify.target import Target
from bake.verify.verification import Verification

HERE = Runtimes(("transformers",), {"transformers": Path(sys.executable)})


@pytest.fixture
def base(tiny_checkpoint: Callable[..., Path]) -> Base:
    return base_at(tiny_checkpoint("llama", dtype=torch.float32))


def test_an_interpreter_of_its_own_answers_as_the_model_does(base: Base, own_process: None) -> None:
    """What the forks of the other tests leave out: how bake starts it, and what it has then."""
    prompts = ((3, 9, 4), (5, 6, 7, 8))
    asked = RuntimeRequest(base.path, prompts, 2, tiny.CONFIGS["llama"]["vocab_size"], "float32")
    answered = ask(TRANSFORMERS, asked, Path(sys.executable))
    assert all(len(text) == 2 for text in answered.greedy)
    for prompt, served in zip(prompts, answered.prompt_logprobs, strict=True):
        with torch.no_grad():
            table = base.model(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)
        wrong = (torch.from_numpy(served) - table).abs()
        assert float(wrong.max()) < 1e-5
        assert float((torch.from_numpy(served[1:]) - table[:-1]).abs().max()) > 0.1  # the control


def test_transformers_in_its_own_process_serves_the_hooked_function(
    base: Base, tmp_path: Path
) -> None:
    out = baked(base, tmp_path / "out")
    report = judged(Verification(out, base=str(base.path), runtimes=HERE, generate=0))
    assert report.passed
    (record,) = report.runtimes
    assert (record["runtime"], record["status"]) == ("transformers", "passed")
    found = next(r for r in report.rows if r.name.startswith("transformers: lost when served"))
    assert found.passed and found.value <= found.limit < 1e-3
    texts = next(r for r in report.rows if r.name.startswith("transformers: texts that part"))
    assert texts.passed
    controls = [r for r in report.rows if r.name.startswith("transformers: control")]
    assert len(controls) == 2 and all(r.passed and r.value > 0.9 for r in controls)
    floor = next(r for r in report.rows if r.name.startswith("transformers: floor"))
    assert 0 <= floor.value < 1e-6

    # Whoever makes the published numbers again need not have the publisher's runtimes.
    content = json.loads(json.dumps(report.to_json()))
    alone = judged(Verification(out, base=str(base.path), generate=0))
    found = agreement(content, alone)
    assert found.problems == ()
    assert "not measured here (--runtime): transformers: lost when served" in found.notes[0]
    # A control of the checkpoint itself has to be there.
    lost = replace(alone, rows=tuple(r for r in alone.rows if "flipped sign" not in r.name))
    assert any("flipped sign" in text for text in agreement(content, lost).problems)


def test_a_wrong_bake_fails_in_the_runtime(base: Base, tmp_path: Path) -> None:
    plan = plan_of(base, edits_of(base))
    out = bake(base, replace(plan, biases=()), tmp_path / "out")
    report = judged(Verification(out, base=str(base.path), runtimes=HERE, generate=0))
    (record,) = report.runtimes
    assert record["status"] == "failed"
    found = next(r for r in report.rows if r.name.startswith("transformers: lost when served"))
    assert found.passed is False and found.value > 10 * found.limit


def test_a_runtime_that_is_not_there_is_missed_before_anything_is_run(
    base: Base, tmp_path: Path
) -> None:
    """Neither passed nor failed, and the command says so with its exit code."""
    out, said, absent = baked(base, tmp_path / "out"), list[str](), tmp_path / "no-python"
    for runtimes, words in (
        (Runtimes(("vllm",), {"vllm": absent}), "is no Python interpreter"),
        (Runtimes(("transformers", "vllm"), {"vllm": absent}), "is no Python interpreter"),
        (Runtimes(("vllm",)), "vLLM is not installed in the environment of"),
    ):
        asked = Verification(out, base=str(base.path), runtimes=runtimes, remark=said.append)
        with pytest.raises(RuntimeMissing, match=words):
            judged(asked)
    assert said == []
    arguments = ["verify", str(out), "--base", str(base.path), "--generate", "0", "--no-plots"]
    named = ["--runtime", "vllm", "--python", f"vllm={absent}"]
    result = CliRunner().invoke(main, [*arguments, *named])
    assert result.exit_code == 4
    assert "is no Python interpreter" in " ".join(result.stderr.split())
    assert not (out / "verify.json").exists()
    # The control: one that is there is run.
    judged(Verification(out, base=str(base.path), runtimes=HERE, generate=0, remark=said.append))
    assert any("transformers serves the artifact" in line for line in said)


def test_another_version_than_a_worker_is_for_is_missed() -> None:
    """What calls functions that a package promises nobody is held to the one version."""
    have = version("numpy")
    find("it", Path(sys.executable), ("numpy", f"numpy=={have}"))
    with pytest.raises(RuntimeMissing, match="it is not installed") as caught:
        find("it", Path(sys.executable), ("numpy==0.1",))
    assert f"numpy {have} is installed, and 0.1 is wanted" in str(caught.value)
    pinned = (Path(__file__).parent / "runtimes" / "llamacpp-requirements.txt").read_text()
    assert set(RUNTIMES["llama.cpp"].packages[1:]) <= set(pinned.splitlines())


@pytest.mark.parametrize(
    ("own", "said", "count"),
    [
        (None, "3", 3),
        (None, "2,4", 2),
        ("", "", None),
        (None, None, None),
        ("5", "3", 5),
        ("5", None, 5),
    ],
)
def test_llama_cpp_is_told_how_many_threads_there_are(
    own: str | None, said: str | None, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bake.verify.runtimes import _llamacpp_worker as worker

    for name, value in (("LLAMA_ARG_THREADS", own), ("OMP_NUM_THREADS", said)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert worker.threads() == (count or os.cpu_count())


def test_runtimes_are_found_before_anything_is_measured(tmp_path: Path) -> None:
    here, script = Path(sys.executable), Path(__file__)
    Runtimes(("transformers",), {"transformers": here}).find("checkpoint")
    Runtimes(("peft",)).find("lora")
    for name, kind in (("vllm", "lora"), ("llama.cpp", "gguf")):
        with pytest.raises(RuntimeMissing, match="is not installed in the environment of"):
            Runtimes((name,), {name: here}, script).find(kind)
    with pytest.raises(RuntimeMissing, match="is no Python interpreter"):
        Runtimes(("transformers", "vllm"), {"vllm": tmp_path / "python"}).find("checkpoint")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no library >&2\nexit 127\n")
    broken.chmod(0o755)
    with pytest.raises(RuntimeMissing, match="no library"):
        Runtimes(("vllm",), {"vllm": broken}).find("checkpoint")


def test_a_converter_is_found_where_one_is_needed(tmp_path: Path) -> None:
    """A stand-in for an environment with llama.cpp; a GGUF file needs no converter."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    pythons = {"llama.cpp": python}
    Runtimes(("llama.cpp",), pythons).find("gguf")
    for kind in ("checkpoint", "merge", "gguf-lora", "control-vector"):
        Runtimes(("llama.cpp",), pythons, Path(__file__)).find(kind)
        with pytest.raises(RuntimeMissing, match="no converter was named"):
            Runtimes(("llama.cpp",), pythons).find(kind)
        with pytest.raises(RuntimeMissing, match="there is no converter at"):
            Runtimes(("llama.cpp",), pythons, tmp_path / "convert.py").find(kind)


def test_a_runtime_that_crashes_has_failed(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = baked(base, tmp_path / "out")
    broken = tmp_path / "python"
    # It has the packages that are asked for with -c, and fails with the worker.
    broken.write_text('#!/bin/sh\n[ "$2" = -c ] && exit 0\necho boom >&2\nexit 3\n')
    broken.chmod(0o755)
    runtimes = Runtimes(("transformers",), {"transformers": broken})
    report = judged(Verification(out, base=str(base.path), runtimes=runtimes, generate=0))
    assert not report.passed
    assert report.runtimes[0]["status"] == "failed"
    assert "exit status 3" in report.runtimes[0]["reason"]


def test_runtimes_are_asked_for_what_they_load() -> None:
    with pytest.raises(UsageError, match="peft loads no checkpoint") as caught:
        Runtimes(("peft",)).check("checkpoint")
    assert "transformers, vllm, llama.cpp" in str(caught.value)
    with pytest.raises(UsageError, match="there is no runtime 'sglang'"):
        Runtimes(("sglang",)).check("checkpoint")
    Runtimes(("peft", "vllm")).check("lora")


def test_an_adapter_is_verified_in_a_runtime(base: Base, tmp_path: Path) -> None:
    out = baked(base, tmp_path / "out")
    record = json.loads((out / "bake.json").read_text(encoding="utf-8"))
    record["kind"] = "control-vector"
    (out / "bake.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UsageError, match="is verified in a runtime that loads it") as caught:
        judged(Verification(out, base=str(base.path)))
    assert "llama.cpp" in str(caught.value)
    with pytest.raises(UsageError, match="vllm loads no control-vector"):
        judged(Verification(out, base=str(base.path), runtimes=Runtimes(("vllm",))))


def test_options_of_runtimes_that_name_none_are_refused(base: Base, tmp_path: Path) -> None:
    out = baked(base, tmp_path / "out")
    for option in (["--python", "python"], ["--converter", "convert_hf_to_gguf.py"]):
        result = CliRunner().invoke(main, ["verify", str(out), *option])
        assert result.exit_code == 2
        assert f"{option[0]} is for a runtime" in result.stderr
    result = CliRunner().invoke(
        main, ["verify", str(tmp_path), "--runtime", "vllm", "--python", "sglang=/bin/python"]
    )
    assert result.exit_code == 2
    assert "--python names the runtime 'sglang'" in result.stderr


# --- adapters: what no checkpoint's bench sees --------------------------------------------------

PEFT = Runtimes(("peft",), {"peft": Path(sys.executable)})


@pytest.fixture(scope="module")
def adapted(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Base, Path]:
    """A base without biases and a LoRA of an ablation: read it, never write to it."""
    base = base_at(tiny_checkpoint("mistral", dtype=torch.float32))
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), ["attn_out.*"])]
    record = {"base": {"model": str(base.path)}}
    out = tmp_path_factory.mktemp("adapted") / "out"
    return base, written("lora", plan_of(base, edits), base.checkpoint, out, record=record).path


def group(report: Report, name: str) -> dict[str, Row]:
    return {row.name: row for row in report.rows if row.group == name}


def test_an_adapter_has_floor_effect_and_controls_in_its_runtime(
    adapted: tuple[Base, Path],
) -> None:
    base, out = adapted
    report = judged(Verification(out, base=str(base.path), runtimes=PEFT))
    assert report.passed, report.rows
    assert [answer.verdict for answer in report.answers] == ["passed"] * 3
    # What base and factors make together is the planned weight, and broken factors are told.
    assert row(report, "files: values off the plan") == 0
    told = group(report, "files control")
    assert {name.split(", ")[1] for name in told} >= {"forgotten tensor", "flipped sign"}
    controls = group(report, "cost control")
    assert list(controls) == [
        "peft: control: nothing edited, share lost",
        "peft: control: served without the edit, share lost",
    ]
    for found in (*told.values(), *controls.values()):
        assert found.passed and found.limit is not None and found.value > 10 * found.limit, found
    # Without the adapter the engine serves the base: how far that is off is the engine's own floor.
    assert 0 <= row(report, "peft: floor: base served") < 1e-6
    metrics = report.metrics["peft"]
    assert 0 <= metrics["mean_kl"] < 1e-8 < report.metrics["effect"]["mean_kl"]
    assert metrics["same_top"] == 1.0
    assert len(report.kl) == len(report.kl_effect) == report.runtimes[0]["tokens"]
    assert report.headline.lost == report.runtimes[0]["lost"]


def test_a_spoiled_adapter_fails(adapted: tuple[Base, Path], tmp_path: Path) -> None:
    base, sound = adapted
    out = tmp_path / "out"
    shutil.copytree(sound, out)
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: -tensors[name]}, file, metadata={"format": "pt"})
    report = judged(Verification(out, base=str(base.path), runtimes=PEFT))
    assert [record["status"] for record in report.runtimes] == ["failed"]
    assert [answer.verdict for answer in report.answers] == ["passed", "failed", "failed"]
    with pytest.raises(VerificationFailed):
        raise_unless_passed(report)


def test_prompts_of_an_adapter_are_in_the_bases_tokens(
    tmp_path: Path,
) -> None:
    folder = Path(__file__).parents[1] / "recipes" / "quickstart" / "model"
    base = base_at(folder)
    at = ["attn_out.*", "mlp_out.*"]
    edits = [edit(base, "ablate", make.ablate(vector(base.layout.hidden)), at)]
    record = {"base": {"model": str(base.path)}}
    out = written(
        "lora", plan_of(base, edits), base.checkpoint, tmp_path / "out", record=record
    ).path
    texts = tmp_path / "texts.txt"
    texts.write_text("Once upon a time\nThe cat sat down.\n")
    report = judged(Verification(out, base=str(base.path), runtimes=PEFT, prompts=texts))
    assert report.passed, report.rows
    assert (report.prompts["source"], report.prompts["prompts"]) == ("texts.txt", 2)
    result = CliRunner().invoke(
        main,
        ["verify", str(out), "--base", str(folder), "--runtime", "peft", "--no-plots",
         "--prompts", str(tmp_path / "absent.txt")],
    )  # fmt: skip
    assert result.exit_code == 4
    assert "the prompts cannot be read" in result.stderr


def test_an_approximate_adapter_is_held_to_its_number(
    adapted: tuple[Base, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sound = adapted
    out = tmp_path / "out"
    shutil.copytree(sound, out)
    record = json.loads((out / "bake.json").read_text(encoding="utf-8"))
    record["plan"]["exactness"] = "approximate"
    (out / "bake.json").write_text(json.dumps(record), encoding="utf-8")

    def run(name: str, asked: Runtimes, target: Target, unedited: int) -> ServedRun:
        """A runtime that answers a tenth of the way from the hooked model to the base."""
        mixed = 0.9 * target.hooked + 0.1 * target.base
        few = target.first(1)
        return ServedRun("0", {}, target.greedy.tokens, mixed, few.base, 1)

    monkeypatch.setattr(serving, "_run", run)
    asked = Verification(out, base=str(base.path), runtimes=PEFT, prompts=[(3, 4, 5, 6)])
    share = judged(asked).runtimes[0]["lost"]
    assert 0.001 < share < 0.1
    for factor, status in ((2, "passed"), (0.5, "failed")):
        again = judged(replace(asked, most_kl=factor * share))
        assert again.runtimes[0]["status"] == status


def test_options_that_an_adapter_would_ignore_are_refused(adapted: tuple[Base, Path]) -> None:
    base, out = adapted
    for option in (["--score", "contains:a"],):
        asked = ["verify", str(out), "--base", str(base.path), "--runtime", "peft", *option]
        result = CliRunner().invoke(main, asked)
        assert result.exit_code == 2, result.output
        assert f"{option[0]} is for checkpoints" in result.stderr
        assert not (out / "verify.json").exists()


# --- processes ---------------------------------------------------------------------------------

PARENT = """
import sys
from pathlib import Path
from bake.process import run_script
folder = Path(sys.argv[1])
run_script("a runtime", Path(sys.executable), ["-I", folder / "child.py"], folder=folder,
           timeout=600, variables={})
"""
CHILD = """
import os, time
from pathlib import Path
Path("pid.new").write_text(str(os.getpid()))
Path("pid.new").rename("pid")
time.sleep(600)
"""


def running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_runtime_does_not_outlive_the_verification(sent: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stderr=subprocess.DEVNULL
    )
    wait_until((tmp_path / "pid").is_file)
    child = int((tmp_path / "pid").read_text())
    assert child != parent.pid and running(child)
    parent.send_signal(sent)
    assert parent.wait(30) != 0
    wait_until(lambda: not running(child))


def test_a_runtime_is_found_by_name_and_by_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "tool"
    script.write_text("#!/bin/sh\nexit 0\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "elsewhere").mkdir()
    for name in ("tool", "./tool", script):
        run_script("it", Path(name), [], folder=tmp_path / "elsewhere", timeout=60, variables={})
    script.write_text("no program")
    with pytest.raises(RuntimeFailed):
        run_script("it", script, [], folder=tmp_path, timeout=60, variables={})
