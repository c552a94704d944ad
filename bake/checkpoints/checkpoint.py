"""A Hugging Face checkpoint that is read without its model: headers first, tensors when asked."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.checkpoints import folder, strictjson
from bake.checkpoints.config import CONFIG
from bake.checkpoints.header import PREFIX, TensorInfo, header_length, parse_header
from bake.checkpoints.hub_names import parse_hub_id
from bake.checkpoints.index import check_closure
from bake.checkpoints.source import ByteSource, LocalFiles, Stamps, chunks
from bake.collection import uncollected
from bake.errors import CheckpointError, UsageError
from bake.nearby import nearby
from bake.tiles import row_count

if TYPE_CHECKING:
    from jaxtyping import Shaped
    from torch import Tensor

    from bake.checkpoints.hashes import Stated
    from bake.checkpoints.quantised.coded import Coded

_HEADERS_AT_ONCE = 8  # requests in flight when the headers come from the Hub


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint whose headers have been read and checked, and none of whose weights are held.

    Attributes:
        path: the folder. For a Hub id read by range it is the cache folder with ``config.json``.
        source: what the user named.
        revision: the commit on the Hub, or None for a folder.
        config: ``config.json``, parsed.
        config_text: the same, every byte of it.
        tensors: each tensor's place by name, in on-disk order.
        shards: the names of the files that hold them.
        index_text: the text of the index, or None for a checkpoint in one file.
        side_files: names of the files that travel beside the weights, relative to ``path``.
        left_out: names of what does not travel (weights of other formats, other folders, the
            base's own card and records); a folder's name ends in ``/``.
        shard_sizes: length of each shard in bytes.
        header_digests: sha256 of each shard's header, its length field included.
        complete: whether every file that an export copies is in ``path``.
        files: where the bytes come from.
        harmless: keys of ``config`` that its user takes to change nothing, whatever they say.
        coded: the weights whose values are decoded from codes, by name; see ``quantised.view``.
        stored: the checkpoint as its files have it, where some are.
    """

    path: Path
    source: str
    revision: str | None
    config: Mapping[str, Any]
    config_text: str
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    index_text: str | None
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]
    shard_sizes: Mapping[str, int]
    header_digests: Mapping[str, str]
    complete: bool
    files: ByteSource = field(repr=False)
    harmless: tuple[str, ...] = ()
    coded: 'Mapping[str, "Coded"]' = field(default_factory=dict, repr=False)
    stored: "Checkpoint | None" = field(default=None, repr=False)

    @property
    def as_stored(self) -> "Checkpoint":
        """The checkpoint as its files have it: with codes where weights are quantised."""
        return self if self.stored is None else self.stored

    @property
    def repo(self) -> str:
        """Its id on the Hub, where it has a revision."""
        return self.source.partition("@")[0]

    @property
    def unindexed(self) -> tuple[str, ...]:
        """Files of weights beside the shards, which transformers does not load."""
        return tuple(name for name in self.left_out if name.endswith(".safetensors"))

    def read(self, name: str) -> 'Shaped[Tensor, "..."]':
        """Return one tensor in its storage type, in memory of its own; a decoded one in float64.

        Raises:
            CheckpointError: there is no such tensor, or torch has no such type.
            HubError: the bytes are on the Hub and it does not answer.
        """
        info = self._find(name)
        if name in self.coded:
            return self.coded[name].read(0, info.shape[0])
        return self._read_span(info, info.start, info.stop, info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> 'Shaped[Tensor, "..."]':
        """Return rows ``start`` to ``stop``, which count through all axes but the last of a stack.

        No other bytes are read.

        Raises:
            CheckpointError: there is no such tensor, or torch has no such type.
            UsageError: the tensor has no such rows.
            HubError: the bytes are on the Hub and it does not answer.
        """
        info = self._find(name)
        rows = row_count(info.shape)
        if not info.shape or not 0 <= start <= stop <= rows:
            raise UsageError(f"{name} of shape {list(info.shape)} has no rows {start} to {stop}")
        if name in self.coded:
            return self.coded[name].values(start, stop)
        row = info.nbytes // rows if rows else 0
        begin, end = info.start + start * row, info.start + stop * row
        return self._read_span(info, begin, end, (stop - start, *info.shape[1:][-1:]))

    def read_part(self, name: str, start: int, stop: int) -> 'Shaped[Tensor, "..."]':
        """Return the part from ``start`` to ``stop`` along axis 0, whatever the number of axes.

        Raises:
            CheckpointError: there is no such tensor, or torch has no such type.
            HubError: the bytes are on the Hub and it does not answer.
        """
        info = self._find(name)
        if name in self.coded:
            return self.coded[name].read(start, stop)
        each = info.nbytes // info.shape[0]
        begin, end = info.start + start * each, info.start + stop * each
        return self._read_span(info, begin, end, (stop - start, *info.shape[1:]))

    def file(self, name: str) -> Path:
        """Return the checked path of a shard or side file of a local checkpoint.

        Raises:
            CheckpointError: the file has gone, or is a link out of the folder.
        """
        return folder.regular_file(self.path, name)

    def fetched(self, name: str) -> Path:
        """Return the checked path of a small file, downloaded where it is on the Hub alone.

        Raises:
            CheckpointError: the file has gone, or is a link out of the folder.
            HubError: the Hub refuses or cannot be reached.
        """
        if self.revision is not None and not (self.path / name).exists():
            # Here, because importing the Hub's client takes longer than reading headers.
            from bake.checkpoints.hub_tree import fetch_file

            fetch_file(self.repo, self.revision, name)
        return self.file(name)

    def stated(self) -> "dict[str, Stated]":
        """Return what the Hub states of every file of the commit.

        Nothing for a folder, and where the Hub is switched off.

        Raises:
            HubError: the Hub refuses or cannot be reached.
        """
        if self.revision is None:
            return {}
        from bake.checkpoints.hub_tree import stated_files

        return stated_files(self.repo, self.revision)

    def digest(self) -> str:
        """Return a sha256 over the config, the index and every shard's name, length and header.

        It tells two layouts apart without reading a weight, and says nothing of the weights.
        """
        if self.stored is not None:
            return self.stored.digest()
        shards = [[name, self.shard_sizes[name], self.header_digests[name]] for name in self.shards]
        text = json.dumps([self.config_text, self.index_text, shards])
        return hashlib.sha256(text.encode()).hexdigest()

    def tensor_digest(self, name: str) -> str:
        """Return the sha256 of one tensor's bytes, read in chunks.

        Of one that is decoded, those of every tensor that is a part of it, in the order of names.
        """
        digest = hashlib.sha256()
        if name in self.coded:
            parts = sorted(self.coded[name].tensors)
            infos = [self.as_stored._find(part) for part in parts]
        else:
            infos = [self._find(name)]
        for info in infos:
            for chunk in self.chunks(info.shard, info.start, info.stop):
                digest.update(chunk)
        return digest.hexdigest()

    def chunks(self, shard: str, start: int, stop: int) -> Iterator[memoryview]:
        """Yield the bytes of a shard between two offsets; each chunk is valid until the next."""
        return chunks(self.files, shard, start, stop)

    def _find(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"there is no tensor {name}", where=self.source)
        return self.tensors[name]

    def _read_span(
        self, info: TensorInfo, start: int, stop: int, shape: tuple[int, ...]
    ) -> 'Shaped[Tensor, "..."]':
        import torch  # here: headers are read without it

        dtype = info.torch_dtype
        flat = torch.empty(stop - start, dtype=torch.uint8)
        if stop > start:
            self.files.read_into(info.shard, start, flat.numpy().data)
        return flat.view(dtype).reshape(shape)


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    complete: bool = False,
) -> Checkpoint:
    """Open a folder, or a repository on the Hugging Face Hub.

    A folder that exists wins over a Hub id of the same spelling. From the Hub come the config,
    the index and the headers, and later single tensors, by range; a repository that is in the
    cache already is read there.

    Args:
        source: a folder, ``owner/name`` or ``owner/name@revision``.
        revision: a branch, tag or commit on the Hub.
        complete: download every file that an export copies, and check it against the hash that
            the Hub states, which reads every byte once.

    Raises:
        CheckpointError: no such folder, or a checkpoint that is malformed or hostile.
        UsageError: a revision of a folder, or two different revisions.
        HubError: the Hub refuses or cannot be reached.
    """
    text = str(source)
    if not text or "\0" in text:
        raise CheckpointError(f"{text!r} names no checkpoint", fix="name a folder or a Hub id")
    local = Path(text).expanduser() if text.startswith("~/") else Path(text)
    try:
        if isinstance(source, Path) or local.exists():
            if revision is not None:
                raise UsageError(
                    f"{text} is a folder and has no revision {revision!r}",
                    fix="leave the revision out, or name the repository on the Hub",
                )
            return _open_folder(local, text, None, complete=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror or error}", where=str(error.filename or local)
        ) from error
    # Here, because importing the Hub's client takes longer than reading a folder's headers.
    from bake.checkpoints import hub

    repo, revision = parse_hub_id(text, revision)
    found = hub.locate(repo, revision, complete=complete)
    if found.files is None:
        return _open_folder(found.folder, text, found.commit, complete=complete)
    return _assemble(found.folder, text, found.commit, found.listing, found.files, complete=False)


