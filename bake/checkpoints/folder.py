"""The files of a checkpoint's folder: which belong to the model, and which may be opened.

A folder from somewhere else is data, not a promise. A link in it could point at a private file
that an export would copy and a push would publish, so a link is followed only to a file of the
same folder or of the same repository's blobs in the Hugging Face cache.
"""

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bake.checkpoints import strictjson
from bake.checkpoints.config import CONFIG
from bake.checkpoints.index import INDEX, SINGLE, is_plain, parse_index
from bake.errors import CheckpointError

RECORD = "bake.json"
"""The record that every artifact of bake carries: ``bake.artifact.record`` reads and writes it."""

CHAT_TEMPLATES = "additional_chat_templates"
"""The one subfolder that travels: transformers keeps further chat templates in it."""

_MAX_CONFIG = 16_000_000
_MAX_INDEX = 256_000_000

_OTHER_FORMATS = frozenset(
    ".bin .ckpt .engine .ggml .gguf .h5 .llamafile .mlmodel .msgpack .nemo .npz .onnx .onnx_data "
    ".ot .pickle .pkl .pt .pt2 .pth .safetensors .tflite".split()
)
# What a base says about itself is false of the edited model: its card, its sums, its signature
# and the record of an earlier bake.
_ABOUT_THE_BASE = frozenset({"readme.md", "sha256sums", "model.sig", RECORD})
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Listing:
    """The names in a checkpoint's folder, sorted by what they are.

    Attributes:
        shards: the safetensors files that hold the model, in name order.
        side_files: what travels beside the weights: tokenizer, templates, processor, licence, code.
        left_out: what does not: weights of other formats, other folders, what the base says of
            itself. A folder's name ends in ``/``.
        weight_map: file name by tensor name, or None where there is no index.
        index_text: the index as it stands, or None.
    """

    shards: tuple[str, ...]
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]
    weight_map: dict[str, str] | None
    index_text: str | None


def read_listing(folder: Path) -> Listing:
    """Return what a folder on this machine holds, sorted.

    Raises:
        CheckpointError: it holds no safetensors checkpoint.
    """
    names = list_folder(folder)
    index_text = read_text(folder, INDEX) if INDEX in names else None
    refuse_adapter(names, str(folder))
    if CONFIG not in names:
        raise CheckpointError(
            f"has no {CONFIG}", where=str(folder), fix="name the folder of a whole checkpoint"
        )
    return sort_names(names, index_text, where=str(folder))


def list_folder(folder: Path) -> tuple[str, ...]:
    """Return the names in a folder, relative to it; a subfolder's name ends in ``/``.

    Only the subfolder of chat templates is looked into.
    """
    names = []
    for entry in sorted(folder.iterdir()):
        if not stat.S_ISDIR(entry.lstat().st_mode):
            names.append(entry.name)
        elif entry.name == CHAT_TEMPLATES:
            names += [
                f"{entry.name}/{inner.name}" + "/" * stat.S_ISDIR(inner.lstat().st_mode)
                for inner in sorted(entry.iterdir())
            ]
        else:
            names.append(entry.name + "/")
    return tuple(names)


def sort_names(names: Iterable[str], index_text: str | None, *, where: str) -> Listing:
    """Return which files hold the weights and which travel beside them.

    Args:
        names: as ``list_folder`` returns them; a file in a deeper folder stands for the folder.
        index_text: the text of the index where ``names`` has one.
        where: the folder or repository, for messages.

    Raises:
        CheckpointError: there are no safetensors weights, or it is not clear which ones count.
    """
    present = tuple(dict.fromkeys(_top(name) for name in names))
    weight_map = None if index_text is None else parse_index(index_text)
    shards = _find_shards(frozenset(present), weight_map, where)
    side_files: list[str] = []
    left_out: list[str] = []
    for name in present:
        if name in shards or name in (CONFIG, INDEX) or name.startswith((".git", ".cache")):
            continue
        (side_files if _travels(name) else left_out).append(name)
    return Listing(shards, tuple(side_files), tuple(left_out), weight_map, index_text)


def _top(name: str) -> str:
    """Return a name as ``list_folder`` would give it: ``onnx/a/b.onnx`` stands for ``onnx/``."""
    head, slash, rest = name.partition("/")
    if not slash or (head == CHAT_TEMPLATES and rest and "/" not in rest.removesuffix("/")):
        return name
    return head + "/"


