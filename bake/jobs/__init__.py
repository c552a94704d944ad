"""What the command line and a Python user both call: a request, and what is done with it.

Nothing here prints, and neither click nor rich is imported: whoever calls hands in where progress
goes. Reading order: ``model``, ``fitting``, ``request``, ``exporting``; ``recorded``,
``reproduce``, ``published``, ``verifying``; ``merging``, ``reverting``; ``fit_directions``,
``fit_proposal``; ``first_plan``; ``trying``.
"""

from bake.jobs.exporting import Exported, export
from bake.jobs.fit_directions import FitRequest, FittedDirections, fit_directions
from bake.jobs.fit_proposal import Proposal, propose
from bake.jobs.merging import Merged, merge
from bake.jobs.model import Model, open_model
from bake.jobs.recorded import Replanned, Source, find, replan
from bake.jobs.request import Request, compile_request, plan_edits
from bake.jobs.reverting import Reversal, prepare_reversal
from bake.jobs.trying import Trial, TryOptions, try_artifact, try_recipe
from bake.jobs.verifying import Verified, verify, verify_artifact

__all__ = [
    "Exported",
    "FitRequest",
    "FittedDirections",
    "Merged",
    "Model",
    "Proposal",
    "Replanned",
    "Request",
    "Reversal",
    "Source",
    "Trial",
    "TryOptions",
    "Verified",
    "compile_request",
    "export",
    "find",
    "fit_directions",
    "merge",
    "open_model",
    "plan_edits",
    "prepare_reversal",
    "propose",
    "replan",
    "try_artifact",
    "try_recipe",
    "verify",
    "verify_artifact",
]
