"""Revert a baked checkpoint to its base, bit for bit.

Only the edited tensors differ between the two, so only their ranges are read of the base, with its
config, its index and its headers. Everything else is copied from the artifact, and every file of
the result is compared with the base's by hash before the folder appears.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bake.artifact.artifact import Artifact
from bake.artifact.schema import Record
from bake.artifact.staged import Identity, Place, check_apart, identity_of, write_staged
from bake.checkpoints import Checkpoint, TensorInfo, open_checkpoint
from bake.checkpoints.config import CONFIG
from bake.checkpoints.hashes import Stated, sha256_of
from bake.checkpoints.index import INDEX
from bake.checkpoints.outline import File
from bake.checkpoints.source import Counted
from bake.checkpoints.stream import Copy, Fill, Literal, Piece
from bake.checkpoints.writer import write_files
from bake.errors import CheckpointError, InputError
from bake.progress import Progress, Tally
from bake.revert.proof import prove_base

KIND = "reverted"


@dataclass(frozen=True, slots=True)
class Reverted:
    """What a revert wrote.

    Attributes:
        path: the folder.
        files: sha256 by name.
        compared: the files whose bytes were compared with the base's and are equal.
        edited: the tensors that came from the base.
        removed: the tensors that the edit had created.
        bytes_written: of all files.
        bytes_from_base: the tensors' bytes that were read of the base to restore it.
        left: files of the artifact that are bake's own, or its card's, and not the base's.
        absent: files of the base that an export does not carry, and so a revert does not restore.
        notes: what else there is to say.
    """

    path: Path
    files: Mapping[str, str]
    compared: tuple[str, ...]
    edited: tuple[str, ...]
    removed: tuple[str, ...]
    bytes_written: int
    bytes_from_base: int
    left: tuple[str, ...]
    absent: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def bit_for_bit(self) -> bool:
        """Whether every file was compared with the base's and equals it."""
        return len(self.compared) == len(self.files)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        facts = {"kind": KIND, **asdict(self), "path": str(self.path)}
        return {**facts, "bit_for_bit": self.bit_for_bit}


@dataclass(frozen=True, slots=True)
class Restoration:
    """Everything that a revert of a checkpoint has decided before it writes.

    Attributes:
        artifact: the artifact's checkpoint.
        base: the base, which reads through ``counted``.
        counted: how many bytes of its tensors the restoration has read.
        hub: what the Hub states of the base's files; nothing where it is no repository.
        shards: the artifact's shard by the base's name of it.
        edited: the tensors of the base that the artifact has otherwise.
        created: the tensors that the base does not have.
        notes: what there is to say of the base.
    """

    artifact: Checkpoint
    base: Checkpoint
    counted: Counted
    hub: Mapping[str, Stated]
    shards: Mapping[str, str]
    edited: frozenset[str]
    created: frozenset[str]
    notes: tuple[str, ...]

    @property
    def edited_bytes(self) -> int:
        """How many bytes of tensors come from the base."""
        return sum(self.base.tensors[name].nbytes for name in self.edited)


def prepare_revert(
    folder: Path, record: Record, base: Checkpoint, progress: Progress | None = None
) -> Restoration:
    """Check that the base is the artifact's, and decide which bytes come from which.

    A base that is not the recorded commit of a repository is baked again and compared with the
    artifact, which reads its edited tensors once more.

    Args:
        folder: the artifact's.
        record: what it says of itself.
        base: as ``open_base`` returns it.
        progress: called with the bytes of tensors that are compared and their total.

    Raises:
        InputError: the base or the artifact is not the recorded one.
        HubError: the Hub refuses or cannot be reached.
    """
    artifact = open_checkpoint(folder)
    shards = _matched(record, artifact, base)
    hub = base.stated()
    # Offline the bytes are those of the cache, which nobody has compared with the Hub's hashes.
    pinned = bool(hub) and base.revision == record.base.revision
    note = None if pinned else prove_base(record, base, artifact, progress)
    counted = Counted(base.files)
    return Restoration(
        artifact=artifact,
        base=replace(base, files=counted),
        counted=counted,
        hub=hub,
        shards=shards,
        edited=record.plan.edited,
        created=record.plan.created,
        notes=() if note is None else (note,),
    )


def _matched(record: Record, artifact: Checkpoint, base: Checkpoint) -> dict[str, str]:
    """Return the artifact's shard by the base's name, each with the very header of the base's."""
    lost = sorted(base.tensors.keys() - artifact.tensors.keys())
    surplus = sorted(artifact.tensors.keys() - base.tensors.keys() - record.plan.created)
    if lost or surplus:
        what = f"lacks {lost[0]}" if lost else f"holds {surplus[0]}, which nothing accounts for"
        raise InputError(f"is not what the record says: it {what}", where=str(artifact.path))
    for info in base.tensors.values():
        if artifact.tensors[info.name].shape != info.shape:
            raise InputError(
                f"cannot be reverted: {info.name} has another shape than in the base",
                where=str(artifact.path),
                why="the model was widened, and every tensor of the stream was written anew",
                fix=f"take the base itself, {base.source}",
            )
    found: dict[str, str] = {}
    for info in base.tensors.values():
        found.setdefault(info.shard, artifact.tensors[info.name].shard)
    for ours, theirs in found.items():
        if base.header_digests[ours] != artifact.header_digests[theirs]:
            raise InputError(
                f"the header of {theirs} is not that of the base's {ours}",
                where=str(artifact.path),
                fix="name the base that the record names, or download the artifact again",
            )
    return found


