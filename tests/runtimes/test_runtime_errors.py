"""What a request may hold, and how a runtime that is missing, fails or hangs is reported.

These tests need no runtime: the programs are this Python's own, so they run by default.
"""

import ast
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bake.converter import convert
from bake.errors import CheckpointError, UsageError
from bake.process import RuntimeFailed, RuntimeMissing, run_script
from bake.verify.runtimes import exchange
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.llamacpp import LLAMA_CPP
from bake.verify.runtimes.registry import RUNTIMES
from bake.verify.runtimes.request import RuntimeRequest
from bake.verify.runtimes.runtime import Runtime
from bake.verify.runtimes.vllm import VLLM

PYTHON = Path(sys.executable)


def request(model: Path, **changes: object) -> RuntimeRequest:
    fields = {
        "model": model,
        "prompts": ((1, 2, 3), (4,)),
        "max_new_tokens": 2,
        "vocab_size": 5,
        "dtype": "float32",
    }
    return RuntimeRequest(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "at least one prompt"),
        ({"prompts": ((1,), ())}, "every prompt a token"),
        ({"prompts": ((1, 5),)}, "token 5 is outside the vocabulary of 5"),
        ({"prompts": ((-1,),)}, "token -1 is outside the vocabulary of 5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"dtype": "float64"}, "dtype is 'float64', and has to be one of float32"),
    ],
)
def test_request_that_no_runtime_can_serve(changes: dict[str, object], message: str) -> None:
    assert request(Path("model"))  # the control: unchanged, it is good
    with pytest.raises(UsageError, match=message):
        request(Path("model"), **changes)


def test_model_of_the_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vLLM reads a checkpoint folder"):
        ask(VLLM, request(tmp_path), PYTHON)
    with pytest.raises(CheckpointError, match=r"llama\.cpp reads a GGUF file"):
        ask(LLAMA_CPP, request(tmp_path), PYTHON)
    with pytest.raises(CheckpointError, match="the converter reads a checkpoint folder"):
        convert(tmp_path, tmp_path / "out.gguf", converter=Path(__file__), python=PYTHON)


def checkpoint(folder: Path) -> Path:
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.gguf").write_bytes(b"GGUF")
    return folder


def test_runtime_that_is_not_installed(tmp_path: Path) -> None:
    """This test's own environment has neither runtime."""
    folder = checkpoint(tmp_path)
    with pytest.raises(RuntimeMissing, match="vLLM is not installed in the environment of") as lost:
        ask(VLLM, request(folder), PYTHON)
    assert "No module named 'vllm'" in str(lost.value)
    assert "fix: install numpy, torch, transformers, vllm there, or name another" in str(lost.value)
    with pytest.raises(RuntimeMissing, match=r"llama\.cpp is not installed in the environment of"):
        ask(LLAMA_CPP, request(folder / "model.gguf"), PYTHON)
    with pytest.raises(RuntimeMissing, match="is no Python interpreter"):
        ask(VLLM, request(folder), tmp_path / "bin" / "python")


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=lambda runtime: runtime.name)
def test_a_runtime_is_made_of_what_its_worker_imports(runtime: Runtime) -> None:
    """Otherwise one that is not installed would start, and read as one that failed."""
    source = Path(exchange.__file__).with_name(runtime.worker).read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    imported = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    # transformers and PEFT share a worker, and only an adapter needs PEFT.
    named = {package.partition("==")[0] for package in runtime.packages}
    assert imported == {*named, *({"peft"} & imported)}


def run(folder: Path, source: str, *, timeout: float = 60.0) -> None:
    script = folder / "program.py"
    script.write_text(source, encoding="utf-8")
    run_script(
        "the program",
        PYTHON,
        ["-I", script],
        folder=folder,
        timeout=timeout,
        variables={"BAKE_TEST": "passed"},
    )


