"""Whether a model reads a weight by calling its layer, which is where PEFT's factors are.

A layer whose weight is taken out of it and multiplied elsewhere (``self.dt_proj.weight @ x`` in
Mamba) runs without them: PEFT computes the base's values there, and a merge would change them. It
is read off the source of the class that owns the layer, which transformers brings along.
"""

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from bake.errors import InputError

_ABOUT = ("dtype", "device", "shape", "size", "is_meta", "numel", "ndim", "dim")
"""What is asked of a weight without a value of it."""
_SIZES = (1e-3, 1.0, 1e6)
"""Of the inputs that a layer is tried on: one that cuts large values off is no matrix product."""
_SAME = 1e-9
"""What rounding in another order may differ by in float64, of the largest value."""
_NOT_RUN_ALONE = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)
"""What a layer raises that asks for more than an input, or for a value that it does not have."""
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
    own = _own(layer)
    if type(layer).__name__ == "ParamWrapper":
        return  # it stands in for the parameter itself
    if type(layer).__name__ in ("Linear", "Embedding"):
        plain = is_plain(own)
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


def _own(layer: Any) -> Any:
    """Return the model's own layer inside PEFT's, between which may be one for single rows."""
    from peft.utils import TrainableTokensWrapper

    found = layer.get_base_layer()
    return found.original_module if isinstance(found, TrainableTokensWrapper) else found


def check_table(layer: Any, key: str, where: str) -> None:
    """Require that PEFT's single rows in a table, or a head, are what it computes when merged.

    Args:
        layer: PEFT's, around the model's own.
        key: the parameter that it is for.
        where: the file, for messages.

    Raises:
        InputError: the layer computes more than what PEFT puts in its place.
    """
    own = layer.get_base_layer()
    # ``peft/tuners/trainable_tokens/layer.py: forward_adapters`` multiplies without the bias.
    if getattr(own, "bias", None) is not None or not is_plain(own):
        raise InputError(
            f"trainable_token_indices replaces rows of {key}, whose layer is a {type(own).__name__}"
            + (" with a bias" if getattr(own, "bias", None) is not None else ""),
            where=where,
            why="PEFT runs the rows alone, and leaves out what else the layer computes",
            fix="train with modules_to_save in its place",
        )


def is_plain(own: nn.Module) -> bool:
    """Whether a layer is a matrix product, or a table of rows, perhaps scaled as PEFT scales."""
    from transformers.pytorch_utils import Conv1D

    forward = type(own).forward
    if getattr(own, "max_norm", None) is not None:
        return False
    if forward in (nn.Linear.forward, nn.Embedding.forward, Conv1D.forward):
        return True
    return _computes_plainly(own)


def _computes_plainly(own: nn.Module) -> bool:
    """Whether a layer with a forward of its own gives a matrix product, or the rows of a table.

    It is tried with a small weight. Whatever else it holds has no values, so that to use it fails.
    """
    generator = torch.Generator().manual_seed(0)
    small: Any = copy.deepcopy(own).to("meta").eval()
    for name, size in (("weight", (11, 7)), ("bias", (11,))):
        if getattr(small, name, None) is not None:
            value = torch.randn(size, generator=generator, dtype=torch.float64)
            setattr(small, name, nn.Parameter(value, requires_grad=False))
    weight, bias, scale = small.weight, getattr(small, "bias", None), 1.0
    if isinstance(small, nn.Embedding):
        inputs = [torch.randint(11, (3, 4), generator=generator)]
        if hasattr(small, "embed_scale"):  # by which PEFT scales its factors too
            scale = 1.7
            small.embed_scale = torch.tensor(scale, dtype=torch.float64)
    else:
        x = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)
        inputs = [size * x for size in _SIZES]
    for given in inputs:
        table = isinstance(small, nn.Embedding)
        want = embedding(given, weight) * scale if table else linear(given, weight, bias)
        try:
            found = small(given)
        except _NOT_RUN_ALONE:
            return False
        plain = isinstance(found, torch.Tensor) and found.shape == want.shape
        if not plain or float((found - want).abs().max()) > _SAME * float(want.abs().max()):
            return False
    return True


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
