"""Which files an edited checkpoint consists of, piece by piece, before any is written.

Every shard keeps its name, its header's bytes and the order of its tensors. New tensors go into one
shard more. Its name, and what happens to a model in one file, follows from how the runtimes choose
their files:

- transformers takes ``model.safetensors`` when it exists and looks at the index only otherwise
  (``modeling_utils.py: _get_resolved_checkpoint_files``), so beside that name a second shard would
  be ignored. A model in one file therefore becomes ``model-00001-of-00002.safetensors``, with the
  same bytes, and the new tensors become ``model-00002-of-00002.safetensors``.
- llama.cpp's converter reads the files that the index names, and needs each tensor of each of them
  in the index; without an index it reads every ``model*.safetensors``
  (``conversion/base.py: index_tensors``). vLLM globs ``*.safetensors`` and drops what the index
  does not name (``weight_utils.py: filter_duplicate_safetensors_files``), but it takes any
  ``consolidated*.safetensors`` first (``default_loader.py: _prepare_weights``), so weights beside
  the index are left out of the output. A sharded model keeps its names and gains
  ``model-bake-00001-of-00001.safetensors``.
"""

from collections.abc import Container, Mapping, Set
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from pathlib import Path

from bake.checkpoints.checkpoint import Checkpoint
from bake.checkpoints.config import CONFIG
from bake.checkpoints.header import TensorInfo, build_header
from bake.checkpoints.index import INDEX, SINGLE, extend_index, is_plain
from bake.checkpoints.stream import Copy, Fill, Literal, Piece, Producer
from bake.errors import CheckpointError, UsageError


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that the base lacks, or has in another form.

    Attributes:
        dtype: the storage type as safetensors spells it.
        shape: the sizes of its axes.
        produce: yields its tiles.
        name: of one that stands in for a tensor of the base, where it has another name than that.
    """

    dtype: str
    shape: tuple[int, ...]
    produce: Producer
    name: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class NewCheckpoint:
    """A checkpoint that differs from its base in some tensors.

    Attributes:
        source: the base: a complete checkpoint on this machine.
        replace: for each tensor to replace, a producer of the new one in the same type and shape.
        new: tensors that the base lacks.
        config_text: the text of the new ``config.json``.
        extra_files: further files, by name relative to the folder; they replace side files.
        reshaped: tensors of the base that get another shape, type or name; their shards are laid
            out anew.
        dropped: tensors of the base that the result lacks, likewise.
    """

    source: Checkpoint
    replace: Mapping[str, Producer]
    new: Mapping[str, NewTensor]
    config_text: str
    extra_files: Mapping[str, bytes]
    reshaped: Mapping[str, NewTensor] = field(default_factory=dict)
    dropped: Set[str] = frozenset()


@dataclass(frozen=True, slots=True)
class File:
    """One file of the output: its length and the pieces that it consists of."""

    name: str
    size: int
    pieces: tuple[Piece, ...]
    origin: Path | None = None

    @property
    def fresh(self) -> int:
        """Bytes that take space even where the original is cloned."""
        return self.size - sum(p.stop - p.start for p in self.pieces if isinstance(p, Copy))


def weight_files(made: NewCheckpoint) -> tuple[tuple[File, ...], str | None]:
    """Return the shards of the output, in the order of the base's, and the text of its index."""
    source, new = made.source, made.new
    names, extra = _shard_names(source) if new else ({s: s for s in source.shards}, "")
    infos: dict[str, list[TensorInfo]] = {shard: [] for shard in source.shards}
    for info in source.tensors.values():
        infos[info.shard].append(info)
    shards = []
    for shard in source.shards:
        origin, size = source.file(shard), source.shard_sizes[shard]
        if origin.stat().st_size != size:
            raise CheckpointError("changed since it was opened", where=str(origin))
        if (made.reshaped.keys() | made.dropped).isdisjoint(info.name for info in infos[shard]):
            pieces = _pieces(infos[shard], size, made.replace)
            shards.append(File(names[shard], size, pieces, origin))
        else:
            infos[shard] = [info for info in infos[shard] if info.name not in made.dropped]
            if infos[shard]:
                file, infos[shard] = _laid_out(made, infos[shard], names[shard])
                shards.append(file)
    if not new and not made.reshaped and not made.dropped:
        return tuple(shards), source.index_text
    kept = (with_fields(i, shard=names[s]) for s in source.shards for i in infos[s])
    tensors = {info.name: info for info in kept}
    if not new:
        text = source.index_text
        return tuple(shards), None if text is None else extend_index(text, tensors, new=())
    header, added = build_header({n: (t.dtype, t.shape) for n, t in new.items()}, shard=extra)
    fills = tuple(Fill(info, new[info.name].produce) for info in added)
    _ = [info.torch_dtype for info in added]  # raises for types that no producer can yield
    shards.append(File(extra, added[-1].stop, (Literal(header), *fills)))
    tensors |= {info.name: info for info in added}
    return tuple(shards), extend_index(source.index_text, tensors, new=new)