def _open_folder(path: Path, source: str, revision: str | None, *, complete: bool) -> Checkpoint:
    if not path.is_dir():
        if path.exists():
            raise CheckpointError("is a file; a checkpoint is a folder", where=source)
        fix = nearby(path, "name a folder, or a Hub id as owner/name")
        raise CheckpointError("does not exist; a checkpoint is a folder", where=source, fix=fix)
    path = path.resolve()
    listing = folder.read_listing(path)
    side = [folder.regular_file(path, name) for name in listing.side_files]
    paths = {name: folder.regular_file(path, name) for name in listing.shards}
    files = LocalFiles(paths, Stamps.of([*side, *paths.values()]))
    return _assemble(path, source, revision, listing, files, complete=complete)


@uncollected()
def _assemble(
    path: Path,
    source: str,
    revision: str | None,
    listing: folder.Listing,
    files: ByteSource,
    *,
    complete: bool,
) -> Checkpoint:
    """Read and check the config and every header."""
    config_text = folder.read_text(path, CONFIG)
    config = strictjson.parse_object(config_text, where=f"{source}: {CONFIG}", constants=True)
    if "transformers_weights" in config:
        raise CheckpointError(
            "names its own weight file under transformers_weights",
            where=f"{source}: {CONFIG}",
            why="transformers would load that file, and other runtimes would load another",
            fix="remove the key if the weights are in the usual files",
        )
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        headers = list(pool.map(lambda name: _read_header(files, name), listing.shards))
    tensors = check_closure(listing.weight_map, (info for _, infos in headers for info in infos))
    if not tensors:
        raise CheckpointError("holds no tensors", where=source)
    _check_counts(config, len(tensors), f"{source}: {CONFIG}")
    return Checkpoint(
        path=path,
        source=source,
        revision=revision,
        config=config,
        config_text=config_text,
        tensors=tensors,
        shards=listing.shards,
        index_text=listing.index_text,
        side_files=listing.side_files,
        left_out=listing.left_out,
        shard_sizes={name: files.size(name) for name in listing.shards},
        header_digests={
            name: digest for name, (digest, _) in zip(listing.shards, headers, strict=True)
        },
        complete=complete,
        files=files,
    )


