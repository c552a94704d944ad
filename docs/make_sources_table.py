"""Measure the tables of docs/sources.md anew: ``python docs/make_sources_table.py``.

Every system of tests/systems.py is baked into a tiny Llama, or hooked where the plan refuses it,
and compared with the system's own hook and with a wrong one. With ``--packages`` the packages of
tests/runtimes/steering-requirements.txt are installed, if they are not, and do the same themselves.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
sys.path[:0] = [str(HERE.parent), str(TESTS), str(TESTS / "runtimes")]

import install  # noqa: E402
import steering_packages  # noqa: E402
import torch  # noqa: E402
from harness import base_at  # noqa: E402
from systems import System  # noqa: E402
from test_sources import Measured, distance, page  # noqa: E402
from tiny import make_model, unbiased, write_checkpoint  # noqa: E402

PAGE = HERE / "sources.md"


def measured(folder: Path) -> Measured:
    """Return what measures a system, on models that are written into a folder."""
    bases = []
    for dtype in (torch.float64, torch.float32):
        path = folder / str(dtype)
        path.mkdir()
        write_checkpoint(make_model("llama", dtype=dtype), path)
        bases.append(base_at(path))

    def measure(system: System) -> tuple[float, float, float]:
        found = []
        for base in bases:
            with tempfile.TemporaryDirectory() as made:
                found.append(distance(base, Path(made), system))
        return found[0].right, found[1].right, found[0].wrong

    return measure


def by_packages(folder: Path) -> Callable[[steering_packages.Case], tuple[float, float, float]]:
    """Return what measures a package, once all of them have steered."""
    bases = {}
    for name in ("float64", "float32"):
        bases[name] = folder / f"base-{name}"
        bases[name].mkdir()
        model = make_model("llama", dtype=getattr(torch, name), **unbiased("llama"))
        write_checkpoint(model, bases[name])
    python = install.steering_python(install.default_cache())
    steered = steering_packages.steered_by_packages(python, bases, folder)

    def measure(case: steering_packages.Case) -> tuple[float, float, float]:
        found = []
        for of in steered.values():
            with tempfile.TemporaryDirectory() as made:
                found.append(steering_packages.measured(of, case, Path(made)))
        return found[0].right, found[1].right, found[0].wrong

    return measure


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as models:
        text = page(text, measured(Path(models)))
        if "--packages" in sys.argv[1:]:
            text = steering_packages.page(text, by_packages(Path(models)))
    PAGE.write_text(text, encoding="utf-8")