def _travels(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return (
        folder in ("", CHAT_TEMPLATES)
        and is_plain(file)
        and not file.startswith(".")
        and PurePosixPath(file).suffix.lower() not in _OTHER_FORMATS
        and not file.endswith(".index.json")
        and file.lower() not in _ABOUT_THE_BASE
    )


def refuse_adapter(names: Iterable[str], where: str) -> None:
    """Require that a folder or repository with these names is no PEFT adapter.

    Raises:
        CheckpointError: it is one.
    """
    if _ADAPTER in names:
        raise CheckpointError(
            f"holds {_ADAPTER}: it is an adapter, or a model with one beside it",
            where=where,
            why="transformers would load the base model that the adapter names instead",
            fix="merge the adapter first (bake merge), or name the base model",
        )


def _find_shards(
    present: frozenset[str], weight_map: dict[str, str] | None, where: str
) -> tuple[str, ...]:
    refuse_adapter(present, where)
    if weight_map is None:
        if SINGLE not in present:
            raise _no_weights(present, where)
        return (SINGLE,)
    shards = tuple(sorted(set(weight_map.values())))
    if SINGLE in present and shards != (SINGLE,):
        raise CheckpointError(
            f"holds both {SINGLE} and an index that names other files",
            where=where,
            why="transformers loads the former, vLLM and llama.cpp the latter",
            fix="remove the one that is not the model",
        )
    if not shards:
        raise CheckpointError(f"{INDEX} names no tensor", where=where)
    missing = [name for name in shards if name not in present]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards are missing, first {missing[0]}",
            where=where,
            fix="download the folder again; finished files are not fetched twice",
        )
    return shards


def _no_weights(present: frozenset[str], where: str) -> CheckpointError:
    """Return the error that fits what is there instead of the weights."""
    suffixes = {PurePosixPath(name).suffix.lower() for name in present}
    if ".safetensors" in suffixes:
        files = ", ".join(sorted(name for name in present if name.endswith(".safetensors"))[:4])
        return CheckpointError(
            f"has safetensors files ({files}), but neither {SINGLE} nor {INDEX}",
            where=where,
            why="without an index nothing says which of them are the model",
            fix=f"fetch {INDEX} as well",
        )
    if suffixes & {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"}:
        return CheckpointError(
            "has weights in another format only, and bake reads safetensors",
            where=where,
            why="a pickle can run code when it is opened",
            fix='convert it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{where}', dtype='auto').save_pretrained('converted')\"",
        )
    if ".gguf" in suffixes:
        return CheckpointError(
            "is a folder of GGUF files and no checkpoint", where=where, fix="name the base model"
        )
    return CheckpointError(f"has no {SINGLE} and no {INDEX}", where=where)


def regular_file(folder: Path, name: str) -> Path:
    """Return the path of the regular file that ``name`` is, or a permitted link leads to.

    Args:
        folder: the checkpoint's folder, resolved.
        name: a name from its listing or its index.

    Raises:
        CheckpointError: the file is missing, a link out of the folder, or no regular file.
    """
    path = folder / name
    if path.parent != folder and not stat.S_ISDIR(path.parent.lstat().st_mode):
        raise CheckpointError("is not a folder of its own", where=str(path.parent))
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError as error:
        raise CheckpointError(f"the file {name} is missing", where=str(folder)) from error
    if stat.S_ISREG(mode):
        return path
    if not stat.S_ISLNK(mode):
        raise CheckpointError("is neither a file nor a link to one", where=str(path))
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # dangling, or a circle of links
        raise CheckpointError("is a link that leads nowhere", where=str(path)) from error
    if not (folder in target.parents or _in_cache(folder, path, target)):
        raise CheckpointError(
            f"is a link out of the folder, to {target}",
            where=str(path),
            why="an export would copy that file, and a push would publish it",
            fix="replace the link by a copy if the file belongs to the model",
        )
    if not target.is_file():
        raise CheckpointError(f"is a link to {target}, which is no regular file", where=str(path))
    return target


def _in_cache(folder: Path, link: Path, target: Path) -> bool:
    """Tell whether a link of a snapshot, or of a folder in one, leads to a blob of its repository.

    The layout is ``models--owner--name/{snapshots/<commit>,blobs}``. Where ``blobs`` is itself a
    link, no resolved target lies in it, so its files are refused as they should be.
    huggingface_hub 2.x keeps what came in chunks once for all repositories, in
    ``blobs/<first two digits>/<hash>`` of the cache, and has the repository's blob link to it.
    """
    within = (folder, *folder.parents)
    snapshot = next((place for place in within if place.parent.name == "snapshots"), None)
    if snapshot is None:
        return False
    blobs = snapshot.parent.parent / "blobs"
    if target.parent == blobs:
        return True
    first = link.parent / link.readlink()
    shared = blobs.parent.parent / "blobs"
    return (
        first.parent.resolve() == blobs
        and target.parent.parent == shared
        and target.parent.name == target.name[:2]
    )


def read_text(folder: Path, name: str) -> str:
    """Return the text of ``config.json`` or the index, with every byte of it.

    Raises:
        CheckpointError: the file is missing, too long or not UTF-8.
    """
    limit = _MAX_INDEX if name == INDEX else _MAX_CONFIG
    return strictjson.read_text(regular_file(folder, name), limit, where=str(folder / name))
