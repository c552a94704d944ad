"""bake: fold activation edits into stock model weights, verify them against hooks, publish them.

What Python users call is here by name and imported when it is first used, so that ``import bake``
costs nothing::

    model = bake.open_model("path/to/model")
    request = bake.plan_edits(model, [model.edit("ablate", "refusal", bake.ablate(vector))])
    bake.export(request, "out")

``__init__.pyi`` tells a type checker the same names.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

_WHERE = {
    "BakeError": "errors",
    "FitRequest": "jobs",
    "ablate": "edits",
    "compile_request": "jobs",
    "erase": "edits",
    "export": "jobs",
    "fit_directions": "jobs",
    "offset": "edits",
    "open_model": "jobs",
    "plan_edits": "jobs",
    "read_directions": "directions",
    "steered": "steer",
    "verify_artifact": "jobs",
}
"""The module of every name. None is called as a module of the package is, which the import of that
module would put in its place."""

__all__ = [
    "BakeError",
    "FitRequest",
    "ablate",
    "compile_request",
    "erase",
    "export",
    "fit_directions",
    "offset",
    "open_model",
    "plan_edits",
    "read_directions",
    "steered",
    "verify_artifact",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'bake' has no attribute {name!r}")
    return getattr(_import_module(f"bake.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
