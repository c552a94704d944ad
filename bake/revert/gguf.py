"""Revert a baked GGUF to the file that it was made of, bit for bit.

The base's header, its padding and its edited tensors come from the base; every other tensor comes
from the artifact. Each file of the result is compared with the base's by hash.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

from bake.artifact.artifact import Artifact
from bake.artifact.record import RECORD
from bake.artifact.schema import GgufRecord, Record
from bake.artifact.staged import Place, check_apart, identity_of, write_staged
from bake.checkpoints import TensorInfo
from bake.checkpoints.gguf.file import Gguf, GgufPart, open_gguf
from bake.checkpoints.hashes import sha256_of
from bake.checkpoints.stream import Copy, Fill, Piece
from bake.checkpoints.workers import write_file
from bake.errors import InputError
from bake.progress import Progress, Tally
from bake.revert.checkpoint import KIND, Reverted

_NOTE = "the record has no hash of the base's file: the edited tensors are those of the named one"


@dataclass(frozen=True, slots=True)
class GgufRestoration:
    """Everything that a revert of a GGUF has decided before it writes.

    Attributes:
        folder: the artifact's.
        record: what it says of itself.
        artifact: its model.
        base: the model that it was made of.
        edited: the tensors of the base that the artifact has otherwise.
        created: the tensors that the base does not have.
        proven: whether the base's files have the sha256 that the record names.
    """

    folder: Path
    record: Record
    artifact: Gguf
    base: Gguf
    edited: frozenset[str]
    created: frozenset[str]
    proven: bool

    @property
    def edited_bytes(self) -> int:
        """How many bytes of tensors come from the base."""
        return sum(self.base.tensors[name].nbytes for name in self.edited)


def prepare_gguf_revert(folder: Path, record: Record, file: Path) -> GgufRestoration:
    """Check that a file is the one that the artifact was made of.

    Args:
        folder: the artifact's.
        record: what it says of itself.
        file: what it may have been made of.

    Raises:
        InputError: it is another, or the artifact is not what its record says.
    """
    was = _recorded(folder, record)
    base = open_gguf(file)
    for part, once in zip(base.parts, was.base, strict=False):
        if part.size != once.bytes:
            what = f"it has {part.size} bytes, and {once.name} had {once.bytes}"
            raise _another(what, part.path)
    if len(base.parts) != len(was.base):
        raise _another(f"it has {len(base.parts)} files, and that one had {len(was.base)}", file)
    artifact = open_gguf(folder / was.base[0].name)
    created = frozenset(row.name for row in was.tensors if row.base_type is None)
    edited = frozenset(row.name for row in was.tensors) - created
    _compare_tables(folder, artifact, base, edited, created)
    proven = _proven(record, base)
    return GgufRestoration(folder, record, artifact, base, edited, created, proven)


def _proven(record: Record, base: Gguf) -> bool:
    """Whether the base's files are the recorded ones; False where the record has no hashes.

    Raises:
        InputError: a file has another sha256.
    """
    options = record.export
    if options is None or not options.gguf:
        return False
    recorded = [part.sha256 for part in options.gguf]
    for part, digest in zip_longest(base.parts, recorded):
        if part is None or digest is None or sha256_of(part.path) != digest:
            raise _another("it has another sha256", base.path if part is None else part.path)
    return True


def _another(what: str, path: Path) -> InputError:
    return InputError(
        f"this is not the GGUF that the artifact was made of: {what}",
        where=str(path),
        fix="name the file that the artifact was made of",
    )


def _recorded(folder: Path, record: Record) -> GgufRecord:
    """Return what the record says of the base's files and of the changed tensors."""
    found = record.gguf
    if found is None or found.converter is not None:
        raise InputError(
            "the record does not say which file the artifact was made of",
            where=str(folder),
            why="llama.cpp's converter made it of a baked checkpoint: no base in GGUF was edited",
            fix="convert the base checkpoint with the same converter",
        )
    names = [part.name for part in found.base]
    if not names or any("/" in name or name in ("", ".", "..") for name in names):
        raise InputError("the record is malformed: it names no base file", where=str(folder))
    return found


