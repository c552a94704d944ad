"""Builders of artifacts for the tests of ``bake.directions``: sound ones, and hostile ones."""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


class Bomb:
    """An object whose pickle runs a shell command when it is loaded by a reader that runs code."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.sentinel}",)


def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = 0) -> None:
    """Write a zip anew with the bytes of each member changed."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, change(name, data))


def rewrite_pickle(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the pickle inside an archive of ``torch.save``; it must differ afterwards."""

    def changed(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        assert change(data) != data
        return change(data)

    rewrite(path, changed)


def replace_pickle(path: Path, code: bytes) -> None:
    """Put another pickle into an archive of ``torch.save``."""
    torch.save(torch.ones(3), path)
    rewrite_pickle(path, lambda _: code)


def save_as_on_gpu(tensor: Tensor, path: Path) -> None:
    """Save a tensor as a program with a GPU does: its storage is tagged ``cuda:0``."""
    torch.save(tensor, path)
    cpu, gpu = (b"X" + struct.pack("<I", len(tag)) + tag for tag in (b"cpu", b"cuda:0"))
    rewrite_pickle(path, lambda code: code.replace(cpu, gpu))


def stack_global_bomb(sentinel: Path) -> bytes:
    """Return a pickle of protocol 4, whose opcodes spell the function out as two strings."""
    return pickle.dumps(Bomb(sentinel), protocol=4)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(
    tensors: Sequence[tuple[str, Sequence[int], int, bytes]],
    keys: Mapping[str, bytes],
    *,
    version: int = 3,
    count: int | None = None,
) -> bytes:
    """Return a GGUF file, byte by byte as its specification says.

    Args:
        tensors: name, dimensions, GGML type and values of each tensor.
        keys: the type and value of each metadata key, as bytes.
        version: of the format.
        count: the number of tensors that the header claims, where it lies.
    """
    header = b"GGUF" + struct.pack("<I", version)
    header += struct.pack("<QQ", len(tensors) if count is None else count, len(keys))
    for key, value in keys.items():
        header += text(key) + value
    body = b""
    for name, dims, kind, values in tensors:
        header += text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        header += struct.pack("<IQ", kind, len(body))
        body += values + b"\0" * (-len(values) % 32)
    return header + b"\0" * (-len(header) % 32) + body


def string_value(value: str) -> bytes:
    """Return the type and value of a GGUF string."""
    return struct.pack("<I", 8) + text(value)


CONTROL_VECTOR = {"general.architecture": string_value("controlvector")}
