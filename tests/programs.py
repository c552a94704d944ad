"""Programs that tests start, forked from a process that has imported what they would import.

Python with torch takes 2 s of processor time to start, with transformers and PEFT 6, with vLLM 13,
and what a test then asks of it a fraction. So a session starts a process that imports them, once,
and it forks for every program. That is a process like any other: a number to kill, an environment,
a folder, files, an exit status. It is forked from a single thread, before torch has computed.

Not forked is what is about the start itself: what a command imports (test_layers.py, test_cli.py,
test_card.py, test_verify_report.py), signals while it imports, children and memory of a process
(test_staged.py, test_verify_serving.py, test_verify_streaming.py), and the runtime of a test that
asks for the fixture ``own_process``. On another system than Linux nothing is.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

HERE = Path(__file__).resolve()
COMMAND, MODEL, VLLM = "command", "model", "vllm"
_COMMAND = (
    "torch",
    "numpy",
    "safetensors.torch",
    "click.testing",
    "jinja2",
    "bake.cli",
    "bake.outputs.write",
    "bake.jobs.planned",
    "bake.recipe",
    "bake.cards.card",
)
PRELOADED = {
    # All that commands of bake need, but nothing that reads the settings of the Hub's client.
    COMMAND: _COMMAND,
    # For programs without a Hub: what loads models too.
    MODEL: (
        *_COMMAND,
        "transformers.models.llama.modeling_llama",
        "transformers.models.mistral.modeling_mistral",
        "peft",
    ),
    # In vLLM's own environment: what every engine imports.
    VLLM: (
        "vllm.entrypoints.llm",
        "vllm.v1.engine.core",
        "vllm.v1.executor.uniproc_executor",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.llama",
        "vllm.lora.request",
    ),
}
# What ``wait`` forks: the flag that goes before it, its file and the process that forks.
SCRIPTS = {
    ("-I", "_hf_worker.py"): MODEL,
    ("-s", "convert_hf_to_gguf.py"): MODEL,
    ("-I", "_vllm_worker.py"): VLLM,
    ("-I", "vllm_adapters.py"): VLLM,
}
MOST = 1 << 17  # bytes of an order
DOORS = "BAKE_TEST_FORKS"
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
RESOURCES = "error::ResourceWarning"
STREAMS = ("stdin", "stdout", "stderr")
File = int | IO[Any]


class Program:
    """A program that runs, with as much of the interface of ``Popen`` as tests use."""

    def __init__(self, pid: int, report: int, pipes: Mapping[str, IO[str]]) -> None:
        self.pid, self._report = pid, report
        self.returncode: int | None = None
        self.stdin, self.stdout = pipes.get("stdin"), pipes.get("stdout")

    def __del__(self) -> None:
        if self.returncode is None:
            os.close(self._report)

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status; that of a signal is its number below zero."""
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], timeout)[0]:
            said = os.read(self._report, 16)
            os.close(self._report)
            self.returncode = int(said) if said else -signal.SIGKILL  # the server is gone
        return self.returncode


Running = Program | subprocess.Popen[str]


def start(
    code: str,
    *args: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    kind: str | None = MODEL,
    **files: File,
) -> Running:
    """Start Python code with arguments.

    Args:
        code: the program, as after ``python -c``.
        args: what is in ``sys.argv`` behind it.
        env: its environment; this process's unless given.
        cwd: its folder; this process's unless given.
        kind: what is imported already, a key of ``PRELOADED``; None starts an interpreter.
        files: ``stdin``, ``stdout``, ``stderr``, as ``Popen`` has them; nothing unless given.
    """
    env, cwd = dict(os.environ if env is None else env), cwd or Path.cwd()
    files = {name: files.get(name, subprocess.DEVNULL) for name in STREAMS}
    if kind is not None and sys.platform == "linux":
        order = {"code": code, "args": ["-c", *args], "env": env, "cwd": str(cwd)}
        return _forked(kind, order, files)
    command = [sys.executable, "-c", code, *args]
    return subprocess.Popen(command, env=env, cwd=cwd, text=True, **files)


