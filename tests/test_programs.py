"""A forked program is a program like any other, which every test that forks one rests on."""

import json
import os
import signal
import subprocess
from pathlib import Path

import programs
import pytest

TELL = """
import json, os, sys
told = [sys.argv, sys.path[0], os.getcwd(), os.environ.get("A"), __name__, sys.stdin.read()]
print(json.dumps([*told, sys.stdin.isatty(), len(os.listdir("/proc/self/fd"))]))
print("errors", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def ran(code: str, *args: str, forked: bool, folder: Path) -> tuple[int, str, str]:
    """Return how a program ended and what it wrote."""
    out, errors = folder / "out", folder / "errors"
    with out.open("w") as file, errors.open("w") as other:
        env = {**os.environ, "A": "b"}
        program = programs.start(
            code, *args, env=env, cwd=folder, forked=forked, stdout=file, stderr=other
        )
        status = program.wait(60)
    return status, out.read_text(), errors.read_text()


@pytest.mark.parametrize("status", ["0", "3"])
def test_a_fork_sees_what_a_program_sees(status: str, tmp_path: Path) -> None:
    forked = ran(TELL, status, forked=True, folder=tmp_path)
    assert forked == ran(TELL, status, forked=False, folder=tmp_path)
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
    for forked in (True, False):
        assert ran(code, forked=forked, folder=tmp_path) == (status, "", said)


def test_a_fork_is_asked_and_killed() -> None:
    echo = "import sys\nfor line in sys.stdin: print(line.upper(), end='', flush=True)"
    program = programs.start(echo, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
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
