"""The runtimes' environments, installed once per machine into the cache that install.py names."""

import sys
from collections.abc import Iterator
from pathlib import Path

import install
import pytest


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
def gguf_converter() -> install.GgufConverter:
    """llama.cpp's converter, run by this environment's Python."""
    script = install.converter(install.default_cache())
    return install.GgufConverter(script, Path(sys.executable))
