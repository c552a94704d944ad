"""``model.safetensors.index.json``: which file holds which tensor."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from bake.checkpoints import dtypes, strictjson
from bake.checkpoints.header import TensorInfo
from bake.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def is_plain(name: str) -> bool:
    """Tell whether ``name`` is a file's name and nothing that could lead out of its folder."""
    return (
        name not in ("", ".", "..")
        and name.isprintable()
        and not any(sign in name for sign in "/\\")
        and len(name.encode()) <= 255
    )


def parse_index(text: str) -> dict[str, str]:
    """Return the file name by tensor name.

    Raises:
        CheckpointError: the index is malformed or names a file outside its folder.
    """
    content = strictjson.parse_object(text, where=INDEX)
    found = content.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError("weight_map is not an object of file names", where=INDEX)
    if not isinstance(content.get("metadata", {}), dict):
        raise CheckpointError("metadata is not an object", where=INDEX)
    for tensor, file in found.items():
        if not is_plain(file):
            raise CheckpointError(
                f"the index names a file outside the folder: {file!r}",
                where=f"{INDEX}: {tensor}",
                why="a poisoned index could pull other files of this machine into the output",
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"the index names {file!r}, which is no safetensors file",
                where=f"{INDEX}: {tensor}",
            )
    return found


def check_closure(
    weight_map: Mapping[str, str] | None, tensors: Iterable[TensorInfo]
) -> dict[str, TensorInfo]:
    """Return the tensors by name, once the index and the headers agree about each of them.

    Args:
        weight_map: file name by tensor name, or None for a checkpoint without an index.
        tensors: every tensor of every file, in on-disk order.

    Raises:
        CheckpointError: a tensor is in two files, missing from its file or from the index.
    """
    found: dict[str, TensorInfo] = {}
    for info in tensors:
        if info.name in found:
            raise CheckpointError(
                f"{info.name} is in two files: {found[info.name].shard} and {info.shard}",
                where=INDEX,
            )
        found[info.name] = info
    for name, file in (weight_map or {}).items():
        if name not in found or found[name].shard != file:
            raise CheckpointError(
                f"the index says that {name} is in {file}, which does not hold it", where=INDEX
            )
    for info in found.values():
        if weight_map is not None and info.name not in weight_map:
            raise CheckpointError(
                f"{info.shard} holds {info.name}, which the index does not name",
                where=INDEX,
                why="some runtimes load it and others do not",
            )
    return found


def extend_index(text: str | None, tensors: Mapping[str, TensorInfo], *, new: Iterable[str]) -> str:
    """Return the index of a checkpoint that has gained tensors, or lost some.

    ``metadata.total_size`` is counted again over all tensors, ``metadata.total_parameters`` grows
    by the new elements where the base states it, and every other key stays.

    Args:
        text: the base's index, or None when it has none.
        tensors: every tensor of the result with the file that holds it, in on-disk order.
        new: names of those that the base lacks.
    """
    content: dict[str, Any] = {} if text is None else strictjson.parse_object(text, where=INDEX)
    old_map = content.get("weight_map", {})
    metadata = dict(content.get("metadata", {}))
    metadata["total_size"] = sum(info.nbytes for info in tensors.values())
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += sum(
            tensors[name].nbytes * 8 // dtypes.BITS[tensors[name].dtype] for name in new
        )
    kept = (name for name in old_map if name in tensors)
    names = [*kept, *(name for name in tensors if name not in old_map)]
    content["metadata"] = metadata
    content["weight_map"] = {name: tensors[name].shard for name in names}
    return json.dumps(content, indent=2) + "\n"
