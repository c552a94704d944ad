"""The weights of an artifact: strict headers, a closed index, finite numbers, untouched tensors."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bake.artifact.carrier import KINDS
from bake.artifact.names import Problem, problem_of, walk
from bake.artifact.record import RECORD
from bake.artifact.schema import Record
from bake.checkpoints import Checkpoint, open_checkpoint, strictjson
from bake.checkpoints.folder import regular_file
from bake.checkpoints.gguf import header as gguf
from bake.checkpoints.header import PREFIX, TensorInfo, header_length, parse_header
from bake.checkpoints.index import INDEX
from bake.checkpoints.quantised.view import decoded
from bake.errors import CheckpointError, InputError
from bake.tiles import spans

MAX_HEADER = 25_000_000
"""Longest header text that the Hub's own client reads."""

_FLOATS = ("F64", "F32", "F16", "BF16")


def check_weights(folder: Path, record: Record) -> list[Problem]:
    """Return what is wrong with headers, index and format of the weights."""
    folder = folder.resolve()
    suffix = KINDS[record.kind].suffix
    names = _weights_in(folder)
    problems = check_headers(folder)
    if not any(name.endswith(suffix) and "/" not in name for name in names):
        problems.append(Problem(suffix, f"an artifact of kind {record.kind} has no such file"))
    if KINDS[record.kind].checkpoint and not problems:
        problems += _check_checkpoint(folder, record)
    return problems


def _weights_in(folder: Path) -> list[str]:
    return [name for name in walk(folder)[0] if name.endswith((".safetensors", ".gguf"))]


def check_headers(folder: Path) -> list[Problem]:
    """Return what is wrong with the headers of the weights that are in a folder."""
    folder = folder.resolve()
    problems: list[Problem] = []
    for name in _weights_in(folder):
        try:
            if name.endswith(".safetensors"):
                _header_text(folder, name)
            else:
                _check_gguf(folder, name)
        except InputError as error:
            problems.append(problem_of(error, name))
    return problems


def _header_text(folder: Path, name: str) -> bytes:
    """Return the header of a safetensors file, once it is found to be sound.

    Raises:
        InputError: the header is malformed, or too long for the Hub.
    """
    path = regular_file(folder, name)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = header_length(file.read(64), shard=name, size=size)
        if length > MAX_HEADER:
            raise InputError(
                f"has a header of {length} bytes; the Hub reads {MAX_HEADER}", where=name
            )
        file.seek(PREFIX)
        text = file.read(length)
    parse_header(text, shard=name, size=size)
    return text


def _check_gguf(folder: Path, name: str) -> None:
    path = regular_file(folder, name)
    with path.open("rb") as file:
        gguf.parse_header(file, shard=name, size=path.stat().st_size)


def metadata(folder: Path, name: str) -> dict[str, Any]:
    """Return the free metadata of a safetensors file.

    Raises:
        InputError: its header is malformed.
    """
    found: dict[str, Any] = json.loads(_header_text(folder, name)).get("__metadata__", {})
    return found


def _check_checkpoint(folder: Path, record: Record) -> list[Problem]:
    try:
        checkpoint = decoded(open_checkpoint(folder))
    except InputError as error:
        return [problem_of(error, INDEX)]
    problems = [
        Problem(name, "holds weights that the index does not name", "remove it")
        for name in checkpoint.left_out
        if name.endswith((".safetensors", ".bin", ".pt", ".gguf"))
    ]
    problems += [
        Problem(RECORD, f"the plan names {name}, which the checkpoint does not hold")
        for name in sorted(record.plan.changed - checkpoint.tensors.keys())
    ]
    return problems + _check_total(checkpoint)


def _check_total(checkpoint: Checkpoint) -> list[Problem]:
    """Return a problem when the index states another size than the tensors have."""
    if checkpoint.index_text is None:
        return []
    stated = strictjson.parse_object(checkpoint.index_text, where=INDEX).get("metadata", {})
    total = sum(info.nbytes for info in checkpoint.as_stored.tensors.values())
    if "total_size" in stated and stated["total_size"] != total:
        return [Problem(INDEX, f"total_size is {stated['total_size']}, the tensors have {total}")]
    return []


def check_finite(folder: Path, record: Record) -> list[Problem]:
    """Return the edited tensors that hold NaN or an infinity."""
    if not KINDS[record.kind].checkpoint:
        return []
    checkpoint = decoded(open_checkpoint(folder.resolve()))
    return [
        Problem(checkpoint.tensors[name].shard, f"{name} holds NaN or an infinity", "export again")
        for name in sorted(record.plan.changed & checkpoint.tensors.keys())
        if not _is_finite(checkpoint, checkpoint.tensors[name])
    ]


def _is_finite(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    if info.name in checkpoint.coded:
        return _is_decodable(checkpoint, info)
    if info.dtype not in _FLOATS:
        return True
    chunks = checkpoint.chunks(info.shard, info.start, info.stop)
    values = (torch.frombuffer(chunk, dtype=info.torch_dtype) for chunk in chunks)
    return all(bool(torch.isfinite(part).all()) for part in values)


def _spans(info: TensorInfo) -> Iterator[tuple[int, int]]:
    return spans((info.shape[0], math.prod(info.shape[1:])))


def _is_decodable(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    """Whether every code and every scale of a quantised weight stands for a number."""
    try:
        for start, stop in _spans(info):
            checkpoint.read_part(info.name, start, stop)
    except CheckpointError:
        return False
    return True


def _is_same(ours: Checkpoint, theirs: Checkpoint, info: TensorInfo) -> bool:
    """Whether a tensor is the base's, which may have been dequantised."""
    if info.name not in theirs.coded or info.name in ours.coded:
        return ours.tensor_digest(info.name) == theirs.tensor_digest(info.name)
    pairs = (
        (theirs.read_part(info.name, *span), ours.read_part(info.name, *span))
        for span in _spans(info)
    )
    return all(torch.equal(values.to(have.dtype), have) for values, have in pairs)


def check_unchanged(folder: Path, record: Record, base: Path) -> list[Problem]:
    """Return the tensors that differ from the base's although the plan leaves them alone.

    Those that the plan changes are compared with what the record says they were in the base.
    """
    if not KINDS[record.kind].checkpoint:
        return []
    ours, theirs = (decoded(open_checkpoint(place)) for place in (folder.resolve(), base))
    problems = []
    before = record.base_tensors
    for name, info in theirs.tensors.items():
        if name in record.plan.changed:
            if name in before and before[name] != f"sha256:{theirs.tensor_digest(name)}":
                what = f"{name} of this base is not the one that {RECORD} says was edited"
                problems.append(Problem(info.shard, what, "name the base that it names"))
            continue
        found = ours.tensors.get(name)
        if found is None:
            problems.append(Problem(info.shard, f"{name} of the base is not in the artifact"))
        elif (found.dtype, found.shape) != (info.dtype, info.shape) or not _is_same(
            ours, theirs, info
        ):
            problems.append(
                Problem(found.shard, f"{name} differs from the base, and the plan leaves it alone")
            )
    return problems