def base_hashes(plan: Restoration, progress: Progress | None = None) -> dict[str, Stated]:
    """Return what every file of the result must hash to: the Hub's word, or the base's own files.

    Args:
        plan: as ``prepare_revert`` returns it.
        progress: called with the bytes of a base in a folder that are hashed and their total.
    """
    base = plan.base
    names = [*base.shards, CONFIG, *base.side_files]
    names += [INDEX] if base.index_text is not None else []
    if plan.hub:
        return {name: plan.hub[name] for name in names if name in plan.hub}
    here = {name: base.file(name) for name in names if (base.path / name).exists()}
    sizes = {name: path.stat().st_size for name, path in here.items()}
    tally = Tally(sum(sizes.values()), progress)
    return {name: Stated(sizes[name], sha256_of(path, tally), "") for name, path in here.items()}


def revert_checkpoint(
    plan: Restoration,
    out: Path,
    stated: Mapping[str, Stated],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Reverted:
    """Write the base to ``out``.

    An interrupted run is taken up by the next one with the same artifact and base.

    Args:
        plan: as ``prepare_revert`` returns it.
        out: a folder that does not exist, unless ``force``.
        stated: what ``base_hashes`` returned for this plan.
        force: replace an artifact of bake at ``out``.
        progress: called with the bytes of weights that are done and their total.

    Raises:
        InputError: a file of the result is not the base's; nothing is left behind.
        UsageError: ``out`` is in the way, or is the artifact or the base.
        HubError: the Hub refuses or cannot be reached.
    """
    base = plan.base
    check_apart(out, plan.artifact.path)
    if base.revision is None:
        check_apart(out, base.path)

    def write(place: Place) -> Artifact:
        shards = tuple(_shard(plan, name) for name in base.shards)
        small = tuple(_small(plan, stated))
        check = partial(_check, plan, stated)
        found = write_files(place, shards, small, check=check, progress=progress)
        return Artifact(KIND, out, found.files, found.bytes_written, found.bytes_edited)

    made = write_staged(out, _identity(plan), force=force, write=write)
    own = {*plan.artifact.side_files, *plan.artifact.left_out} - set(base.side_files)
    return Reverted(
        path=out,
        files=made.files,
        compared=tuple(name for name in made.files if name in stated),
        edited=tuple(sorted(plan.edited)),
        removed=tuple(sorted(plan.created)),
        bytes_written=made.bytes_written,
        bytes_from_base=plan.counted.count,
        left=tuple(sorted(own)),
        absent=tuple(sorted(base.left_out)),
        notes=plan.notes,
    )


def _shard(plan: Restoration, name: str) -> File:
    """Return one shard: the artifact's bytes, with those of the base where a tensor was edited."""
    base, theirs = plan.base, plan.shards[name]
    size = base.shard_sizes[name]
    pieces: list[Piece] = []
    position = 0
    for info in base.tensors.values():
        if info.shard == name and info.name in plan.edited and info.nbytes:
            flat = TensorInfo(info.name, "U8", (info.nbytes,), name, info.start, info.stop)
            produce = partial(_bytes, base, info)
            pieces += [Copy(position, info.start), Fill(flat, produce)]
            position = info.stop
    pieces.append(Copy(position, size))
    return File(name, size, tuple(pieces), plan.artifact.file(theirs))


def _bytes(base: Checkpoint, info: TensorInfo) -> Iterator[Tensor]:
    for chunk in base.chunks(info.shard, info.start, info.stop):
        yield torch.frombuffer(chunk, dtype=torch.uint8)


def _small(plan: Restoration, stated: Mapping[str, Stated]) -> Iterator[File]:
    """Yield the files that hold no weights; those that the artifact has unchanged come from it."""
    base = plan.base
    texts = {CONFIG: base.config_text}
    if base.index_text is not None:
        texts[INDEX] = base.index_text
    for name, text in texts.items():
        data = text.encode()
        yield File(name, len(data), (Literal(data),))
    for name in base.side_files:
        origin = plan.artifact if name in plan.artifact.side_files else base
        path = origin.fetched(name)
        if name not in stated or not stated[name].matches(path):
            path = base.fetched(name)
        size = path.stat().st_size
        yield File(name, size, (Copy(0, size),), path)


def _check(
    plan: Restoration, stated: Mapping[str, Stated], folder: Path, hashes: Mapping[str, str]
) -> None:
    """Refuse a result that is not the base, before anybody sees it."""
    wrong = [
        name
        for name, found in hashes.items()
        if name in stated and not stated[name].matches(folder / name, found)
    ]
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(hashes)} files would not be the base's, first {wrong[0]}"
            + _culprit(plan, wrong[0]),
            where=str(plan.artifact.path),
            why="the artifact differs from this base in more than what its record names",
            fix="see `bake diff BASE OUT`; download the artifact again, or name its own base",
        )
    for name, digest in open_checkpoint(folder).header_digests.items():
        if digest != plan.base.header_digests[name]:
            raise CheckpointError("has another header than the base's", where=name)


def _culprit(plan: Restoration, name: str) -> str:
    """Return which tensor of a shard differs, where both models are on this machine."""
    base = plan.base
    if base.revision is not None or name not in base.shards:
        return ""
    for info in base.tensors.values():
        untouched = info.shard == name and info.name not in plan.edited
        if untouched and base.tensor_digest(info.name) != plan.artifact.tensor_digest(info.name):
            return f": {info.name} differs, which the plan leaves alone"
    return ""


def _identity(plan: Restoration) -> Identity:
    artifact, base = plan.artifact, plan.base
    places = [base.source, base.revision, str(artifact.path)]
    facts = [KIND, *places, base.digest(), artifact.digest(), sorted(plan.edited)]
    return identity_of(facts, artifact.files.stamps | base.files.stamps)
