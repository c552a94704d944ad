"""Family tables: which tensors of an architecture read and write the residual stream, and how."""

from bake.families.find import find_family
from bake.families.layout import BiasSlot, Branch, Layout, Linear, Norm, Part, runtime_of
from bake.families.load import family_named, load_families, load_refused, read_family
from bake.families.resolve import resolve
from bake.families.runtime import DESCRIBED, READS, RUNTIMES, Runtime
from bake.families.section import Json, size_keys
from bake.families.table import (
    SQRT_HIDDEN,
    TIED,
    Family,
    GgufNames,
    Recast,
    configured,
    parse_family,
)

__all__ = [
    "DESCRIBED",
    "READS",
    "RUNTIMES",
    "SQRT_HIDDEN",
    "TIED",
    "BiasSlot",
    "Branch",
    "Family",
    "GgufNames",
    "Json",
    "Layout",
    "Linear",
    "Norm",
    "Part",
    "Recast",
    "Runtime",
    "configured",
    "family_named",
    "find_family",
    "load_families",
    "load_refused",
    "parse_family",
    "read_family",
    "resolve",
    "runtime_of",
    "size_keys",
]
