"""A forked program is a program like any other, which every test that forks one rests on."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import programs
import pytest
import tiny_checkpoints
from install import GgufConverter
from transformers import PreTrainedModel

from bake import process
from bake.converter import convert

TELL = """
import json, os, sys
told = [sys.argv, sys.path[0], os.getcwd(), os.environ.get("A"), __name__, sys.stdin.read()]
print(json.dumps([*told, sys.stdin.isatty(), len(os.listdir("/proc/self/fd"))]))
print("errors", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def ran(code: str, *args: str, kind: str | None, folder: Path) -> tuple[int, str, str]:
    """Return how a program ended and what it wrote."""
    out, errors = folder / "out", folder / "errors"
    with out.open("w") as file, errors.open("w") as other:
        env = {**os.environ, "A": "b"}
        program = programs.start(
            code, *args, env=env, cwd=folder, kind=kind, stdout=file, stderr=other
        )
        status = program.wait(60)
    return status, out.read_text(), errors.read_text()


@pytest.mark.parametrize("status", ["0", "3"])
def test_a_fork_sees_what_a_program_sees(status: str, tmp_path: Path) -> None:
    forked = ran(TELL, status, kind=programs.COMMAND, folder=tmp_path)
    assert forked == ran(TELL, status, kind=None, folder=tmp_path)
    assert forked[0] == int(status) and forked[2] == "errors\n"
    told = json.loads(forked[1])
    assert told[:5] == [["-c", status], "", str(tmp_path), "b", "__main__"]


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise SystemExit('no')", 1, "no\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(print, 'end', file=sys.stderr)", 0, "end\n"),
        ("import subprocess, sys; sys.exit(subprocess.call(['false']))", 1, ""),
    ],
)
def test_a_fork_ends_as_a_program_ends(code: str, status: int, said: str, tmp_path: Path) -> None:
    for kind in (programs.COMMAND, None):
        assert ran(code, kind=kind, folder=tmp_path) == (status, "", said)


def test_a_fork_is_asked_and_killed() -> None:
    echo = "import sys\nfor line in sys.stdin: print(line.upper(), end='', flush=True)"
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    program = programs.start(echo, kind=programs.COMMAND, **piped)
    assert program.stdin is not None and program.stdout is not None
    program.stdin.write("a\n")
    program.stdin.flush()
    assert program.stdout.readline() == "A\n"
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.05)
    program.send_signal(signal.SIGTERM)
    assert program.wait(30) == -signal.SIGTERM
    program.stdin.close()
    program.stdout.close()
    with pytest.raises(ProcessLookupError):
        os.kill(program.pid, 0)


def test_a_program_asks_for_forks_at_the_door(tmp_path: Path) -> None:
    """Of the process that its starter asks too: what both fork has one parent."""
    parent = "import os; print(os.getppid())"
    asked = f"""
import sys
sys.path.append({str(programs.HERE.parent)!r})
import programs
print(programs.run({parent!r}, kind=programs.COMMAND).stdout, end="")
"""
    env = {**os.environ, programs.DOORS: programs.door(programs.COMMAND)}
    own = programs.run(parent, kind=programs.COMMAND).stdout
    for _ in range(2):  # one that joined has left by then
        joined = programs.run(asked, env=env, kind=None)
        assert (joined.returncode, joined.stdout, joined.stderr) == (0, own, "")
    assert own != programs.run(parent, kind=None).stdout == f"{os.getpid()}\n"  # the control


@pytest.mark.runtimes
@pytest.mark.parametrize("make", [tiny_checkpoints.plain_llama, tiny_checkpoints.tiny_gpt2])
def test_a_forked_converter_writes_the_same_bytes(
    make: Callable[[], PreTrainedModel],
    gguf_converter: GgufConverter,
    own_process: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make()
    folder = tiny_checkpoints.write(model, tmp_path / "model")
    scripts = tiny_checkpoints.converter_for(model, gguf_converter, tmp_path / "scripts")
    script = {"converter": scripts / gguf_converter.script.name, "python": gguf_converter.python}
    convert(folder, tmp_path / "one.gguf", **script)
    monkeypatch.setattr(process, "wait", programs.wait(pytest.fail))
    convert(folder, tmp_path / "other.gguf", **script)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()