def _check_counts(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Require that a configuration counts no more layers than there could be tensors.

    What reads a configuration, a table as well as a class of transformers, makes as much as it
    counts before it meets the first tensor that is missing.

    Raises:
        CheckpointError: naming the key.
    """
    most = 10_000 + tensors
    for key, value in config.items():
        for table in value if isinstance(value, list) else [value]:
            if isinstance(table, Mapping):
                _check_counts(table, tensors, where)
        words = ("layer", "block", "depth", "expert", "n_head", "heads")
        # Gemma 4's ``vocab_size_per_layer_input`` counts tokens.
        counts = "size" not in key and any(word in key for word in words)
        if counts and isinstance(value, int) and value > most:
            raise CheckpointError(
                f"{key} = {value}, and the checkpoint holds {tensors} tensors",
                where=where,
                fix="fetch config.json again",
            )


def _read_header(files: ByteSource, shard: str) -> tuple[str, tuple[TensorInfo, ...]]:
    """Return a shard's header digest and its tensors."""
    size = files.size(shard)
    first = bytearray(min(size, 64))
    files.read_into(shard, 0, memoryview(first))
    length = header_length(bytes(first), shard=shard, size=size)
    raw = bytearray(PREFIX + length)
    files.read_into(shard, 0, memoryview(raw))
    tensors = parse_header(bytes(raw[PREFIX:]), shard=shard, size=size)
    return hashlib.sha256(raw).hexdigest(), tensors
