"""Widening: the same model with a wider stream, whose new dimensions are zero everywhere.

A model of width d with RMSNorms is one of width D: every reader gets zero columns, every writer and
the embedding zero outputs. The norms divide by the root of a mean over D values instead of d, so
that their gains are multiplied by √(d/D) and their epsilon by d/D. Heads keep their size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap
from bake.edits import Edit, WeightUpdate
from bake.errors import FamilyError
from bake.families import Json, Layout, Linear, Norm, configured
from bake.plan.emit import Assembly
from bake.plan.pieces import Gain
from bake.plan.types import BiasUpdate, ConfigChange, TensorUpdate
from bake.sites import HEAD_KINDS, INNER_KINDS

STEPS = (64, 32, 16, 8)
"""What a width is a multiple of, besides the number of heads, which transformers wants it to be:
the first with which the model does not grow by more than a thirty-second, or by 64."""


@dataclass(frozen=True, slots=True, eq=False)
class Wide:
    """A model that is widened."""

    base: Layout
    layout: Layout
    """The same model at its new width."""

    @property
    def fresh(self) -> int:
        """How many dimensions are new, the last ones of the stream."""
        return self.layout.hidden - self.base.hidden

    @property
    def note(self) -> str:
        """What the plan says of it."""
        old, new = self.base.hidden, self.layout.hidden
        before, after = (sum(map(prod, x.shapes.values())) for x in (self.base, self.layout))
        more = after / before - 1
        return (
            f"widened: {self.base.family.dims.hidden} {old} becomes {new}, every tensor of the "
            f"stream is written anew, and the model has {100 * more:.2g} % more weights"
        )

    def edit(self, edit: Edit) -> Edit:
        """Return an edit as one of the wide model."""
        stream = not {site.kind for site in edit.sites} & {*HEAD_KINDS, *INNER_KINDS}
        if isinstance(edit.map, AffineMap):
            own = torch.arange(self.base.hidden)
            wide = edit.map.scatter(own, self.layout.hidden) if stream else edit.map
            return replace(edit, map=wide)
        pad = torch.nn.functional.pad
        left, right = edit.map.left, edit.map.right
        if stream:  # at a branch's output
            return replace(edit, map=WeightUpdate(pad(left, (0, 0, 0, self.fresh)), right))
        return replace(edit, map=WeightUpdate(left, pad(right, (0, self.fresh))))

    def gain(self, read: Gain) -> Gain:
        """Return what reads the norms of the wide model."""
        share = math.sqrt(self.base.hidden / self.layout.hidden)
        offset = self.base.family.norm.gain_offset

        def wider(name: str) -> Float[Tensor, " d"]:
            gain = share * (offset + read(name))
            return torch.cat([gain, gain.new_full((self.fresh,), share)]) - offset

        return wider

    def config(self, config: Mapping[str, Json]) -> tuple[ConfigChange, ...]:
        """Return what changes in config.json.

        Raises:
            FamilyError: the epsilon of the norms is missing or no number.
        """
        family, dims = self.base.family, self.layout.dims
        assert family.widen is not None
        eps = configured(family, config, family.widen.eps)
        if not isinstance(eps, int | float) or isinstance(eps, bool):
            raise FamilyError(
                f"the key {family.widen.eps!r} is missing or no number", where="config.json"
            )
        new: dict[str, Json] = {
            family.dims.hidden: dims["hidden"],
            family.dims.head_dim: dims["head_dim"],
            family.widen.eps: eps * self.base.hidden / self.layout.hidden,
        }
        return tuple(ConfigChange(key, config.get(key), value) for key, value in new.items())

    def completed(self, made: Assembly, gain: Gain, edits: Sequence[int]) -> Assembly:
        """Return an assembly in which every tensor of the stream has its new shape.

        Args:
            made: what the edits change.
            gain: reads the norms of the wide model.
            edits: those that it is widened for.
        """
        layout, own = self.layout, tuple(edits)
        tensors = {update.name: update for update in made.tensors}
        biases = {update.name: update for update in made.biases}
        more: list[TensorUpdate] = [
            TensorUpdate(layout.embed, layout.embed, layout.shapes[layout.embed], 1, is_table=True)
        ]
        head = [layout.unembed] if layout.head_is_stored else []
        for linear in (*head, *layout.linears):
            name, axis = linear.weight, linear.output_axis
            more.append(TensorUpdate(name, name, linear.shape, axis))
            slot = linear.bias
            if slot.state == "present" and slot.name not in biases:
                if linear in _writes(layout):
                    biases[slot.name] = BiasUpdate(slot.name, slot.size, create=False, edits=own)
        for norm in _norms(layout):
            name, shape = norm.weight, (layout.hidden,)
            more.append(TensorUpdate(name, name, shape, 0, replacement=gain(name)))
        for update in more:
            tensors.setdefault(update.name, replace(update, edits=own))
        return replace(made, tensors=tuple(tensors.values()), biases=tuple(biases.values()))


def widened(layout: Layout, fresh: int) -> Wide | None:
    """Return a model with so many more dimensions at least, or None where it cannot be widened."""
    family = layout.family
    if family.widen is None or any(norm.bias is not None for norm in _norms(layout)):
        return None
    return Wide(layout, _layout(layout, _width(layout, fresh)))


def _width(layout: Layout, fresh: int) -> int:
    """Return the least width that runtimes take."""
    heads, hidden = layout.dims["heads"], layout.hidden
    multiples = [math.lcm(heads, step) for step in STEPS]
    step = next((m for m in multiples if m <= max(64, hidden // 32)), multiples[-1])
    return (hidden + fresh + step - 1) // step * step


def _layout(layout: Layout, width: int) -> Layout:
    """Return the layout of the wide model: other shapes of what reads and writes the stream."""
    hidden, shapes = layout.hidden, dict(layout.shapes)

    def side(linear: Linear, axis: int) -> Linear:
        assert linear.shape[axis] == hidden
        shape = tuple(width if i == axis else size for i, size in enumerate(linear.shape))
        if linear.weight in shapes:
            shapes[linear.weight] = shape
        bias = linear.bias
        if axis == linear.output_axis:
            bias = replace(bias, size=width)
            if bias.state == "present":
                shapes[bias.name] = (width,)
        return replace(linear, shape=shape, bias=bias)

    branches = tuple(
        replace(
            branch,
            reads=tuple(side(linear, 1 - linear.output_axis) for linear in branch.reads),
            writes=tuple(side(linear, linear.output_axis) for linear in branch.writes),
        )
        for branch in layout.branches
    )
    unembed = side(layout.unembed, 1)
    shapes[layout.embed] = (shapes[layout.embed][0], width)
    shapes |= {norm.weight: (width,) for norm in _norms(layout)}
    dims = {**layout.dims, "hidden": width}
    return replace(layout, dims=dims, shapes=shapes, branches=branches, unembed=unembed)


def _writes(layout: Layout) -> tuple[Linear, ...]:
    return tuple(linear for branch in layout.branches for linear in branch.writes)


def _norms(layout: Layout) -> list[Norm]:
    """Return every norm of the stream once."""
    found = {norm.weight: norm for branch in layout.branches for norm in branch.norms}
    return [*found.values(), layout.final_norm]