def _compare_tables(
    folder: Path,
    artifact: Gguf,
    base: Gguf,
    edited: frozenset[str],
    created: frozenset[str],
) -> None:
    """Require that the two files hold the same tensors but for those that the record names."""
    where = str(folder)
    for name, info in base.tensors.items():
        found = artifact.tensors.get(name)
        alike = found is not None and (
            name in edited or (found.kind, found.shape) == (info.kind, info.shape)
        )
        if not alike:
            raise InputError(
                f"the artifact and {base.path.name} disagree about {name}, which the record says "
                "is untouched"
                if found is not None
                else f"the artifact lacks {name}",
                where=where,
                fix="name the file that the artifact was made of",
            )
    lost = sorted((edited - base.tensors.keys()) | (created & base.tensors.keys()))
    surplus = sorted(artifact.tensors.keys() - base.tensors.keys() - created)
    if lost or surplus:
        raise InputError(
            f"the record and {base.path.name} disagree about {(lost + surplus)[0]}",
            where=where,
            fix="name the file that the artifact was made of",
        )


def revert_gguf(
    plan: GgufRestoration,
    out: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Reverted:
    """Write the base's files to the folder ``out``.

    Args:
        plan: as ``prepare_gguf_revert`` returns it.
        out: a folder that does not exist, unless ``force``.
        force: replace an artifact of bake at ``out``.
        progress: called with the bytes that are done and their total, those of the comparison too.

    Raises:
        InputError: a file of the result is not the base's; nothing is left behind.
        UsageError: ``out`` is in the way, or holds the artifact or the base.
    """
    parts = plan.base.parts
    check_apart(out, plan.folder, base=plan.base.path)
    tally = Tally(2 * sum(part.size for part in parts), progress)

    def write(place: Place) -> Artifact:
        files = {}
        for part in parts:
            name, pieces = part.path.name, list(_pieces(plan, part))
            target = place.folder / name
            files[name] = write_file(target, pieces, origin=part.path, advance=tally.advance)
            _check(part, files[name], tally)
        return Artifact(KIND, out, files, sum(part.size for part in parts), plan.edited_bytes)

    read = plan.base.files.stamps | plan.artifact.files.stamps
    facts = [KIND, [str(path.resolve()) for path in read.found], sorted(plan.edited)]
    made = write_staged(out, identity_of(facts, read), force=force, write=write)
    return Reverted(
        path=out,
        files=made.files,
        compared=tuple(made.files),
        edited=tuple(sorted(plan.edited)),
        removed=tuple(sorted(plan.created)),
        bytes_written=made.bytes_written,
        bytes_from_base=plan.edited_bytes,
        left=tuple(sorted({*(plan.record.files or {}), RECORD} - made.files.keys())),
        absent=(),
        notes=() if plan.proven else (_NOTE,),
    )


def _pieces(plan: GgufRestoration, part: GgufPart) -> Iterator[Piece]:
    """Yield the base's header and padding, and every tensor from where it is to come."""
    position = 0
    for info in sorted(part.header.tensors, key=lambda tensor: tensor.start):
        if info.name in plan.edited or not info.nbytes:
            continue
        yield Copy(position, info.start)
        flat = TensorInfo(info.name, "U8", (info.nbytes,), part.path.name, info.start, info.stop)
        yield Fill(flat, partial(plan.artifact.chunks, info.name))
        position = info.stop
    yield Copy(position, part.size)


def _check(part: GgufPart, found: str, tally: Tally) -> None:
    if sha256_of(part.path, tally) != found:
        raise InputError(
            f"the result would not be {part.path.name}",
            where=str(part.path),
            why="the artifact differs from it in more than the tensors that its record names",
            fix="name the file that the artifact was made of, or download the artifact again",
        )