def _laid_out(
    made: NewCheckpoint, infos: list[TensorInfo], name: str
) -> tuple[File, list[TensorInfo]]:
    """Return a shard in which tensors have other shapes, and where its tensors then are."""
    tensors = [_form(made, info) for info in infos]
    plain = {tensor.name or "": (tensor.dtype, tensor.shape) for tensor in tensors}
    header, places = build_header(plain, shard=name)
    produced = {tensor.name: tensor.produce for tensor in tensors}
    fills = tuple(Fill(info, produced[info.name]) for info in places)
    _ = [info.torch_dtype for info in places]  # raises for types that no producer can yield
    return File(name, places[-1].stop, (Literal(header), *fills)), list(places)


def _form(made: NewCheckpoint, info: TensorInfo) -> NewTensor:
    """Return what stands in for a tensor of the base, itself maybe, under its name."""
    wide = made.reshaped.get(info.name)
    if wide is not None:
        return with_fields(wide, name=wide.name or info.name)
    own = made.replace.get(info.name, lambda: iter([made.source.read(info.name)]))
    return NewTensor(info.dtype, info.shape, own, info.name)


def _shard_names(source: Checkpoint) -> tuple[dict[str, str], str]:
    """Return each shard's name in the output, and that of the shard for new tensors."""
    if source.shards == (SINGLE,):
        return {SINGLE: "model-00001-of-00002.safetensors"}, "model-00002-of-00002.safetensors"
    extra, count = "model-bake-00001-of-00001.safetensors", 1
    while extra in source.shards:  # the base is itself an output of bake
        count += 1
        extra = f"model-bake{count}-00001-of-00001.safetensors"
    return {shard: shard for shard in source.shards}, extra


def _pieces(
    infos: list[TensorInfo], size: int, replace: Mapping[str, Producer]
) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    position = 0
    for info in infos:
        if info.name in replace:
            pieces += [Copy(position, info.start), Fill(info, replace[info.name])]
            position = info.stop
    return (*pieces, Copy(position, size))


def small_files(made: NewCheckpoint, index_text: str | None, shards: set[str]) -> tuple[File, ...]:
    """Return every file of the output that holds no weights."""
    given = {CONFIG: made.config_text.encode()}
    if index_text is not None:
        given[INDEX] = index_text.encode()
    for name, data in made.extra_files.items():
        if not all(is_plain(part) for part in name.split("/")) or name in given or name in shards:
            raise UsageError(f"{name!r} cannot be the name of a further file in the output")
        given[name] = data
    files = [File(name, len(data), (Literal(data),)) for name, data in given.items()]
    for name in made.source.side_files:
        if name not in given:
            origin = made.source.file(name)
            size = origin.stat().st_size
            files.append(File(name, size, (Copy(0, size),), origin))
    return tuple(files)


def closing_files(given: Mapping[str, bytes], *, taken: Container[str]) -> tuple[File, ...]:
    """Return the files that are written last, since they speak of all others."""
    for name in given:
        if not is_plain(name) or name in taken:
            raise UsageError(f"{name!r} cannot be the name of a closing file in the output")
    return tuple(File(name, len(data), (Literal(data),)) for name, data in given.items())
