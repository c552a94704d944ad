"""Whether a model reads a weight by calling its layer, which is where PEFT's factors are.

A layer whose weight is taken out of it and multiplied elsewhere (``self.dt_proj.weight @ x`` in
Mamba) runs without them: PEFT computes the base's values there, and a merge would change them. It
is read off the source of the class that owns the layer, which transformers brings along.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from bake.errors import InputError

_ABOUT = ("dtype", "device", "shape", "size", "is_meta", "numel", "ndim", "dim")
"""What is asked of a weight without a value of it."""
_PLAIN = ("= input @ self.weight.T", "super().forward(input_ids) * self.embed_scale")
"""Falcon's own words for a matrix product, and a table whose rows PEFT scales as its layer does."""
_NOT_RUN = ("_init", "init_", "reset_", "tie_", "_tie", "resize", "_load", "from_", "set_")
"""Beginnings of the names of methods that no forward pass calls."""


def check_reads(layer: Any, key: str, where: str) -> None:
    """Require that what PEFT computes with a layer is what its weight computes when it is merged.

    Args:
        layer: PEFT's, around the model's own.
        key: the parameter that it is for.
        where: the file, for messages.

    Raises:
        InputError: the layer computes something of its own.
    """
    own = layer.get_base_layer()
    if type(layer).__name__ == "ParamWrapper":
        return  # it stands in for the parameter itself
    if type(layer).__name__ in ("Linear", "Embedding"):
        plain = _is_plain(own)
    else:
        plain = _is_plain_kernel(own)
    if not plain:
        raise InputError(
            f"PEFT adapts {key}, whose layer is a {type(own).__name__}",
            where=where,
            why="the layer computes something of its own, and its factors beside it do not",
            fix=f"train again without {key.rpartition('.')[0].rpartition('.')[2]} in "
            "target_modules, or use the adapter with PEFT",
        )


def _is_plain(own: nn.Module) -> bool:
    """Whether a layer is a matrix product, or a table of rows, perhaps scaled as PEFT scales."""
    from transformers.pytorch_utils import Conv1D

    forward = type(own).forward
    if forward in (nn.Linear.forward, nn.Embedding.forward, Conv1D.forward):
        return getattr(own, "max_norm", None) is None
    return any(line in _source(type(own)) for line in _PLAIN)


def _is_plain_kernel(own: Any) -> bool:
    """Whether a convolution is what PEFT makes its factors of: ungrouped, undilated, zero-padded.

    ``peft/tuners/lora/layer.py: _ConvNd.update_layer`` hands on size, stride and padding alone.
    """
    base = next(k for k in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(own, k))
    undilated = all(step == 1 for step in own.dilation)
    plain = own.groups == 1 and undilated and own.padding_mode == "zeros"
    return plain and type(own).forward is base.forward


def taken_apart(model: Any, path: str) -> str | None:
    """Return the class that reads a layer's weight without calling the layer, or None.

    Args:
        model: that the layer is in.
        path: of the layer.
    """
    owner: nn.Module = model
    parts = path.split(".")
    # Bloom and its like multiply slice by slice, where they were trained on several machines.
    sliced = getattr(model.config, "pretraining_tp", 1) not in (None, 0, 1)
    for place, part in enumerate(parts):
        kind: Any = type(owner)
        if ".".join(parts[place:]) in _taken(kind, sliced):
            return str(kind.__name__)
        owner = owner.get_submodule(part)
    return None


@cache
def _taken(owner: type, sliced: bool) -> frozenset[str]:
    """Return the paths below a module whose weights its own methods take out of their layers."""
    unrun = ("self.training",) if sliced else ("self.training", "self.pretraining_tp > 1")
    return frozenset(path for method in _methods(owner) for path in _weights(method, unrun))


def _methods(owner: type) -> Iterator[ast.AST]:
    for kind in owner.__mro__:
        if not kind.__module__.startswith("transformers.models."):
            continue
        for node in ast.walk(ast.parse(_source(kind) or "pass")):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith(_NOT_RUN):
                yield node


def _source(kind: type) -> str:
    try:
        return textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return ""


def _weights(node: ast.AST, unrun: tuple[str, ...]) -> Iterator[str]:
    """Yield ``a.b`` for every ``self.a.b.weight`` that a method computes with.

    Args:
        node: the method, or a part of it.
        unrun: what a condition says whose branch is not run.
    """
    if isinstance(node, ast.If) and _is_unrun(ast.unparse(node.test), unrun):
        for statement in node.orelse:
            yield from _weights(statement, unrun)
        return
    if isinstance(node, ast.Attribute) and node.attr in _ABOUT:
        inner = node.value
        if isinstance(inner, ast.Attribute) and inner.attr in ("weight", "bias", "data"):
            return
    if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias"):
        head, _, path = ast.unparse(node.value).partition(".")
        if head == "self" and path:
            yield path
            return
    for child in ast.iter_child_nodes(node):
        yield from _weights(child, unrun)


def _is_unrun(test: str, unrun: tuple[str, ...]) -> bool:
    return any(word in test and f"not {word}" not in test for word in unrun)
