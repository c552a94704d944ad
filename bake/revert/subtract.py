"""Subtract an edit from a checkpoint without its base, and say how exact that is."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bake.checkpoints import Checkpoint, Producer, open_checkpoint
from bake.checkpoints.config import CONFIG
from bake.checkpoints.index import INDEX
from bake.checkpoints.outline import File
from bake.checkpoints.stream import Copy, Fill, Literal, Piece
from bake.checkpoints.writer import clear_of, write_files
from bake.errors import InputError, UsageError
from bake.plan import Plan
from bake.progress import Progress
from bake.revert.layout import BaseLayout, base_layout
from bake.revert.plan import recompiled, recorded_edits, same_updates
from bake.revert.record import RevertRecord
from bake.revert.tensors import Recovered, Subtraction, norm_inverses

_ANY = math.pi
"""In place of a norm that is not known: a value that no edit maps to itself by chance."""


@dataclass(frozen=True, slots=True)
class Subtracted:
    """What a subtraction wrote.

    Attributes:
        path: the folder.
        files: sha256 by name.
        tensors: how exact each tensor is that was computed back; every other is the base's.
        removed: the tensors that the edit had created.
        bytes_written: of all files.
        left: files of the artifact that its export did not write or that are bake's own.
        same_layout: whether config, index and headers are known to be the base's to the byte.
    """

    path: Path
    files: Mapping[str, str]
    tensors: tuple[Recovered, ...]
    removed: tuple[str, ...]
    bytes_written: int
    left: tuple[str, ...]
    same_layout: bool

    @property
    def elements(self) -> int:
        """Values that were computed back."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def uncertain(self) -> int:
        """Values among them that may differ from the base's."""
        return sum(tensor.uncertain for tensor in self.tensors)

    @property
    def bound(self) -> float:
        """No value is further from the base's than this."""
        return max((tensor.bound for tensor in self.tensors), default=0.0)

    @property
    def relative(self) -> float:
        """The same as a share of the largest value of the tensor, for the worst tensor."""
        shares = [tensor.bound / tensor.largest for tensor in self.tensors if tensor.largest]
        return max(shares, default=0.0)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that a subtraction has decided before it writes."""

    record: RevertRecord
    artifact: Checkpoint
    layout: BaseLayout
    subtraction: Subtraction


def prepare_subtraction(record: RevertRecord, progress: Progress | None = None) -> Prepared:
    """Compile the plan again and turn it round.

    Args:
        record: of the artifact.
        progress: called with the bytes of the artifact that are hashed and their total.

    Raises:
        InexactPlan: the edit took something away that only the base has.
        InputError: the artifact is not what its record says.
        UsageError: it is no checkpoint.
    """
    if record.kind == "merge":
        raise UsageError(
            "a merge cannot be subtracted",
            why="the artifact keeps no copy of the adapter that was merged into it",
            fix="name the base with --base MODEL: then it is exact",
        )
    if record.kind != "checkpoint":
        raise UsageError(
            f"an edit cannot be subtracted from a {record.kind} artifact",
            why="its tensors were rounded to the file's own types after the edit",
            fix="name the file that it was made of: --base FILE.gguf",
        )
    artifact = open_checkpoint(record.folder)
    layout = base_layout(record, artifact)
    plan = _plan(record, artifact, layout.base)
    if not same_updates(record, plan):
        raise InputError(
            "the recorded edits do not lead to the recorded plan, so they are not subtracted",
            where=str(record.folder),
            why="another version of bake made the artifact, or its config.json was changed",
            fix="name the base with --base MODEL, or use the version that the record names",
        )
    norms = {
        update.name: update.replacement
        for update in plan.tensors
        if update.replacement is not None and not update.create
    }
    inverses = {}
    if norms:
        lower, upper = (_plan(record, artifact, layout.base, value) for value in (0.0, 1.0))
        inverses = norm_inverses(lower, upper, norms)
    subtraction = Subtraction(plan, artifact, inverses)
    subtraction.check()
    _check_shards(record, artifact, progress)
    return Prepared(record, artifact, layout, subtraction)


def _check_shards(record: RevertRecord, artifact: Checkpoint, progress: Progress | None) -> None:
    """Require the shards that the export wrote: nothing else says what untouched tensors were."""
    recorded = record.content.get("files", {})
    total, done = sum(artifact.shard_sizes.values()), 0
    for name in artifact.shards:
        digest = hashlib.sha256()
        for chunk in artifact.chunks(name, 0, artifact.shard_sizes[name]):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
        if str(recorded.get(name)).removeprefix("sha256:") != digest.hexdigest():
            raise InputError(
                f"{name} is not what the record lists",
                where=str(record.folder),
                why="without the base nothing else says what its tensors were",
                fix="download the artifact again, or name the base with --base MODEL",
            )


def _plan(record: RevertRecord, artifact: Checkpoint, base: Checkpoint, norm: float = _ANY) -> Plan:
    """Return the plan for the base's norms; those that it replaces are all of one value."""

    def gain(name: str) -> torch.Tensor:
        found = artifact.read(name).to(torch.float64)
        return torch.full_like(found, norm) if name in record.edited else found

    return recompiled(record, recorded_edits(record), base, gain)


