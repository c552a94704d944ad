"""The shapes of a model whose stream is wider."""

from collections.abc import Mapping
from dataclasses import replace

from bake.families import Layout, Linear, Norm, Part
from bake.families.resolve import parts_of
from bake.sites import SiteKind


def may_widen(layout: Layout) -> bool:
    """Whether a model can be declared wider.

    Its table says how, no tensor has all experts, and no towers beside the text model, whose width
    stays what it is, write to its stream.
    """
    stacked = any(linear.experts is not None for linear in layout.linears)
    family = layout.family
    return family.widen is not None and family.within is None and not stacked


def wide_layout(layout: Layout, width: int, inner: int) -> Layout:
    """Return the layout of the wide model: other shapes of what reads and writes the stream.

    Args:
        layout: the base's.
        width: that of the stream.
        inner: that of its gated layers.
    """
    shapes, widen = dict(layout.shapes), layout.family.widen
    grown = {"hidden": width, "inner": inner}
    if widen is not None and widen.heads:
        grown["heads"] = width // layout.dims["head_dim"]
        # As many share a key as before: the old ones come first, and keep theirs.
        grown["kv_heads"] = grown["heads"] * layout.dims["kv_heads"] // layout.dims["heads"]
    dims = {**layout.dims, **grown}

    def sized(linear: Linear, axis: int, size: int) -> Linear:
        shape = tuple(size if i == axis else old for i, old in enumerate(linear.shape))
        if linear.weight in shapes:
            shapes[linear.weight] = shape
        bias = linear.bias
        if axis == linear.output_axis:
            bias = replace(bias, size=size)
            if bias.state == "present":
                shapes[bias.name] = (size,)
        return replace(linear, shape=shape, bias=bias)

    experts = None if widen is None else widen.experts
    more = inner - layout.dims["inner"] if experts is not None else 0

    def reader(linear: Linear) -> Linear:
        axis = linear.output_axis
        if experts is not None and linear.module in (experts.gate, experts.up):
            linear = sized(linear, axis, linear.shape[axis] + more)
        parts = _wider_parts(layout, dims, linear)
        if parts != linear.parts:
            size = sum(len(part.rows) for part in parts)
            linear = replace(sized(linear, axis, size), parts=parts)
        return sized(linear, 1 - axis, width)

    def writer(linear: Linear) -> Linear:
        axis, site = linear.output_axis, linear.input_site
        if site is not None and site.kind is SiteKind.Z:
            linear = sized(linear, 1 - axis, dims["heads"] * dims["head_dim"])
        if site is not None and site.kind is SiteKind.MLP_ACT:
            linear = sized(linear, 1 - axis, inner)
        if experts is not None and "{expert}" in linear.module:
            linear = sized(linear, 1 - axis, linear.shape[1 - axis] + more)
        return sized(linear, axis, width)

    branches = tuple(
        replace(branch.mapped(reader, writer), dims={**branch.dims, **grown})
        for branch in layout.branches
    )
    unembed = reader(layout.unembed)
    for name in (layout.embed, *layout.positions):
        shapes[name] = (shapes[name][0], width)
    for norm in norms(layout):
        shapes |= {name: (width,) for name in (norm.weight, norm.bias) if name is not None}
    return replace(layout, dims=dims, shapes=shapes, branches=branches, unembed=unembed)


def _wider_parts(layout: Layout, dims: Mapping[str, int], linear: Linear) -> tuple[Part, ...]:
    """Return the parts of a layer in a model of more heads or wider gated layers."""
    kinds = {part.site.kind for part in linear.parts}
    heads = dims["heads"] != layout.dims["heads"] and kinds & {SiteKind.Q, SiteKind.K, SiteKind.V}
    gates = dims["inner"] != layout.dims["inner"] and kinds & {SiteKind.MLP_GATE, SiteKind.MLP_UP}
    if not heads and not gates:
        return linear.parts
    row = next(row for row in layout.family.linears if row.module == linear.module)
    return parts_of(dims, row, tuple(part.site for part in linear.parts))


def norms(layout: Layout) -> list[Norm]:
    """Return every norm of the stream once."""
    found = {norm.live: norm for branch in layout.branches for norm in branch.norms}
    return [*found.values(), layout.final_norm]
