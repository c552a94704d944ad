from bake.directions import read_directions as read_directions
from bake.edits import ablate as ablate
from bake.edits import erase as erase
from bake.edits import offset as offset
from bake.errors import BakeError as BakeError
from bake.jobs import FitRequest as FitRequest
from bake.jobs import compile_request as compile_request
from bake.jobs import export as export
from bake.jobs import fit_directions as fit_directions
from bake.jobs import open_model as open_model
from bake.jobs import plan_edits as plan_edits
from bake.jobs import verify_artifact as verify_artifact
from bake.steer import steered as steered

__version__: str
