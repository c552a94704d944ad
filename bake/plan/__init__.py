"""The plan: edits × layout → tensor updates, bias updates, config changes and findings."""

from bake.plan.compile import compile_plan
from bake.plan.types import (
    BiasUpdate,
    ConfigChange,
    Exactness,
    Finding,
    PartMap,
    Plan,
    TensorUpdate,
)

__all__ = [
    "BiasUpdate",
    "ConfigChange",
    "Exactness",
    "Finding",
    "PartMap",
    "Plan",
    "TensorUpdate",
    "compile_plan",
]
