"""Fitted directions: every artifact format, read into named and checked tensors with provenance.

``read_directions`` opens an artifact, ``write_directions`` writes bake's own format, ``describe``
says what an artifact holds. A format is one small file here and one row of ``READERS``.
"""

from bake.directions.bake_format import write_directions
from bake.directions.describe import Row, describe
from bake.directions.direction import (
    POSITIONS,
    ROWS,
    SAYS,
    ZERO,
    ZERO_SITES,
    Direction,
    Directions,
    Role,
    shortened,
)
from bake.directions.modules import MODULE
from bake.directions.reader import Options, Shape
from bake.directions.registry import READERS, read_directions
from bake.directions.rome import EITHER_WAY

__all__ = [
    "EITHER_WAY",
    "MODULE",
    "POSITIONS",
    "READERS",
    "ROWS",
    "SAYS",
    "ZERO",
    "ZERO_SITES",
    "Direction",
    "Directions",
    "Options",
    "Role",
    "Row",
    "Shape",
    "describe",
    "read_directions",
    "shortened",
    "write_directions",
]
