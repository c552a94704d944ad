"""Baked checkpoints that know their base, for tests that go back to it."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from exporting import written
from harness import base_at, plan_of

from bake.cli import main
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
    run = ["revert", str(artifact), "--out", str(out), *map(str, args), "--json"]
    result = CliRunner().invoke(main, run)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def reverted(artifact: Path, out: Path, *args: object) -> dict[str, Any]:
    """Run ``bake revert`` and return what it says."""
    result = revert(artifact, out, *args)
    assert result.exit_code == 0, result.stdout
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(artifact: Path, out: Path, *args: object, code: int = 4) -> str:
    """Run ``bake revert``, which fails and leaves nothing, and return what it says."""
    result = revert(artifact, out, *args)
    assert result.exit_code == code, result.stdout
    assert not out.exists()
    assert not out.with_name(f".{out.name}.bake-partial").exists()
    error = json.loads(result.stdout)["error"]
    return " | ".join(str(error[key]) for key in ("what", "where", "why", "fix") if error[key])


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def flip(path: Path, position: int) -> None:
    """Flip the lowest bit of one byte; a negative position counts from the end."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
