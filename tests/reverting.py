"""Baked checkpoints that know their base, for tests that go back to it."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from click.testing import Result
from commands import data_of, error_of, run
from exporting import written
from harness import base_at, plan_of

from bake.edits import Edit


def bake_local(
    base_path: Path, edits: Sequence[Edit], out: Path, *, allow: Iterable[str] = ()
) -> Path:
    """Export edits of a base in a folder, with the record that ``bake export`` writes."""
    base = base_at(base_path)
    plan = plan_of(base, edits, allow=allow)
    record = {
        "base": {
            "model": str(base_path),
            "revision": None,
            "digest": base.checkpoint.digest(),
            "path": os.path.relpath(base.checkpoint.path, out.absolute()),
        },
        "allow": list(allow),
        "target": ["transformers"],
    }
    written("checkpoint", plan, base.checkpoint, out, record=record, allow=frozenset(allow))
    return out


def revert(artifact: Path, out: Path, *args: object) -> Result:
    """Run ``bake revert``, with ``--json``."""
    return run("revert", artifact, "--out", out, *args, "--json")


def reverted(artifact: Path, out: Path, *args: object) -> dict[str, Any]:
    """Run ``bake revert`` and return what it says."""
    return data_of("revert", artifact, "--out", out, *args)


def refused(artifact: Path, out: Path, *args: object, code: int = 4) -> str:
    """Run ``bake revert``, which fails and leaves nothing, and return what it says."""
    said = data_of("revert", artifact, "--out", out, *args, code=code)
    assert not out.exists()
    assert not out.with_name(f".{out.name}.bake-partial").exists()
    return error_of(said)
