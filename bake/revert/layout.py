"""What the base's files looked like, from an artifact and its record alone.

Headers and order of tensors are the base's own, since an export keeps them. The config is put back
key by key and the index loses the created tensors; whether both are the base's to the byte is told
by the record's digest of the base, which covers them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bake.checkpoints import DELETE, Checkpoint, patch_config, strictjson
from bake.checkpoints import dtypes as types
from bake.checkpoints.config import Key
from bake.checkpoints.index import INDEX, SINGLE
from bake.errors import CheckpointError, InputError
from bake.revert.record import RevertRecord

_SPLIT = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass(frozen=True, slots=True)
class BaseLayout:
    """The base without its weights.

    Attributes:
        base: a checkpoint with the base's config, names and places; its bytes are the artifact's.
        shards: the artifact's shard by the base's name of it.
        exact: whether config, index and headers are known to be the base's to the byte.
    """

    base: Checkpoint
    shards: dict[str, str]
    exact: bool


def base_layout(record: RevertRecord, artifact: Checkpoint) -> BaseLayout:
    """Return what is known of the base's files.

    Raises:
        InputError: the artifact is not what its record says.
    """
    missing = sorted((record.edited | record.created) - artifact.tensors.keys())
    if missing:
        raise InputError(
            f"is not what the record says: it lacks {missing[0]}", where=str(record.folder)
        )
    config_text = _config(record, artifact)
    config = strictjson.parse_object(config_text, where="config.json", constants=True)
    names = _shard_names(record, artifact)
    tensors = {
        name: replace(info, shard=names[info.shard])
        for name, info in artifact.tensors.items()
        if name not in record.created
    }
    base = replace(
        artifact,
        config=config,
        config_text=config_text,
        tensors=tensors,
        shards=tuple(names.values()),
        shard_sizes={ours: artifact.shard_sizes[theirs] for theirs, ours in names.items()},
        header_digests={ours: artifact.header_digests[theirs] for theirs, ours in names.items()},
        side_files=tuple(n for n in artifact.side_files if n in record.exported),
    )
    shards = {ours: theirs for theirs, ours in names.items()}
    found = [replace(base, index_text=text) for text in _indexes(record, artifact, base)]
    for candidate in found:
        if candidate.digest() == record.base_digest:
            return BaseLayout(candidate, shards, True)
    return BaseLayout(found[0], shards, False)


def _config(record: RevertRecord, artifact: Checkpoint) -> str:
    changes: dict[Key, Any] = {
        (str(change["key"]),): DELETE if change["old"] is None else change["old"]
        for change in record.plan["config"]
    }
    try:
        return patch_config(artifact.config_text, changes)
    except CheckpointError as error:
        raise InputError(
            f"config.json is not what the record says: {error.what}", where=str(record.folder)
        ) from error


def _shard_names(record: RevertRecord, artifact: Checkpoint) -> dict[str, str]:
    """Return the base's name of each shard; those that hold created tensors alone are left out."""
    kept: dict[str, set[bool]] = {shard: set() for shard in artifact.shards}
    for info in artifact.tensors.values():
        kept[info.shard].add(info.name not in record.created)
    mixed = [shard for shard, found in kept.items() if len(found) > 1]
    if mixed:
        raise InputError(
            f"{mixed[0]} holds tensors of the base and created ones together",
            where=str(record.folder),
            why="an export keeps them apart, so this is another file than the one it wrote",
            fix="download the artifact again",
        )
    names = [shard for shard, found in kept.items() if found == {True}]
    if artifact.shards == _SPLIT and names == [_SPLIT[0]]:
        return {_SPLIT[0]: SINGLE}
    return {name: name for name in names}


def _indexes(record: RevertRecord, artifact: Checkpoint, base: Checkpoint) -> Iterator[str | None]:
    """Yield what the base's index may have been, the likeliest first."""
    if artifact.index_text is None or not record.created:
        yield artifact.index_text
        return
    if base.shards == (SINGLE,):
        yield None
    content = strictjson.parse_object(artifact.index_text, where=INDEX)
    weight_map = content["weight_map"]
    content["weight_map"] = {
        name: base.tensors[name].shard for name in weight_map if name in base.tensors
    }
    stated = dict(content.get("metadata", {}))
    stated["total_size"] = sum(info.nbytes for info in base.tensors.values())
    if isinstance(stated.get("total_parameters"), int):
        for name in record.created:
            info = artifact.tensors[name]
            stated["total_parameters"] -= info.nbytes * 8 // types.BITS[info.dtype]
    for metadata in (stated, {k: v for k, v in stated.items() if k != "total_size"}):
        text = json.dumps({**content, "metadata": metadata}, indent=2)
        yield text + "\n"
        yield text