def run(
    code: str,
    *args: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    kind: str | None = MODEL,
    timeout: float = 120.0,
) -> "subprocess.CompletedProcess[str]":
    """Run Python code with arguments to its end and return what it wrote."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        program = start(code, *args, env=env, cwd=cwd, kind=kind, stdout=out, stderr=errors)
        try:
            status = program.wait(timeout)
        finally:
            program.send_signal(signal.SIGKILL)
        for file in (out, errors):
            file.seek(0)
        return subprocess.CompletedProcess(["-c", *args], status, out.read(), errors.read())


def wait(real: Callable[..., int | None]) -> Callable[..., int | None]:
    """Return ``bake.process.wait``, with ``SCRIPTS`` forked where their interpreter is to run them.

    It is this one, or that of vLLM's environment.
    """
    from bake import process

    def wait(
        command: Sequence[str | Path],
        log: IO[bytes],
        folder: Path,
        timeout: float,
        variables: Mapping[str, str],
    ) -> int | None:
        python, *rest = map(str, command)
        kind = SCRIPTS.get((rest[0], Path(rest[1]).name)) if len(rest) > 1 else None
        given = Path(os.environ.get(DOORS, kind or "")).name
        if kind is None or kind != given or python != _python(kind):
            return real(command, log, folder, timeout, variables)
        flag, *rest = rest
        env, path = process.environment(variables), rest[0]
        order = {"path": path, "args": rest, "env": env, "cwd": str(folder)}
        order["isolated"] = flag == "-I"
        files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        program = _forked(kind, order, files)
        try:
            return program.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            program.send_signal(signal.SIGKILL)

    return wait if sys.platform == "linux" else real


def _forked(kind: str, order: dict[str, Any], files: Mapping[str, File]) -> Program:
    server = _server(kind)
    report, ended = os.pipe()
    given, pipes, numbers = [ended], {}, []
    for name, file in files.items():
        if file == subprocess.DEVNULL:
            given.append(os.open(os.devnull, os.O_RDWR))
        elif file == subprocess.PIPE:
            ends = os.pipe()
            theirs, mode = (0, "w") if name == "stdin" else (1, "r")
            given.append(ends[theirs])
            pipes[name] = os.fdopen(ends[1 - theirs], mode, encoding="utf-8")
        else:
            numbers.append(file if isinstance(file, int) else file.fileno())
            continue
        numbers.append(given[-1])
    text = json.dumps(order).encode()
    assert len(text) <= MOST
    socket.send_fds(server, [text], [*numbers, ended])
    for number in given:
        os.close(number)
    return Program(int(server.recv(16)), report, pipes)


def _python(kind: str) -> str:
    """Return the interpreter whose programs are forked."""
    if kind != VLLM:
        return sys.executable
    import install

    return str(install.default_cache() / "vllm" / "bin" / "python")


def _environment(kind: str) -> dict[str, str]:
    """Return the variables that what forks is started with."""
    from bake.process import OFFLINE, environment
    from bake.verify.runtimes import vllm

    if kind == VLLM:
        return {**environment(vllm.VLLM.variables), "OMP_NUM_THREADS": "1"}
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    return {**here, **(OFFLINE if kind == MODEL else {})}


def _server(kind: str) -> socket.socket:
    """Return what this process asks for forks of a kind: its own, or that which it was given."""
    given = os.environ.get(DOORS)
    return _started(kind)[0] if given is None else _joined(given)


def door(kind: str) -> str:
    """Return the socket at which a program asks for forks of a kind, as its variable ``DOORS``."""
    return _started(kind)[1]


@cache
def _joined(path: str) -> socket.socket:
    """Join what another process has started."""
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.connect(path)
    return ours


@cache
def _started(kind: str) -> tuple[socket.socket, str]:
    """Start what forks, until this process ends, and return where others may join it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = tempfile.TemporaryDirectory(prefix="bake-forks-")  # which is this user's alone
    path = str(Path(folder.name) / kind)
    with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(path)
        listening.listen()
        process = subprocess.Popen(
            [_python(kind), str(HERE), kind, str(listening.fileno())],
            stdin=theirs,
            env=_environment(kind),
            start_new_session=True,
            pass_fds=[listening.fileno()],
        )

    def end() -> None:
        ours.close()
        process.wait(60)
        folder.cleanup()

    atexit.register(end)
    return ours, path


