"""Run a script with another environment's Python: time limit, clean variables, readable failure.

Such scripts are the runtimes that serve an artifact, and llama.cpp's own converter.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from bake.errors import InputError, VerificationFailed

TAIL_LINES = 20
TAIL_WIDTH = 400

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}


# Said of the packages that are not there. Nothing of those that are there is imported.
_SEEK = """
import sys
from importlib.metadata import version
from importlib.util import find_spec
for word in sys.argv[1:]:
    name, _, wanted = word.partition("==")
    if find_spec(name) is None:
        sys.exit(f"No module named {name!r}")
    if wanted and version(name) != wanted:
        sys.exit(f"{name} {version(name)} is installed, and {wanted} is wanted")
"""
_SEEKING = 60.0


class RuntimeMissing(InputError):
    """The program is not installed in the environment that was named, or there is none."""


class RuntimeFailed(VerificationFailed):
    """The program was there and did not do its work: it refused, crashed or was slow."""


def find(name: str, python: Path, packages: Sequence[str]) -> None:
    """Require that a program is installed, which takes a tenth of a second and starts nothing.

    Args:
        name: the program's name in messages.
        python: the interpreter of the environment that it should be installed in.
        packages: what it is made of, by import name; ``name==version`` where it has to be that.

    Raises:
        RuntimeMissing: there is no such interpreter, or a package is not in its environment, or in
            another version.
    """
    command: list[str | Path] = [_interpreter(name, python), "-I", "-c", _SEEK, *packages]
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(prefix="bake-") as folder:
        status = wait(command, log, Path(folder), _SEEKING, {})
        if status == 0:
            return
        output = tail(log)
    raise RuntimeMissing(
        f"{name} is not installed in the environment of {python}",
        why=output,
        fix=f"install {', '.join(packages)} there, or name another with --python NAME=PATH",
    )


def _interpreter(name: str, python: Path) -> Path:
    found = shutil.which(python)
    if found is None:
        raise RuntimeMissing(
            f"{name} was not started: {python} is no Python interpreter",
            fix=f"name the Python of an environment in which {name} is installed",
        )
    return Path(found).absolute()


def run_script(
    name: str,
    python: Path,
    arguments: Sequence[str | Path],
    *,
    folder: Path,
    timeout: float,
    variables: Mapping[str, str],
) -> None:
    """Run `python arguments…` in `folder` and return when it has ended well.

    Args:
        name: the program's name in messages.
        python: the interpreter of the environment that the program is installed in.
        arguments: the interpreter's arguments: options, script, the script's own arguments.
        folder: the working directory.
        timeout: seconds, after which the program and whatever it started are killed.
        variables: environment variables beside the inherited ones.

    Raises:
        RuntimeMissing: there is no such interpreter.
        RuntimeFailed: the program failed or took too long; the end of its output is in the message.
    """
    command = [_interpreter(name, python), *arguments]
    with tempfile.TemporaryFile() as log:
        status = wait(command, log, folder, timeout, variables)
        if status == 0:
            return
        output = tail(log)
    if status is None:
        raise RuntimeFailed(f"{name} was killed after {timeout:g} s", why=output)
    raise RuntimeFailed(f"{name} failed with {spelled(status)}", why=output)


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return what a program of another interpreter inherits, offline, with variables of its own."""
    # PYTHONPATH and its like are about this interpreter, and the child is another one.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {**inherited, **OFFLINE, **variables}


def wait(
    command: Sequence[str | Path],
    log: IO[bytes],
    folder: Path,
    timeout: float,
    variables: Mapping[str, str],
) -> int | None:
    """Return the exit status, or None when the time was up and the program was killed."""
    process = subprocess.Popen(
        [*_guard(), *(str(word) for word in command)],
        cwd=folder,
        env=environment(variables),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that its children can be killed with it
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _guard() -> list[str]:
    """Return what a command is started through, so that it does not outlive this process."""
    if sys.platform != "linux":
        return []
    return [sys.executable, "-I", str(Path(__file__).with_name("_guard.py")), str(os.getpid())]


def tail(log: IO[bytes]) -> str:
    """Return the last lines of the program's output, cut to a readable width."""
    log.seek(0)
    lines = log.read().decode(errors="replace").rstrip().splitlines()
    if not lines:
        return "it printed nothing"
    return "its output ends with\n" + "\n".join(
        "    " + line[:TAIL_WIDTH] for line in lines[-TAIL_LINES:]
    )


def spelled(status: int) -> str:
    """Return "exit status 1", or "signal SIGABRT" for a status below zero."""
    return f"exit status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
