"""Write an edited checkpoint that differs from its base in the named tensors and nowhere else."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bake.checkpoints import strictjson
from bake.checkpoints.checkpoint import Checkpoint
from bake.checkpoints.config import CONFIG
from bake.checkpoints.outline import (
    File,
    NewTensor,
    closing_files,
    small_files,
    weight_files,
)
from bake.checkpoints.staging import Finished, Staging
from bake.checkpoints.stream import Fill, Producer, can_clone, write_file
from bake.errors import CheckpointError, UsageError
from bake.progress import Progress, Tally

Closing = Callable[[Mapping[str, str]], Mapping[str, bytes]]
Check = Callable[[Path, Mapping[str, str]], None]

_SLACK = 1 << 20  # for directory entries and the journal


@dataclass(frozen=True, slots=True)
class WrittenFiles:
    """What a finished export consists of.

    Attributes:
        path: the output folder.
        files: sha256 by file name, for every file in it.
        bytes_written: the length of all files together.
        bytes_edited: the bytes of replaced and new tensors among them.
    """

    path: Path
    files: Mapping[str, str]
    bytes_written: int
    bytes_edited: int


def write_checkpoint(
    source: Checkpoint,
    out: Path,
    *,
    replace: Mapping[str, Producer],
    new: Mapping[str, NewTensor],
    config_text: str,
    extra_files: Mapping[str, bytes],
    digest: str,
    closing: Closing | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> WrittenFiles:
    """Write ``source`` to ``out`` with some tensors replaced and some added.

    The output appears by one rename when all of it is on disk. An interrupted run is taken up by
    the next one with the same base and digest: a finished shard is not written again.

    Args:
        source: a complete checkpoint on this machine.
        out: the folder to create; an empty one is filled.
        replace: for each tensor to replace, a producer of the new one in the same type and shape.
        new: tensors that the base lacks.
        config_text: the text of the new ``config.json``.
        extra_files: further files, by name relative to ``out``; they replace side files.
        digest: identifies everything that the producers depend on.
        closing: given the sha256 of every file so far, returns the files that speak of them.
        force: replace a checkpoint that exists at ``out``; it stays until the new one is complete.
        progress: called with the bytes of weights that are done and their total.

    Raises:
        CheckpointError: a tensor is missing or present against expectation, a tile does not fit,
            or the disk is too small or cannot be written.
        UsageError: ``out`` exists, overlaps the source or is being written by another run.
    """
    out = clear_of(out, source.path)
    _check_request(source, replace, new, config_text)
    shards, index_text = weight_files(source, replace, new)
    files = small_files(source, config_text, index_text, extra_files, {s.name for s in shards})
    return write_files(
        out,
        shards,
        files,
        identity=_identity(source, digest, replace, new),
        closing=closing,
        force=force,
        progress=progress,
    )


def write_files(
    out: Path,
    shards: tuple[File, ...],
    files: tuple[File, ...],
    *,
    identity: str,
    closing: Closing | None = None,
    check: Check | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> WrittenFiles:
    """Write files to a new folder, which appears by one rename when all of them are on disk.

    Args:
        out: the folder to create, its path resolved.
        shards: the large files: each is kept by itself when the run is interrupted.
        files: the small ones.
        identity: a digest of everything that decides the bytes of the shards.
        closing: given the sha256 of every file so far, returns the files that speak of them.
        check: given the unpublished folder and the sha256 of its files, raises to have it removed.
        force: replace a checkpoint that exists at ``out``.
        progress: called with the bytes of the shards that are done and their total.

    Raises:
        CheckpointError: a tile does not fit, or the disk is too small or cannot be written.
        UsageError: ``out`` exists or is being written by another run.
    """
    tally = Tally(sum(shard.size for shard in shards), progress)
    tally.advance(0)
    stage = Staging(out, identity, force=force)
    try:
        hashes, sizes = _write_all(stage, shards, files, closing, check, tally)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the output: {error.strerror or error}", where=str(error.filename or out)
        ) from error
    written = sum(shard.size for shard in shards) + sizes
    edited = sum(p.info.nbytes for shard in shards for p in shard.pieces if isinstance(p, Fill))
    return WrittenFiles(out, dict(sorted(hashes.items())), written, edited)


def _write_all(
    staging: Staging,
    shards: tuple[File, ...],
    files: tuple[File, ...],
    closing: Closing | None,
    check: Check | None,
    tally: "Tally",
) -> tuple[dict[str, str], int]:
    """Write every file and let the output appear.

    Returns:
        the sha256 of every file, and the bytes of those that are no shards.
    """
    with staging as stage:
        _write_shards(stage, shards, files, tally)
        hashes = {shard.name: stage.finished[shard.name].sha256 for shard in shards}
        for file in files:
            hashes[file.name] = _write_small(stage, file)
        last = () if closing is None else closing_files(closing(dict(hashes)), taken=hashes)
        for file in last:
            hashes[file.name] = _write_small(stage, file)
        if check is not None:
            check(stage.folder, hashes)
        stage.publish()
    return hashes, sum(file.size for file in (*files, *last))


def _write_small(stage: Staging, file: File) -> str:
    target = stage.folder / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_file(target, file.pieces, origin=file.origin, advance=lambda _: None)


def _write_shards(
    stage: Staging, shards: tuple[File, ...], files: tuple[File, ...], tally: "Tally"
) -> None:
    """Write the shards that an earlier run has not finished, each with an entry in the journal."""
    pending = [shard for shard in shards if not _reusable(stage, shard)]
    _check_space(stage.folder, pending, files)
    for shard in shards:
        if shard not in pending:
            tally.advance(shard.size)
            continue
        target = stage.folder / shard.name
        sha256 = write_file(target, shard.pieces, origin=shard.origin, advance=tally.advance)
        stage.record(shard.name, Finished(shard.size, sha256))


def clear_of(out: Path, base: Path) -> Path:
    """Return the output's path in full, once it is clear of a folder that is read.

    Raises:
        UsageError: it is a link, or one of the two holds the other.
    """
    if out.is_symlink():
        raise UsageError(f"{out} is a link", fix="name the folder that it leads to")
    out = out.resolve()
    if out == base or base in out.parents or out in base.parents:
        raise UsageError(
            f"the output {out} and the base {base} overlap",
            why="an export never changes its base",
            fix="name an output outside of it",
        )
    return out


def _check_request(
    source: Checkpoint,
    replace: Mapping[str, Producer],
    new: Mapping[str, NewTensor],
    config_text: str,
) -> None:
    """Refuse what cannot succeed, before the first byte is written."""
    if not source.complete:
        raise UsageError(
            f"{source.source} is not on this machine as a whole",
            fix="open it with complete=True, which downloads what an export copies",
        )
    for name in replace:
        if name not in source.tensors:
            raise CheckpointError(f"there is no tensor {name} to replace", where=source.source)
        _ = source.tensors[name].torch_dtype  # raises for types that no producer can yield
    for name in new:
        if name in source.tensors:
            raise CheckpointError(
                f"{name} is to be added, but the base has it", where=source.source
            )
    strictjson.parse_object(config_text, where=f"new {CONFIG}", constants=True)


def _identity(
    source: Checkpoint,
    digest: str,
    replace: Mapping[str, Producer],
    new: Mapping[str, NewTensor],
) -> str:
    """Return a digest of what decides the weights' bytes, for the journal.

    The base counts by its headers, lengths and times of change, since to hash it would take as long
    as to write the output.
    """
    times = [source.file(shard).stat().st_mtime_ns for shard in source.shards]
    added = sorted((name, tensor.dtype, list(tensor.shape)) for name, tensor in new.items())
    facts = [digest, str(source.path), source.digest(), times, sorted(replace), added]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _reusable(stage: Staging, shard: File) -> bool:
    """Tell whether an earlier run finished this shard and its bytes are still those."""
    finished = stage.finished.get(shard.name)
    if finished is None or finished.bytes != shard.size:
        return False
    with (stage.folder / shard.name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == finished.sha256


def _check_space(folder: Path, pending: list[File], files: tuple[File, ...]) -> None:
    """Require room for all that is still to be written.

    Raises:
        CheckpointError: the disk is too small; nothing has been written.
    """
    cloned = any(
        shard.origin is not None and can_clone(shard.origin, folder) for shard in pending[:1]
    )
    needed = _SLACK + sum(shard.fresh if cloned else shard.size for shard in pending)
    needed += sum(file.size for file in files)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"the disk is too small: needed {needed} bytes, free {free}",
            where=str(folder.parent.parent),
            fix="free some space, or name an output on another disk",
        )
