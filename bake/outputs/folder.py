"""A new folder of small files that appears at once, with the record that every artifact carries."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bake import __version__
from bake.artifact.artifact import Artifact
from bake.edit_store import edit_files
from bake.errors import InputError, UsageError
from bake.plan import Exactness, Plan
from bake.plan.carriers import carrier_findings, carrier_runtimes
from bake.plan.record import findings_record, plan_record, runtimes_record

RECORD = "bake.json"


@contextmanager
def new_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` that becomes it when the block ends well.

    Raises:
        UsageError: something is at ``out`` that may not be replaced.
        InputError: the disk refuses.
    """
    _check_free(out, force=force)
    out = out.resolve()
    with scratch_beside(out) as scratch:
        made = scratch / "files"
        made.mkdir()
        yield made
        _publish(made, out, aside=scratch / "replaced")


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """Yield a folder on the disk of ``out`` that goes when the block ends.

    Parents of ``out`` are made where they are missing, and go too if nothing came into them.

    Raises:
        InputError: the disk refuses.
    """
    missing = [p for p in (out.parent, *out.parent.parents) if not p.exists()]
    scratch: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.bake-", dir=out.parent))
        yield scratch
    except OSError as error:
        raise InputError(
            f"cannot write the output: {error.strerror or error}", where=str(error.filename or out)
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def check_apart(out: Path, base: Path, gguf: Path | None = None) -> None:
    """Require that an output neither holds nor lies in what it is made from, which --force removes.

    Args:
        out: the output folder.
        base: the base checkpoint's folder.
        gguf: the base in GGUF.

    Raises:
        UsageError: they overlap.
    """
    place, folder = out.resolve(), base.resolve()
    if place == folder or folder in place.parents or place in folder.parents:
        raise UsageError(
            f"the output {place} and the base {folder} overlap",
            why="an export never changes its base",
            fix="name an output outside of it",
        )
    if gguf is not None and place in gguf.resolve().parents:
        raise UsageError(f"the output {out} holds the base {gguf}", fix="name another output")


def _publish(made: Path, out: Path, *, aside: Path) -> None:
    """Rename the finished folder into place; what was there comes back if that fails."""
    replaced = out.exists()
    if replaced:
        out.rename(aside)
    done = False
    try:
        made.rename(out)
        done = True
    finally:
        if replaced and not done:
            aside.rename(out)


def _check_free(out: Path, *, force: bool) -> None:
    if out.is_symlink():
        raise UsageError(f"{out} is a link", fix="name the folder that it leads to")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} exists and is no folder", fix="name another output")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise UsageError(
            f"{out} exists and is not empty", fix="name another output, or use --force"
        )
    if not (out / RECORD).is_file():
        raise UsageError(
            f"{out} was not written by bake, so it is not replaced",
            why=f"it holds no {RECORD}, and --force removes the whole folder",
            fix="remove it yourself if nothing in it is needed, or name another output",
        )


def write_artifact(
    plan: Plan,
    kind: str,
    out: Path,
    *,
    record: Mapping[str, Any],
    force: bool,
    write: Callable[[Path], None],
) -> Artifact:
    """Write an adapter's files, the edits and the record to a new folder.

    Args:
        plan: what the adapter executes.
        kind: the carrier.
        out: a folder that does not exist, unless ``force``.
        record: what ``bake.json`` keeps besides the plan.
        force: replace an artifact of bake at ``out``.
        write: writes the carrier's own files into the folder that it is given.
    """
    with new_folder(out, force=force) as folder:
        write(folder)
        own = sum(path.stat().st_size for path in folder.iterdir())
        for name, data in edit_files(plan.reference, plan.edits).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        files = digests(folder)
        findings = plan_record(plan) | carrier_record(plan, kind)
        content = {"bake": __version__, "kind": kind, **record, "plan": findings, "files": files}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / RECORD).write_text(text, encoding="utf-8")
        files = digests(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        sync(folder)
    return Artifact(kind, out, files, size, own)


def carrier_record(plan: Plan, kind: str, *, codes: bool = False) -> dict[str, Any]:
    """Return what of the plan's record is another for this carrier than for a checkpoint.

    Args:
        plan: the plan.
        kind: the carrier.
        codes: whether it is a GGUF file whose edited weights are stored in a few bits each.
    """
    findings = carrier_findings(plan, kind)
    worst = max((f.exactness for f in findings), key=list(Exactness).index)
    return {
        "exactness": str(worst),
        "findings": findings_record(findings),
        "runtimes": runtimes_record(carrier_runtimes(plan, kind, codes=codes)),
    }


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its name there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                name = path.relative_to(folder).as_posix()
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def sync(folder: Path) -> None:
    """Make every file below a folder durable, so that a rename never publishes half of one."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
