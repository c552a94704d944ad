"""What the command line and a Python user both call: a request, and what is done with it.

Nothing here prints, and neither click nor rich is imported: whoever calls hands in where progress
goes. Reading order: ``model``, ``fitting``, ``request``, ``exporting``; ``recorded``,
``reproduce``, ``published``.
"""

from bake.jobs.exporting import Exported, export
from bake.jobs.model import Model, open_model
from bake.jobs.request import Request, compile_request, plan_edits

__all__ = [
    "Exported",
    "Model",
    "Request",
    "compile_request",
    "export",
    "open_model",
    "plan_edits",
]
