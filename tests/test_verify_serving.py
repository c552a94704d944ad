"""The artifact in a runtime's own process: passed, failed, or not run, and never confused."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from harness import Base, bake, base_at, plan_of
from test_verify import baked, edits_of

from bake.cli import main
from bake.errors import UsageError
from bake.verify import serving
from bake.verify.artifact import open_baked
from bake.verify.compare import compare
from bake.verify.serving import Runtimes, target_of

HERE = Runtimes(("transformers",), {"transformers": Path(sys.executable)})


@pytest.fixture
def base(tiny_checkpoint: Callable[..., Path]) -> Base:
    return base_at(tiny_checkpoint("llama", dtype=torch.float32))


def test_transformers_in_its_own_process_serves_the_hooked_function(
    base: Base, tmp_path: Path
) -> None:
    out = baked(base, tmp_path / "out")
    report = compare(out, base=str(base.path), runtimes=HERE, generate=0)
    assert report.passed
    (record,) = report.runtimes
    assert (record["runtime"], record["status"]) == ("transformers", "passed")
    found = next(r for r in report.rows if r.name.startswith("transformers: max |Δlog p|"))
    assert found.passed and found.value <= 1e-4
    target = target_of(open_baked(out), base.checkpoint, base.layout, [(3, 4, 5)])
    assert target.effect > 100 * target.limit


def test_a_wrong_bake_fails_in_the_runtime(base: Base, tmp_path: Path) -> None:
    plan = plan_of(base, edits_of(base))
    out = bake(base, replace(plan, biases=()), tmp_path / "out")
    report = compare(out, base=str(base.path), runtimes=HERE, generate=0)
    (record,) = report.runtimes
    assert record["status"] == "failed"
    found = next(r for r in report.rows if r.name.startswith("transformers: max |Δlog p|"))
    assert found.passed is False and found.value > 10 * found.limit


def test_a_runtime_that_is_not_there_is_not_run(base: Base, tmp_path: Path) -> None:
    """Neither passed nor failed, and the command says so with its exit code."""
    out = baked(base, tmp_path / "out")
    absent = tmp_path / "no-python"
    runtimes = Runtimes(("vllm", "llama.cpp"), {"vllm": absent})
    report = compare(out, base=str(base.path), runtimes=runtimes, generate=0)
    assert [record["status"] for record in report.runtimes] == ["not run", "not run"]
    assert "is no Python interpreter" in report.runtimes[0]["reason"]
    assert "no converter was named" in report.runtimes[1]["reason"]
    assert not any(row.group == "runtime" for row in report.rows)
    arguments = ["verify", str(out), "--base", str(base.path), "--generate", "0", "--no-plots"]
    asked = ["--runtime", "vllm", "--python", f"vllm={absent}"]
    result = CliRunner().invoke(main, [*arguments, *asked])
    assert result.exit_code == 4
    assert "not run: vllm" in result.stderr
    data = json.loads((out / "verify.json").read_text(encoding="utf-8"))
    assert data["runtimes"][0]["status"] == "not run"


def test_a_runtime_that_crashes_has_failed(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = baked(base, tmp_path / "out")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho boom >&2\nexit 3\n")
    broken.chmod(0o755)
    runtimes = Runtimes(("transformers",), {"transformers": broken})
    report = compare(out, base=str(base.path), runtimes=runtimes, generate=0)
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
        compare(out, base=str(base.path))
    assert "llama.cpp" in str(caught.value)
    with pytest.raises(UsageError, match="vllm loads no control-vector"):
        compare(out, base=str(base.path), runtimes=Runtimes(("vllm",)))


def test_options_of_runtimes_that_name_none_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["verify", str(tmp_path), "--runtime", "vllm", "--python", "sglang=/bin/python"]
    )
    assert result.exit_code == 2
    assert "--python names the runtime 'sglang'" in result.stderr


def test_quantised_files_are_measured_and_not_judged(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    for name, kind in (("q.gguf", "Q8_0"), ("f.gguf", "F16")):
        folder = tmp_path / kind
        (folder / "bake").mkdir(parents=True)
        writer = gguf.GGUFWriter(folder / name, "llama")
        wanted = gguf.GGMLQuantizationType[kind]
        values = gguf.quants.quantize(np.ones((2, 32), dtype=np.float32), wanted)
        writer.add_tensor("w", values, raw_dtype=wanted)
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        artifact = serving.Baked(folder, {"kind": "gguf"}, ())
        assert serving._quantised(artifact) is (kind == "Q8_0")
