"""PEFT: an adapter over the base model in transformers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bake.errors import CheckpointError
from bake.verify.runtimes.hf import PACKAGES, WORKER
from bake.verify.runtimes.runtime import Runtime

if TYPE_CHECKING:
    from bake.verify.runtimes.request import RuntimeRequest


def _checked(request: "RuntimeRequest") -> Mapping[str, Any]:
    if request.adapter is None or not (request.adapter / "adapter_config.json").is_file():
        raise CheckpointError("PEFT reads an adapter's folder", where=str(request.adapter))
    return {}


PEFT = Runtime("peft", "PEFT", ("lora",), WORKER, (*PACKAGES, "peft"), details=_checked)
