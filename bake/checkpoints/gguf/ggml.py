"""ggml's own quantisers, called in the shared library that a Python package of llama.cpp brings.

gguf-py quantises to the simple types only. ``ggml_quantize_chunk`` (ggml/include/ggml.h) does it
for all: llama-cpp-python has it in ``llama_cpp/lib``, xllamacpp in its extension module.
"""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from bake.checkpoints.gguf.types import BY_NAME, GgmlType
from bake.errors import InputError

VARIABLE = "BAKE_GGML_LIBRARY"
PACKAGES = ("llama_cpp", "xllamacpp")


@dataclass(frozen=True, slots=True, eq=False)
class Ggml:
    """A loaded library."""

    path: Path
    library: Any

    def needs_importance(self, kind: GgmlType) -> bool:
        """Tell whether the type is quantised with an importance matrix only."""
        return bool(self.library.ggml_quantize_requires_imatrix(kind.number))

    def quantize(
        self, values: Float32[Tensor, "rows columns"], kind: GgmlType
    ) -> UInt8[Tensor, "rows bytes"]:
        """Return the rows in the type's blocks; every thread of torch's takes its share."""
        rows, columns = values.shape
        source = values.contiguous()
        target = torch.empty(rows, kind.row_bytes(columns, where=kind.name), dtype=torch.uint8)

        def chunk(start: int, stop: int) -> int:
            begin, count = start * columns, stop - start
            addresses = source.data_ptr(), target.data_ptr()
            function = self.library.ggml_quantize_chunk
            return int(function(kind.number, *addresses, begin, count, columns, None))

        share = -(-rows // torch.get_num_threads()) or 1
        starts = range(0, rows, share)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            written = sum(pool.map(lambda start: chunk(start, min(start + share, rows)), starts))
        if written != target.numel():
            raise InputError(
                f"ggml wrote {written} bytes of {kind.name} where {target.numel()} are meant",
                where=str(self.path),
            )
        return target


def find_ggml() -> Ggml | None:
    """Return ggml from ``$BAKE_GGML_LIBRARY``, llama-cpp-python or xllamacpp, or None.

    Raises:
        InputError: the library that the variable names cannot be used.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return load_ggml(Path(chosen))
    for path in _candidates():
        return load_ggml(path)
    return None


def load_ggml(path: Path) -> Ggml:
    """Load a shared library that exports ``ggml_quantize_chunk``, and try it.

    Raises:
        InputError: it cannot be loaded, lacks the function, or computes something else than
            gguf-py does for a type that both have.
    """
    try:
        library = ctypes.CDLL(str(path))
        chunk = library.ggml_quantize_chunk
        needs = library.ggml_quantize_requires_imatrix
    except (OSError, AttributeError) as error:
        raise InputError(f"is no ggml library: {error}", where=str(path)) from error
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    needs.restype, needs.argtypes = ctypes.c_bool, [ctypes.c_int]
    ggml = Ggml(path, library)
    _try_out(ggml)
    return ggml


def _candidates() -> Iterator[Path]:
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent
        for name in (f"lib/libggml-base.{suffix}", f"lib/ggml-base.{suffix}"):
            yield from folder.glob(name)
        yield from sorted(folder.glob("xllamacpp*.so"))


def _try_out(ggml: Ggml) -> None:
    """Compare the library with gguf-py, so that another calling convention cannot pass."""
    import gguf

    kind = BY_NAME["Q8_0"]
    values = np.sin(np.arange(64, dtype=np.float32)).reshape(2, 32)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    if not np.array_equal(ggml.quantize(torch.from_numpy(values), kind).numpy(), expected):
        raise InputError("its quantiser does not agree with gguf-py's", where=str(ggml.path))
