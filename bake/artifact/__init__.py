"""An artifact: what it is made of, its record, and where it goes. Nothing here knows a plan."""

from bake.artifact.artifact import Artifact

__all__ = ["Artifact"]
