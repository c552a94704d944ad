"""Outputs: each executes a plan and decides nothing."""

from bake.outputs.artifact import Artifact

__all__ = ["Artifact"]
