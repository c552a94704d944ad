"""The file of a base that lies beside an adapter, where the adapter is for no other."""

from pathlib import Path

from bake.verify.artifact import Baked


def base_beside(artifact: Baked) -> Path | None:
    """Return the copy of the base's GGUF that an adapter goes over, where there is one."""
    name = artifact.carrier.beside
    path = None if name is None else artifact.path / name
    return path if path is not None and path.is_file() else None