def subtract(
    prepared: Prepared,
    out: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Subtracted:
    """Write what the base must have been to ``out``.

    An interrupted run is taken up by the next one with the same artifact.

    Args:
        prepared: as ``prepare_subtraction`` returns it.
        out: a folder that does not exist, unless ``force``.
        force: replace a checkpoint at ``out``.
        progress: called with the bytes of weights that are done and their total.

    Raises:
        InputError: a value does not fit its type; nothing is left behind.
        UsageError: ``out`` is in the way, or is the artifact.
    """
    artifact, layout = prepared.artifact, prepared.layout
    base, work = layout.base, prepared.subtraction
    producers = work.producers()
    written = write_files(
        clear_of(out, artifact.path),
        tuple(_shard(layout, artifact, name, producers) for name in base.shards),
        tuple(_small(artifact, base)),
        identity=_identity(prepared),
        check=partial(_check, base),
        force=force,
        progress=progress,
    )
    for name in producers.keys() - work.measured.keys():  # their shards were finished earlier
        for _ in producers[name]():
            pass
    own = {*artifact.side_files, *artifact.left_out} - set(base.side_files)
    return Subtracted(
        path=written.path,
        files=written.files,
        tensors=tuple(work.measured[name] for name in sorted(producers)),
        removed=tuple(sorted(prepared.record.created)),
        bytes_written=written.bytes_written,
        left=tuple(sorted(own)),
        same_layout=layout.exact,
    )


def _shard(
    layout: BaseLayout, artifact: Checkpoint, name: str, producers: Mapping[str, Producer]
) -> File:
    size = layout.base.shard_sizes[name]
    pieces: list[Piece] = []
    position = 0
    for info in layout.base.tensors.values():
        if info.shard == name and info.name in producers:
            pieces += [Copy(position, info.start), Fill(info, producers[info.name])]
            position = info.stop
    pieces.append(Copy(position, size))
    return File(name, size, tuple(pieces), artifact.file(layout.shards[name]))


def _small(artifact: Checkpoint, base: Checkpoint) -> list[File]:
    texts = {CONFIG: base.config_text}
    if base.index_text is not None:
        texts[INDEX] = base.index_text
    files = [
        File(name, len(text.encode()), (Literal(text.encode()),)) for name, text in texts.items()
    ]
    for name in base.side_files:
        path = artifact.file(name)
        size = path.stat().st_size
        files.append(File(name, size, (Copy(0, size),), path))
    return files


def _check(base: Checkpoint, folder: Path, hashes: Mapping[str, str]) -> None:
    """Require that the result opens as the checkpoint that it is meant to be."""
    found = open_checkpoint(folder)
    if found.digest() != base.digest():
        raise InputError("the result has another layout than was meant", where=str(folder))


def _identity(prepared: Prepared) -> str:
    artifact, record = prepared.artifact, prepared.record
    times = [artifact.file(name).stat().st_mtime_ns for name in artifact.shards]
    edits = prepared.subtraction.plan.digest
    facts = ["subtract", str(artifact.path), artifact.digest(), times, edits, record.base_digest]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
