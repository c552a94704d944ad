"""Runs that are kept on disk until the verification is done, so that it can be taken up again.

A run is a file of its own, written beside its name and renamed, so that an interruption leaves
whole runs or none. The folder belongs to one question: artifact, base, prompts and versions are in
it, and what another question left is removed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bake.errors import UsageError

QUESTION = "question.json"
WORTH_KEEPING = 20.0
"""Seconds: a run of less is made again rather than kept, since its logits may be gigabytes."""


class Store:
    """Finished runs by name; nothing is kept where ``folder`` is None.

    Raises:
        UsageError: the folder holds something else.
    """

    def __init__(self, folder: Path | None, question: Mapping[str, Any]) -> None:
        self.folder = folder
        if folder is None:
            return
        text = json.dumps(question, sort_keys=True)
        mark = folder / QUESTION
        if mark.is_file() and mark.read_text(encoding="utf-8") == text:
            return
        if folder.exists() and not mark.is_file() and any(folder.iterdir()):
            raise UsageError(f"{folder} holds other files than those of a verification")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark.write_text(text, encoding="utf-8")

    def load(self, name: str) -> tuple[dict[str, Tensor], float] | None:
        """Return the tensors of a run that an earlier attempt finished, and its seconds."""
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                seconds = float(file.metadata()["seconds"])
                return {key: file.get_tensor(key) for key in file.keys()}, seconds
        except SafetensorError:
            return None  # the machine went down while it was written: it is run again

    def save(self, name: str, tensors: Mapping[str, Tensor], seconds: float) -> None:
        """Keep the tensors of a run, unless it took so little that it is made again."""
        path = self._path(name)
        if path is None or seconds < WORTH_KEEPING:
            return
        # Another verification of the same artifact may have ended, and cleared the folder.
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        save_file(_apart(tensors), partial, metadata={"seconds": repr(seconds)})
        partial.replace(path)

    def clear(self) -> None:
        """Forget everything: the verification is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, each contiguous and in memory of its own.

    One activation may be two sites, and a file holds no tensor twice. What is alone in its memory
    is no copy: logits may be gigabytes.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        memory = whole.untyped_storage().data_ptr()
        found[name] = whole.clone() if memory in seen else whole
        seen.add(memory)
    return found


def question(**parts: Any) -> dict[str, Any]:
    """Return what decides the result of every run: the parts given, and the versions."""
    import transformers

    return {**parts, "torch": torch.__version__, "transformers": transformers.__version__}
