"""Write the files of a GGUF model that differs from its base in some tensors and two keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bake import __version__
from bake.artifact import schema
from bake.artifact.record import RECORD, new_record, record_text
from bake.checkpoints import TensorInfo
from bake.checkpoints.gguf.codec import FLOATS
from bake.checkpoints.gguf.file import Gguf, GgufPart
from bake.checkpoints.gguf.header import GgufTensor, GgufValue, build_header, like, string_value
from bake.checkpoints.gguf.types import GgmlType
from bake.checkpoints.stream import Fill, Literal, Piece, Producer
from bake.checkpoints.workers import write_file
from bake.checkpoints.writer import require_space
from bake.edit_store import edit_files
from bake.families.gguf import gguf_names
from bake.outputs.gguf.modelfile import MODELFILE, modelfile
from bake.outputs.measure import Measure
from bake.plan import Plan
from bake.plan.record import plan_record
from bake.progress import Progress

KEYS = "bake."
"""What bake's own metadata keys begin with."""


@dataclass(frozen=True, slots=True, eq=False)
class NewBytes:
    """A tensor of the output that is not copied."""

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    produce: Producer
    measure: Measure | None
    base: str | None
    """The type that the base file has it in; None where it has no such tensor."""
    exact: Producer
    """Yields the rows in float64, before they are rounded."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.kind.tensor_bytes(self.shape, where=self.name)


def write_parts(
    model: Gguf,
    new: Mapping[str, NewBytes],
    plan: Plan,
    folder: Path,
    progress: Progress | None,
) -> dict[str, str]:
    """Write every file of the model and return each one's SHA-256 by name."""
    created = [tensor for tensor in new.values() if tensor.name not in model.tensors]
    tables = {
        part.path.name: _table(part, new, created if part is model.parts[-1] else [])
        for part in model.parts
    }
    total = sum(tensor.nbytes for table in tables.values() for tensor in table)
    require_space(folder, total)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total)

    files = {}
    for part in model.parts:
        name = part.path.name
        pieces = _pieces(part, tables[name], _metadata(model, part, plan, len(created)), model, new)
        files[name] = write_file(folder / name, pieces, origin=None, advance=advance)
    if progress is not None:
        progress(total, total)
    return files


def with_tensor(model: Gguf, tensor: NewBytes) -> tuple[list[Piece], int]:
    """Return a model of one file with one more tensor, and its size: all else byte for byte."""
    (part,) = model.parts
    table = _table(part, {}, [tensor])
    pieces = _pieces(part, table, part.header.metadata, model, {tensor.name: tensor})
    literal = sum(len(piece.data) for piece in pieces if isinstance(piece, Literal))
    return pieces, literal + sum(one.nbytes for one in table)


def _table(
    part: GgufPart, new: Mapping[str, NewBytes], created: list[NewBytes]
) -> list[GgufTensor | NewBytes]:
    """Return the tensors of one file, in order; created ones come last."""
    own: list[GgufTensor | NewBytes] = [new.get(t.name, t) for t in part.header.tensors]
    return [*own, *created]


def _metadata(model: Gguf, part: GgufPart, plan: Plan, created: int) -> dict[str, GgufValue]:
    """Return the file's metadata: its own bytes, and in the first file bake's keys behind them."""
    found = {k: v for k, v in part.header.metadata.items() if not k.startswith(KEYS)}
    total = found.get("split.tensors.count")
    if total is not None and created:
        found["split.tensors.count"] = like(total, len(model.tensors) + created)
    if part is model.parts[0]:
        found[f"{KEYS}version"] = string_value(__version__)
        found[f"{KEYS}plan_digest"] = string_value(plan.digest)
    return found


def _pieces(
    part: GgufPart,
    table: list[GgufTensor | NewBytes],
    metadata: Mapping[str, GgufValue],
    model: Gguf,
    new: Mapping[str, NewBytes],
) -> list[Piece]:
    """Return the bytes of one file: header, then tensor and padding by turns."""
    header = part.header
    rows = [(tensor.name, tensor.kind, tensor.shape) for tensor in table]
    first, placed = build_header(
        header.version, header.alignment, metadata, rows, shard=part.path.name
    )
    pieces: list[Piece] = [Literal(first)]
    for info in placed:
        fresh = new.get(info.name)
        pieces.append(_copied(info, model) if fresh is None else _filled(info, fresh))
        gap = -info.nbytes % header.alignment
        pieces.append(Literal(bytes(gap)))
    return pieces


def _copied(info: GgufTensor, model: Gguf) -> Fill:
    flat = TensorInfo(info.name, "U8", (info.nbytes,), info.shard, info.start, info.stop)
    return Fill(flat, lambda: model.chunks(info.name))


def _filled(info: GgufTensor, tensor: NewBytes) -> Fill:
    width = info.kind.row_bytes(info.shape[-1], where=info.name)
    shape = (info.nbytes // width, width)
    table = TensorInfo(info.name, "U8", shape, info.shard, info.start, info.stop)
    return Fill(table, tensor.produce)


def write_small(
    model: Gguf,
    new: Mapping[str, NewBytes],
    plan: Plan,
    folder: Path,
    files: dict[str, str],
    record: schema.Provenance,
) -> None:
    """Write edits, Modelfile and last the record, and add their digests to ``files``."""
    small = edit_files(plan.reference, plan.edits)
    if len(model.parts) == 1:  # Ollama reads no split model
        small[MODELFILE] = modelfile(model.path.name).encode()
    for name, data in small.items():
        files[name] = _write(folder / name, data)
    made = new_record(
        record,
        "gguf",
        plan_record(plan, "gguf", codes=_has_codes(new)),
        files=dict(sorted(files.items())),
        gguf=_gguf_record(model, new, plan),
    )
    files[RECORD] = _write(folder / RECORD, record_text(made).encode())


def _has_codes(new: Mapping[str, NewBytes]) -> bool:
    """Whether an edited tensor is stored in blocks of codes, which rounds the edit."""
    return any(t.kind.name not in FLOATS for t in new.values() if t.measure is not None)


def _write(target: Path, data: bytes) -> str:
    target.parent.mkdir(exist_ok=True)
    return write_file(target, [Literal(data)], origin=None, advance=lambda _: None)


def _gguf_record(model: Gguf, new: Mapping[str, NewBytes], plan: Plan) -> schema.GgufRecord:
    """Return what the record says of the file: where it came from, and every new tensor."""
    parts = model.parts
    return schema.GgufRecord(
        base=tuple(schema.GgufPart(name=part.path.name, bytes=part.size) for part in parts),
        architecture=gguf_names(plan.layout).arch,
        file_type=parts[0].header.number("general.file_type"),
        tensors=tuple(_tensor_record(tensor) for tensor in new.values()),
    )


def _tensor_record(tensor: NewBytes) -> schema.GgufTensor:
    measured = {} if tensor.measure is None else tensor.measure.record()
    about = {"name": tensor.name, "type": tensor.kind.name, "base_type": tensor.base}
    return schema.GgufTensor.of(about | measured)
