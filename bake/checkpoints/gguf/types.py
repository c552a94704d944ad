"""The tensor types of GGUF: their numbers, names and block sizes.

gguf-py keeps the table, which follows ggml's ``enum ggml_type`` and ``type_traits``. A row is
stored in blocks of ``block`` values that take ``size`` bytes each.
"""

import math
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES

from bake.errors import CheckpointError, UsageError


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One tensor type."""

    number: int
    name: str
    block: int
    size: int

    def row_bytes(self, columns: int, *, where: str) -> int:
        """Return the bytes of a row of ``columns`` values.

        Raises:
            CheckpointError: the row is no whole number of blocks.
        """
        if columns % self.block:
            raise CheckpointError(
                f"rows of {columns} values are no whole number of {self.name} blocks of "
                f"{self.block}",
                where=where,
            )
        return columns // self.block * self.size

    def tensor_bytes(self, shape: tuple[int, ...], *, where: str) -> int:
        """Return the bytes of a tensor, its contiguous axis last; raises as ``row_bytes``."""
        return self.row_bytes(shape[-1], where=where) * math.prod(shape[:-1])


TYPES = tuple(GgmlType(kind.value, kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items())
BY_NUMBER = {kind.number: kind for kind in TYPES}
BY_NAME = {kind.name: kind for kind in TYPES}


def type_named(name: str) -> GgmlType:
    """Return the type that a user names.

    Raises:
        UsageError: there is no such type.
    """
    if name not in BY_NAME:
        raise UsageError(
            f"there is no GGUF tensor type {name!r}", fix=f"known are {', '.join(BY_NAME)}"
        )
    return BY_NAME[name]
