"""Write an edited checkpoint that differs from its base in the named tensors and nowhere else."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bake.checkpoints import strictjson
from bake.checkpoints.config import CONFIG
from bake.checkpoints.hashes import sha256_of
from bake.checkpoints.outline import (
    File,
    NewCheckpoint,
    closing_files,
    small_files,
    weight_files,
)
from bake.checkpoints.stream import Draft, Fill, can_clone
from bake.checkpoints.workers import write_all
from bake.errors import CheckpointError, UsageError
from bake.progress import Progress, Tally

Closing = Callable[[Mapping[str, str]], Mapping[str, bytes]]
Check = Callable[[Path, Mapping[str, str]], None]

_SLACK = 1 << 20  # for directory entries and the journal


@dataclass(frozen=True, slots=True)
class Finished:
    """A file that is complete."""

    bytes: int
    sha256: str


class Target(Protocol):
    """A folder to write into, which knows the files that an earlier run has finished there."""

    @property
    def folder(self) -> Path:
        """Where to write."""

    def finished(self, name: str) -> Finished | None:
        """Return what is known of a file that is complete."""

    def record(self, name: str, finished: Finished) -> None:
        """Note that a file is complete, so that a later run need not write it again."""


@dataclass(frozen=True, slots=True)
class EmptyFolder:
    """A target that no earlier run has written to."""

    folder: Path

    def finished(self, name: str) -> None:
        """Nothing is."""

    def record(self, name: str, finished: Finished) -> None:
        """Nobody will ask."""


@dataclass(frozen=True, slots=True)
class WrittenFiles:
    """What was written.

    Attributes:
        files: sha256 by file name, for every file in the folder.
        bytes_written: the length of all files together.
        bytes_edited: the bytes of replaced and new tensors among them.
    """

    files: Mapping[str, str]
    bytes_written: int
    bytes_edited: int


def write_checkpoint(
    made: NewCheckpoint,
    target: Target,
    *,
    closing: Closing | None = None,
    progress: Progress | None = None,
) -> WrittenFiles:
    """Write a checkpoint into a folder. A shard that an earlier run has finished is kept.

    Args:
        made: what to write.
        target: where.
        closing: given the sha256 of every file so far, returns the files that speak of them.
        progress: called with the bytes of weights that are done and their total.

    Raises:
        CheckpointError: a tensor is missing or present against expectation, a tile does not fit,
            or the disk is too small.
        UsageError: the base is not on this machine as a whole, or a file has a name that is taken.
    """
    _check_request(made)
    shards, index_text = weight_files(made)
    files = small_files(made, index_text, {shard.name for shard in shards})
    return write_files(target, shards, files, closing=closing, progress=progress)


def write_files(
    target: Target,
    shards: tuple[File, ...],
    files: tuple[File, ...],
    *,
    closing: Closing | None = None,
    check: Check | None = None,
    progress: Progress | None = None,
) -> WrittenFiles:
    """Write files into a folder.

    Args:
        target: where.
        shards: the large files: each is kept by itself when the run is interrupted.
        files: the small ones.
        closing: given the sha256 of every file so far, returns the files that speak of them.
        check: given the folder and the sha256 of its files, raises where they are wrong.
        progress: called with the bytes of the shards that are done and their total.

    Raises:
        CheckpointError: a tile does not fit, or the disk is too small.
    """
    hashes = _write_shards(target, shards, files, progress)
    hashes |= _write_small(target, files)
    last = () if closing is None else closing_files(closing(dict(hashes)), taken=hashes)
    hashes |= _write_small(target, last)
    if check is not None:
        check(target.folder, hashes)
    written = sum(file.size for file in (*shards, *files, *last))
    edited = sum(p.info.nbytes for shard in shards for p in shard.pieces if isinstance(p, Fill))
    return WrittenFiles(dict(sorted(hashes.items())), written, edited)


def _write_small(target: Target, files: Sequence[File]) -> dict[str, str]:
    """Write files that a later run would write again, and return their sha256."""
    hashes: dict[str, str] = {}
    names = {target.folder / file.name: file.name for file in files}

    def finish(path: Path, sha256: str) -> None:
        hashes[names[path]] = sha256

    write_all(_drafts(target, files), advance=lambda _: None, finish=finish)
    return {file.name: hashes[file.name] for file in files}


def _write_shards(
    target: Target, shards: tuple[File, ...], files: tuple[File, ...], progress: Progress | None
) -> dict[str, str]:
    """Write the shards that an earlier run has not finished, and return the sha256 of all."""
    tally = Tally(sum(shard.size for shard in shards), progress)
    tally.advance(0)
    hashes = {s.name: found for s in shards if (found := _finished(target, s)) is not None}
    pending = {target.folder / s.name: s for s in shards if s.name not in hashes}
    _check_space(target.folder, list(pending.values()), files)
    for shard in shards:
        if shard.name in hashes:
            tally.advance(shard.size)

    def finish(path: Path, sha256: str) -> None:
        shard = pending[path]
        target.record(shard.name, Finished(shard.size, sha256))
        hashes[shard.name] = sha256

    drafts = _drafts(target, pending.values())
    write_all(drafts, advance=tally.advance, finish=finish)
    return {shard.name: hashes[shard.name] for shard in shards}


def _drafts(target: Target, files: Iterable[File]) -> list[Draft]:
    return [Draft(target.folder / file.name, file.pieces, file.origin) for file in files]


def _finished(target: Target, shard: File) -> str | None:
    """Return the sha256 of a shard that an earlier run finished and whose bytes are still those."""
    finished = target.finished(shard.name)
    if finished is None or finished.bytes != shard.size:
        return None
    found = sha256_of(target.folder / shard.name)
    return found if found == finished.sha256 else None


def _check_request(made: NewCheckpoint) -> None:
    """Refuse what cannot succeed, before the first byte is written."""
    source = made.source
    if not source.complete:
        raise UsageError(
            f"{source.source} is not on this machine as a whole",
            fix="open it with complete=True, which downloads what an export copies",
        )
    for name in made.replace:
        if name not in source.tensors:
            raise CheckpointError(f"there is no tensor {name} to replace", where=source.source)
        _ = source.tensors[name].torch_dtype  # raises for types that no producer can yield
    for name in made.new:
        if name in source.tensors:
            raise CheckpointError(
                f"{name} is to be added, but the base has it", where=source.source
            )
    strictjson.parse_object(made.config_text, where=f"new {CONFIG}", constants=True)


def _check_space(folder: Path, pending: list[File], files: tuple[File, ...]) -> None:
    """Require room for all that is still to be written.

    Raises:
        CheckpointError: the disk is too small; nothing has been written.
    """
    cloned = any(
        shard.origin is not None and can_clone(shard.origin, folder) for shard in pending[:1]
    )
    needed = _SLACK + sum(shard.fresh if cloned else shard.size for shard in pending)
    require_space(folder, needed + sum(file.size for file in files))


def require_space(folder: Path, needed: int) -> None:
    """Require room on the disk of a folder that is written to.

    Raises:
        CheckpointError: there is too little.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"the disk is too small: needed {needed} bytes, free {free}",
            where=str(folder.parent.parent),
            fix="free some space, or name an output on another disk",
        )
