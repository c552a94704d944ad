"""The tensor types of GGUF: their numbers, names and block sizes.

From ggml's ``enum ggml_type`` and ``type_traits`` (ggml/include/ggml.h, ggml/src/ggml.c). A row is
stored in blocks of ``block`` values that take ``size`` bytes each.
"""

import math
from dataclasses import dataclass

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


TYPES = tuple(
    GgmlType(*row)
    for row in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 40),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
    )
)
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
