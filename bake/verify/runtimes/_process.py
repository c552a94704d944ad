"""The runtimes' own name for ``bake.process``."""

from bake.process import EXIT_MISSING, run_script

__all__ = ["EXIT_MISSING", "run_script"]
