"""llama.cpp's own converter, which an output runs as well: see ``bake.converter``."""

from bake.converter import OUTTYPES, convert

__all__ = ["OUTTYPES", "convert"]