def test_program_that_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("BAKE_INHERITED", "yes")
    run(tmp_path, "import json, os; json.dump(dict(os.environ), open('seen.json', 'w'))")
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    assert seen["BAKE_TEST"] == "passed"
    assert seen["BAKE_INHERITED"] == "yes"
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert "PYTHONPATH" not in seen


def test_program_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailed) as failure:
        run(tmp_path, "for i in range(40): print('line', i, flush=True)\nraise ValueError('no')")
    text = str(failure.value)
    assert text.startswith("the program failed with exit status 1\n  why: its output ends with\n")
    assert text.endswith("ValueError: no")
    assert "line 39" in text
    assert "line 5\n" not in text
    assert failure.value.exit_code == 1


def test_program_that_crashes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailed, match=r"failed with signal SIGABRT\n.*it printed nothing"):
        run(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGABRT)")


def test_program_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    source = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path('child.txt').write_text(str(child.pid))\n"
        "print('started', flush=True)\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(RuntimeFailed, match=r"the program was killed after 2 s[\s\S]*started"):
        run(tmp_path, source, timeout=2.0)
    child = int((tmp_path / "child.txt").read_text())
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def answer(folder: Path, *, rows: int = 3, value: float = -1.0, tokens: int = 2) -> None:
    """Write what a worker would for `request`."""
    tables = {"prompt_0": np.full((rows, 5), value, np.float32), "prompt_1": np.ones((1, 5), "f4")}
    np.savez(folder / "logprobs.npz", **tables)
    result = {"version": "1", "greedy": [[0] * tokens] * 2, "environment": {"python": "3"}}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def test_answer_is_checked_against_the_request(tmp_path: Path) -> None:
    answer(tmp_path)
    result = exchange.read("it", request(tmp_path), tmp_path)
    assert result.greedy == ((0, 0), (0, 0))
    assert [table.shape for table in result.prompt_logprobs] == [(3, 5), (1, 5)]
    answer(tmp_path, rows=2)
    with pytest.raises(RuntimeFailed, match=r"it gave log-probabilities of shape \(2, 5\)"):
        exchange.read("it", request(tmp_path), tmp_path)
    answer(tmp_path, value=float("nan"))
    with pytest.raises(RuntimeFailed, match=r"not finite\n  why: a weight or a bias"):
        exchange.read("it", request(tmp_path), tmp_path)
    answer(tmp_path, tokens=1)
    with pytest.raises(RuntimeFailed, match=r"it generated \[1, 1\] tokens"):
        exchange.read("it", request(tmp_path), tmp_path)


CONVERTER = """
import pathlib, sys
assert sys.argv[2:5:2] == ["--outfile", "--outtype"]
pathlib.Path(sys.argv[3]).write_text("GGUF " + sys.argv[5])
if sys.argv[5] == "q8_0": raise SystemExit("cannot convert")
"""


def test_conversion_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    """A stand-in of the converter's command line, which writes its file before it fails."""
    converter = tmp_path / "convert.py"
    converter.write_text(CONVERTER, encoding="utf-8")
    source = checkpoint(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RuntimeFailed, match=r"converter failed with [\s\S]*cannot convert"):
        convert(source, out / "m.gguf", "q8_0", converter=converter, python=PYTHON)
    assert list(out.iterdir()) == []
    convert(source, out / "m.gguf", converter=converter, python=PYTHON)
    assert (out / "m.gguf").read_text() == "GGUF f32"
    assert list(out.iterdir()) == [out / "m.gguf"]


def test_conversion_that_cannot_start(tmp_path: Path) -> None:
    source = checkpoint(tmp_path)
    with pytest.raises(UsageError, match="outtype is 'q4_k', and has to be one of f32"):
        convert(source, tmp_path / "m", "q4_k", converter=Path(__file__), python=PYTHON)
    with pytest.raises(RuntimeMissing, match="there is no converter at"):
        convert(source, tmp_path / "m", converter=tmp_path / "none.py", python=PYTHON)
