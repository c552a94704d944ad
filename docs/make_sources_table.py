"""Measure the table of docs/sources.md anew: ``python docs/make_sources_table.py``.

Every system of tests/systems.py is baked into a tiny Llama, or hooked where the plan refuses it,
and compared with the system's own hook and with a wrong one.
"""

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import torch  # noqa: E402
from harness import base_at  # noqa: E402
from systems import System  # noqa: E402
from test_sources import Measured, distance, page  # noqa: E402
from tiny import make_model, write_checkpoint  # noqa: E402

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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as models:
        text = page(PAGE.read_text(encoding="utf-8"), measured(Path(models)))
    PAGE.write_text(text, encoding="utf-8")
