"""Several carriers in one run: all of them or none, with the base's weights read once for them.

    .NAME.bake-several/journal      what the run makes, and the carriers that are finished
    .NAME.bake-several/files/       becomes NAME by one rename; a folder for every carrier
    .NAME.bake-several/old/         the folder that --force replaces, for the moment of that rename

A checkpoint is written first, since it reads every edited weight; adapters take their factors from
the tiles that pass (``bake.outputs.shared``), and llama.cpp's converter reads what is baked. A run
that is killed leaves the staging folder, and the same command takes up the finished carriers, once
their hashes have been checked, and the shards of an unfinished checkpoint. A run that fails leaves
nothing.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from bake import __version__
from bake.artifact.artifact import Artifact
from bake.artifact.carrier import CARRIERS, in_writing_order
from bake.checkpoints import Checkpoint
from bake.checkpoints.staging import lock
from bake.errors import InputError, UsageError
from bake.outputs.carry import Beside, Options, check, write
from bake.outputs.folder import RECORD, check_apart, digests
from bake.outputs.shared import SharedFactors
from bake.plan import Plan
from bake.plan.lowrank import targets_of
from bake.progress import Progress

Bar = Callable[[str], AbstractContextManager[Progress | None]]


def write_several(
    carriers: Sequence[str],
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    record: Callable[[Path], Mapping[str, Any]],
    options: Options,
    bar: Bar = lambda carrier: nullcontext(),
) -> tuple[Artifact, ...]:
    """Write several carriers of a plan, each to the folder of its name in ``out``.

    The bytes are those that each carrier has when it is written alone.

    Args:
        carriers: their names.
        plan: made for this checkpoint.
        checkpoint: the base, with its weights at hand.
        out: a folder that does not exist, unless ``options.force``.
        record: returns what a carrier's ``bake.json`` keeps besides the plan, given its folder.
        options: what the export is told beyond its plan.
        bar: returns the progress of one carrier, as a context.

    Returns:
        what was written, in the order of ``carriers``.

    Raises:
        BakeError: one of the carriers refuses; nothing is written, or nothing is left of it.
    """
    names = tuple(dict.fromkeys(carriers))
    for name in names:
        check(name, plan, checkpoint, options)
    check_apart(out, checkpoint.path, options.gguf)
    identity = _identity(names, plan, checkpoint, out, record, options)
    stage = _Stage(out, identity, force=options.force)
    try:
        with stage:
            _write_missing(stage, names, plan, checkpoint, record, options, bar)
            stage.publish()
    except OSError as error:
        raise InputError(
            f"cannot write the output: {error.strerror or error}", where=str(error.filename or out)
        ) from error
    return tuple(replace(stage.finished[name], path=out / name) for name in names)


def _write_missing(
    stage: "_Stage",
    names: Sequence[str],
    plan: Plan,
    checkpoint: Checkpoint,
    record: Callable[[Path], Mapping[str, Any]],
    options: Options,
    bar: Bar,
) -> None:
    """Write the carriers that an earlier run has not finished."""
    with ExitStack() as stack:
        factors = None
        if _adapters(names, options):
            factors = stack.enter_context(
                SharedFactors(checkpoint, targets_of(plan), stage.folder.parent)
            )
        for name in in_writing_order(names):
            if name in stage.finished:
                continue
            baked = stage.folder / "checkpoint" if "checkpoint" in stage.finished else None
            with bar(name) as progress:
                made = write(
                    name,
                    plan,
                    checkpoint,
                    stage.folder / name,
                    record=record(stage.out / name),
                    options=replace(options, force=False),
                    beside=Beside(factors, baked, stage.out / name),
                    progress=progress,
                )
            stage.finish(made)


def _adapters(names: Sequence[str], options: Options) -> bool:
    """Whether a carrier takes factors of the checkpoint's weights; a GGUF's are its own."""
    return "lora" in names or ("gguf-lora" in names and options.gguf is None)


def _identity(
    names: Sequence[str],
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    record: Callable[[Path], Mapping[str, Any]],
    options: Options,
) -> str:
    """Return a digest of all that decides the output's bytes; files count by length and time."""
    files = [checkpoint.path / shard for shard in checkpoint.shards]
    files += [] if options.gguf is None else [options.gguf]
    stamps = [[path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    told = {key: str(value) for key, value in asdict(options).items() if key != "allow"}
    told["allow"] = str(sorted(options.allow))
    records = [record(out / name) for name in names]
    facts = [__version__, plan.digest, checkpoint.digest(), stamps, sorted(names), told, records]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class _Stage:
    """The staging folder, locked; it becomes ``out`` by ``publish`` or goes when the block fails.

    ``KeyboardInterrupt`` and a kill keep it once something in it is finished.
    """

    def __init__(self, out: Path, identity: str, *, force: bool) -> None:
        self.out = out
        self.finished: dict[str, Artifact] = {}
        place = out.resolve()
        self._place, self._identity, self._force = place, identity, force
        self._root = place.with_name(f".{place.name}.bake-several")
        self._aside = self._root / "old"
        self._new_parents: list[Path] = []
        self._journal: FileIO | None = None
        self.folder = self._root / "files"

    def __enter__(self) -> "_Stage":
        self._check_free()
        parent = self._place.parent
        self._new_parents = [p for p in (parent, *parent.parents) if not p.exists()]
        self._root.mkdir(parents=True, exist_ok=True)
        self._journal = (self._root / "journal").open("a+b", buffering=0)
        try:
            lock(self._journal, self._place)
            self._recover()
            self._check_free()  # again, for what has just come back
            self._take_up()
        except BaseException:
            self._journal.close()
            raise
        return self

    def _recover(self) -> None:
        """Undo or finish what a run that was killed amid its last renames began."""
        if self._aside.exists():
            if self._place.exists():
                shutil.rmtree(self._aside)
            else:
                self._aside.rename(self._place)

    def _check_free(self) -> None:
        place = self._place
        if self.out.is_symlink():
            raise UsageError(f"{self.out} is a link", fix="name the folder that it leads to")
        if place.exists() and not place.is_dir():
            raise UsageError(f"{self.out} exists and is no folder", fix="name another output")
        entries = sorted(place.iterdir()) if place.exists() else []
        if not entries:
            return
        if not self._force:
            raise UsageError(
                f"{self.out} exists and is not empty", fix="name another output, or use --force"
            )
        # One artifact, or a folder of nothing but artifacts.
        whole = (place / RECORD).is_file()
        for entry in entries:
            if not whole and not (entry.name in CARRIERS and (entry / RECORD).is_file()):
                raise UsageError(
                    f"{self.out} holds {entry.name}, which bake did not write, so it is not "
                    "replaced",
                    why="--force removes the whole folder",
                    fix="remove it yourself if it is not needed, or name another output",
                )

    def _take_up(self) -> None:
        """Keep what a run of the same request has finished, and remove all else."""
        assert self._journal is not None
        self._journal.seek(0)
        recorded = _read_journal(self._journal.readall(), self._identity)
        kept = {f".{name}.bake-partial" for name in CARRIERS} if recorded is not None else set()
        self.folder.mkdir(exist_ok=True)
        self._journal.truncate(0)
        self._append({"identity": self._identity})
        for artifact in recorded or ():
            place = self.folder / artifact.kind
            if place.is_dir() and digests(place) == artifact.files:
                kept.add(artifact.kind)
                self.finish(replace(artifact, path=place))
        for entry in self.folder.iterdir():
            if entry.name not in kept:
                shutil.rmtree(entry)

    def finish(self, artifact: Artifact) -> None:
        """Note that a carrier is complete, so that a later run need not write it again."""
        self._append({**asdict(artifact), "path": "", "files": dict(artifact.files)})
        self.finished[artifact.kind] = artifact

    def _append(self, entry: Mapping[str, object]) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(entry).encode() + b"\n")
        os.fsync(self._journal.fileno())

    def publish(self) -> None:
        """Rename the folder to its final name; what was there comes back if that fails."""
        replaced = self._place.exists()
        if replaced:
            self._place.rename(self._aside)
        done = False
        try:
            self.folder.rename(self._place)
            done = True
        finally:
            if replaced and not done:
                self._aside.rename(self._place)
        shutil.rmtree(self._root)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the folder after a failure; keep it after an interruption that left a result."""
        assert self._journal is not None
        self._journal.close()
        failed = kind is not None and issubclass(kind, Exception)
        if self._root.exists() and (failed or not any(self.folder.iterdir())):
            shutil.rmtree(self._root)
            for parent in self._new_parents:
                if not any(parent.iterdir()):
                    parent.rmdir()


def _read_journal(raw: bytes, identity: str) -> tuple[Artifact, ...] | None:
    """Return the finished carriers that a journal names, or None if it is of another request.

    A kill can tear the last line; what stands before it counts.
    """
    entries = []
    for line in raw.split(b"\n")[:-1]:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    if not entries or entries[0] != {"identity": identity}:
        return None
    found = []
    for entry in entries[1:]:
        match entry:
            case {
                "kind": str(kind),
                "files": dict(files),
                "bytes_written": int(written),
                "bytes_edited": int(edited),
            }:
                found.append(Artifact(kind, Path(), files, written, edited))
    return tuple(found)