# --- in the process that forks -------------------------------------------------------------------


def serve(starter: socket.socket, listening: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for every order, and tell how each ended. Only a fork returns, with what it is to do.

    It ends with the process that started it.
    """
    waiting: dict[int, tuple[int, int]] = {}
    asking = {starter.fileno(): starter}
    poller = select.poll()
    poller.register(starter, select.POLLIN)
    poller.register(listening, select.POLLIN)
    while True:
        for ready, _ in poller.poll():
            if ready in waiting:
                poller.unregister(ready)
                _tell(ready, *waiting.pop(ready))
                continue
            if ready == listening.fileno():
                joined, _ = listening.accept()
                asking[joined.fileno()] = joined
                poller.register(joined, select.POLLIN)
                continue
            orders = asking[ready]
            text, files, *_ = socket.recv_fds(orders, MOST, 4)
            if not text:
                if orders is starter:
                    sys.exit()
                poller.unregister(ready)
                asking.pop(ready).close()
                continue
            pid = os.fork()
            if not pid:
                return json.loads(text), files
            for file in files[:3]:
                os.close(file)
            handle = os.pidfd_open(pid)
            waiting[handle] = pid, files[3]
            poller.register(handle, select.POLLIN)
            orders.send(str(pid).encode())


def _tell(handle: int, pid: int, report: int) -> None:
    os.close(handle)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        os.write(report, str(status).encode())
    except BrokenPipeError:
        pass  # nobody waits for it
    os.close(report)


def become(order: dict[str, Any], files: list[int]) -> None:
    """Have environment, folder and files of a program that was just started."""
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    os.setsid()
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    os.closerange(3, 1 + max(int(entry.name) for entry in Path("/proc/self/fd").iterdir()))
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    for number, name in enumerate(STREAMS):
        stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if os.environ.get("PYTHONWARNINGS") == RESOURCES:
        warnings.simplefilter("error", ResourceWarning)
    sys.argv = order["args"]


def end(program: Callable[[], object]) -> NoReturn:
    """Run a program and end as an interpreter does.

    But for taking all modules apart, which takes most of a second and a copy of what is shared. An
    error is left to the interpreter.
    """
    status: object = None
    try:
        program()
    except SystemExit as error:
        status = error.code
    threading._shutdown()
    atexit._run_exitfuncs()
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((status or 0) & 0xFF)


def main(kind: str, listening: int) -> None:
    """Import what programs of a kind need, and fork until nobody asks any more."""
    for name in PRELOADED[kind]:
        importlib.import_module(name)
    if kind == COMMAND and "huggingface_hub" in sys.modules:
        sys.exit("the Hub's client has read its settings before a program could have its own")
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        sys.exit("a process with several threads cannot be forked")
    gc.freeze()  # a collection would copy every page
    order, files = serve(socket.socket(fileno=os.dup(0)), socket.socket(fileno=listening))
    become(order, files)
    if "path" in order:
        own = (
            ("gguf", "bake") if kind == MODEL else ()
        )  # the converter has its own, the worker none
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]
        sys.path[:1] = [] if order["isolated"] else [str(Path(order["path"]).parent)]
        end(lambda: runpy.run_path(order["path"], run_name="__main__"))
    sys.path[0] = ""  # as after -c; it was this file's folder
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    end(lambda: exec(compile(order["code"], "<string>", "exec"), module.__dict__))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
