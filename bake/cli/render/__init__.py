"""Results as tables for a reader. What a table says is in the objects; nothing is computed here."""

from bake.cli.render.comparison import comparison
from bake.cli.render.models import families, model_check
from bake.cli.render.pieces import facts, indented, section, site_list, size, table, word
from bake.cli.render.plans import plan
from bake.cli.render.results import artifact, directions, report
from bake.cli.render.screen import PIPE_WIDTH, console, failure, progress, show
from bake.cli.render.tensors import Named, changed_tensors, merged, tensor_table

__all__ = [
    "PIPE_WIDTH",
    "Named",
    "artifact",
    "changed_tensors",
    "comparison",
    "console",
    "directions",
    "facts",
    "failure",
    "families",
    "indented",
    "merged",
    "model_check",
    "plan",
    "progress",
    "report",
    "section",
    "show",
    "site_list",
    "size",
    "table",
    "tensor_table",
    "word",
]
