"""Which function writes which carrier. To add one, see ``bake.artifact.carrier``.

Each is given an ``Export``, raises whatever can be known to be wrong before the first byte is
written (of weights it reads only what shows that a GGUF is one of the base), and returns what
writes the carrier.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import get_args

from bake.artifact.carrier import carrier_of
from bake.errors import UsageError
from bake.outputs.checkpoint import prepare_checkpoint
from bake.outputs.control_vector import prepare_control_vector
from bake.outputs.export import CarrierWriter, Export
from bake.outputs.gguf.convert import prepare_conversion
from bake.outputs.gguf.edit import prepare_gguf
from bake.outputs.gguf.lora import prepare_gguf_lora
from bake.outputs.lora import prepare_lora
from bake.plan import carriers as plan_carriers
from bake.rounding import Rounding


def _gguf(export: Export) -> CarrierWriter:
    return prepare_conversion(export) if export.gguf is None else prepare_gguf(export)


WRITERS: Mapping[str, Callable[[Export], CarrierWriter]] = MappingProxyType(
    {
        "checkpoint": prepare_checkpoint,
        "lora": prepare_lora,
        "gguf-lora": prepare_gguf_lora,
        "control-vector": prepare_control_vector,
        "gguf": _gguf,
    }
)


def refuse(export: Export, carrier: str) -> None:
    """Raise when a carrier does not hold the plan, or lacks an option. No file is read.

    Raises:
        InexactPlan: a finding is not exact and not allowed, or a wanted runtime refuses the result.
        UsageError: an option is missing or contradicts another, or there is no such carrier.
    """
    if export.rounding not in (None, *get_args(Rounding)):
        raise UsageError(f"rounding is {export.rounding!r}, and has to be nearest or feedback")
    if carrier_of(carrier).name == "gguf" and (export.gguf is None) == (export.llama_cpp is None):
        raise UsageError(
            "a GGUF is made from one of two things",
            fix="name the base's GGUF with --gguf FILE, or a llama.cpp checkout with "
            "--llama-cpp DIR",
        )
    refuse_plain(export)
    plan_carriers.refuse(export.plan, carrier, export.allow)


def refuse_plain(export: Export) -> None:
    """Raise when a base is to be dequantised that is not quantised.

    Raises:
        UsageError: it is not.
    """
    if export.dequantize and not export.checkpoint.coded:
        raise UsageError(
            f"{export.checkpoint.source} is not quantised, so that nothing is to be dequantised",
            fix="leave --dequantize, or dequantize in [export], out",
        )


def prepare(export: Export, carrier: str) -> CarrierWriter:
    """Return what writes a carrier.

    Raises:
        BakeError: the carrier refuses, for all but what a weight or the disk decides.
    """
    refuse(export, carrier)
    return WRITERS[carrier](export)
