"""llama.cpp: its own library over a GGUF file, in the package xllamacpp.

The model is loaded as llama.cpp's server loads it, and a prompt is one pass.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bake.verify.runtimes.runtime import Runtime

if TYPE_CHECKING:
    from bake.verify.runtimes.request import RuntimeRequest


def _adapter_kind(request: "RuntimeRequest") -> Mapping[str, Any]:
    from bake.checkpoints.gguf.file import open_gguf

    if request.adapter is None:
        return {"adapter_kind": None}
    vector = open_gguf(request.adapter).is_vector
    return {"adapter_kind": "control vector" if vector else "factors"}


LLAMA_CPP = Runtime(
    "llama.cpp",
    "llama.cpp",
    ("checkpoint", "merge", "gguf", "gguf-lora", "control-vector"),
    "_llamacpp_worker.py",
    # The worker calls functions that no other version promises to have, or to have unchanged.
    ("numpy", "xllamacpp==2026.10.11549"),
    gguf=True,
    details=_adapter_kind,
)
