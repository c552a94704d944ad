"""What every test runs under: fixed seeds, one thread, no network; what many share, on demand.

Nothing heavy is imported here at the top: the process that hands the tests out runs none.
"""

import gc
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import install
import programs
import pytest
from hypothesis import settings

# A suite that was started in the background inherits signals that are ignored, and so would every
# program that a test starts and stops.
for number, usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGTERM, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# Half a million objects of torch, transformers and the tests stay to the end, and to look through
# them for garbage takes 0.2 s each time.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Let the collector see only what the tests themselves make, and not for every few hundred."""
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


settings.register_profile("bake", derandomize=True, deadline=None, database=None)
settings.load_profile("bake")
# A tiny model is read sooner than a thread starts; transformers asks for this at every load.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
# Threads wait for each other by spinning, which takes minutes where two share a core: llama.cpp has
# one. All else has, where several workers run the tests, a worker's share of the cores, and sleeps.
os.environ["LLAMA_ARG_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or it takes one for every core

LOOPBACK = ("127.0.0.1", "::1", "localhost", "", None)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: what was written is read back from memory."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that looks up or connects to anything but this machine."""
    if request.node.get_closest_marker("network") is not None:
        return

    def guard(original: Callable[..., Any], host_of: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            host = host_of(*args, **kwargs)
            if host not in LOOPBACK:
                # Failed is no Exception, so that the code under test cannot swallow it.
                pytest.fail(f"the test reaches for the network: {host!r}")
            return original(*args, **kwargs)

        return guarded

    def peer(sock: socket.socket, address: Any) -> Any:
        return None if sock.family == socket.AF_UNIX else address[0]

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guard(getattr(socket.socket, name), peer))
    lookup = guard(socket.getaddrinfo, lambda host, *_, **__: host)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)


@pytest.fixture
def own_process() -> None:
    """Have scripts of this environment started as a user's are, and not forked."""


@pytest.fixture(autouse=True)
def _forked_scripts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork what bake runs with this interpreter; a real model is not for one thread alone."""
    from bake import process

    real = request.node.get_closest_marker("real") is not None
    if not real and "own_process" not in request.fixturenames:
        monkeypatch.setattr(process, "wait", programs.wait(process.wait))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Return a function that writes a tiny checkpoint once per session: read it, never write to it.

    It takes what ``tiny.make_model`` takes.
    """
    from tiny import make_model, write_checkpoint

    written: dict[str, Path] = {}

    def path_of(family: str, **options: Any) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in written:
            path = tmp_path_factory.mktemp(family)
            write_checkpoint(make_model(family, **options), path)
            written[key] = path
        return written[key]

    yield path_of


# The runtimes' environments, installed once per machine into the cache that install.py names.


@pytest.fixture(scope="session")
def vllm_python() -> Iterator[Path]:
    """The interpreter of an environment with vLLM, whose own caches stay in the test cache."""
    cache = install.default_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(cache / "vllm-cache"))
        yield install.vllm_python(cache)


@pytest.fixture(scope="session")
def llamacpp_python() -> Path:
    """The interpreter of an environment with llama.cpp (the package xllamacpp)."""
    return install.llamacpp_python(install.default_cache())


@pytest.fixture(scope="session")
def steering_python() -> Path:
    """The interpreter of an environment with steering packages."""
    return install.steering_python(install.default_cache())


@pytest.fixture(scope="session")
def gguf_converter() -> install.GgufConverter:
    """llama.cpp's converter, run by this environment's Python."""
    script = install.converter(install.default_cache())
    return install.GgufConverter(script, Path(sys.executable))
