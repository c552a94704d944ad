"""The writers of the stream: tables of rows, and the last layers of every branch."""

import torch
from jaxtyping import Float
from torch import Tensor

from bake.affine import AffineMap, LowRankMap, chain
from bake.families import Branch, Layout, Norm
from bake.plan.lowrank import thin
from bake.plan.obstacles import holder
from bake.plan.pieces import (
    Context,
    LayerChange,
    Pieces,
    as_diagonal,
    joined,
    norm_updates,
    scaled_norm,
)
from bake.plan.stream_fold import Failure
from bake.plan.types import PartMap, TensorUpdate
from bake.sites import Site, SiteKind


def fold_writers(context: Context) -> Pieces:
    """Fold the stream, its constants and the hooks at branches' outputs into what writes to it."""
    branches = [_branch(context, branch) for branch in context.layout.branches]
    points = [_constant(context, point) for point in range(1, len(context.layout.points))]
    return joined([_tables(context), *branches, *points])


def _tables(context: Context) -> Pieces:
    """Fold the maps of the embedding and of the first point into the rows of the tables."""
    layout, hooks, fold = context.layout, context.hooks, context.stream.folds[0]
    site = Site(SiteKind.EMBED)
    own, stream = hooks.edits_at(site), fold.edits | fold.turned_by
    outer = [fold.linear, fold.inverse]
    constant = fold.inverse.linear(fold.constant)
    embedded = [hooks.map_at(site).without_bias(), *outer]
    tables = [(layout.embed, embedded, _multiplier(layout), own | stream)]
    tables += [(name, outer, 1.0, stream) for name in layout.positions]
    # The constant goes into one table only: positions, where there are any, are never tied.
    holder = tables[-1][0]
    updates = []
    for name, maps, multiplier, acting in tables:
        map_ = thin(chain(maps, layout.hidden))
        edits = acting & hooks.of_weights
        if name == holder:
            map_ = map_.with_bias(constant / multiplier)
            edits |= (own | fold.edits) & hooks.of_constants
        if not map_.is_identity():
            shape, parts = layout.shapes[name], (PartMap(None, map_),)
            indices = tuple(sorted(edits))
            updates.append(TensorUpdate(name, name, shape, 1, parts, is_table=True, edits=indices))
    said = hooks.edits_at(site, *layout.points[0])
    places = tuple((said, f"rows of {update.name}") for update in updates)
    return Pieces(tensors=tuple(updates), places=places)


def _multiplier(layout: Layout) -> float:
    """Return what the embedding is multiplied by; a model's own factor is a number, no tensor."""
    by_module = layout.family.embed.multiplied_by == "module"
    return in_storage(layout.embed_multiplier, layout.dtype if by_module else "F64")


def in_storage(number: float, dtype: str) -> float:
    """Return a multiplier of the embedding as the model applies it, in its own dtype.

    Mirrors transformers' ``GemmaTextScaledWordEmbedding``: the scale is cast to the dtype of the
    weight, which rounds √d in bfloat16 and float16.
    """
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    scale = torch.tensor(number, dtype=torch.float64)
    return float(scale.to(dtypes.get(dtype, torch.float64)))


def _branch(context: Context, branch: Branch) -> Pieces:
    """Fold the hooks at a branch's output, at its post-norm and at its writers' inputs."""
    layout, hooks, point = context.layout, context.hooks, branch.target
    (outer, stream), output = _outer(context, branch), branch.output_site
    addend, adding, constant = None, frozenset[int](), _written(context, point)
    if bool(constant.any()) and holder(layout, point) is branch:
        addend = constant / branch.gain
        adding = hooks.edits_at(*_sites(layout, point)) & hooks.of_constants
    computed, layers = context.computed(branch), []
    for linear in branch.writes:
        inner = linear.input_site
        sites = (output,) if inner is None else (inner, output)
        layers.append(
            LayerChange(
                linear,
                sites,
                None if inner is None else hooks.map_at(inner),
                hooks.updates_at(output),
                (PartMap(None, outer),),
                addend,
                hooks.edits_at(*sites) | adding,
                stream,
                None if computed is None else computed.write(branch.gain, linear.inputs),
                frozenset() if computed is None else computed.edits,
            )
        )
    own = hooks.edits_at(*(site for layer in layers for site in layer.sites))
    places = [(own, f"writers of {branch.live}")]
    if not context.stream.folds[point].linear.is_translation():
        places.append((hooks.edits_at(*layout.points[point]), "writers of the stream"))
    if computed is not None:
        places.append((computed.edits, f"neurons of {branch.live}"))
    behind = [] if branch.norm_out is None else [_behind_norm(context, branch, branch.norm_out)]
    return joined([*behind, Pieces(tuple(layers), places=tuple(places))])


def _outer(context: Context, branch: Branch) -> tuple[AffineMap, frozenset[int]]:
    """Return what a branch's output passes through, and the edits of the stream in it."""
    output, fold = context.hooks.map_at(branch.output_site), context.stream.folds[branch.target]
    if branch.norm_out is None:
        maps = [output.without_bias(), fold.linear, fold.inverse]
        return thin(chain(maps, context.layout.hidden)), fold.edits | fold.turned_by
    nulling = context.stream.nulling.get(branch.target)
    if nulling is None and not fold.aside.is_nothing():
        beside, _ = fold.aside.writer(_gain_behind(context, branch), context.stream.least)
        # Not thinned: factors of sizes 1 and ε would be mixed, and ε's would lose its digits.
        return beside.after(output), fold.aside_by
    if nulling is None:
        return thin(output), frozenset()
    gain, _ = context.norm_values(branch.norm_out)
    return thin(_oblique(nulling, gain).after(output)), fold.edits


def _gain_behind(context: Context, branch: Branch) -> Tensor:
    """Return what a norm behind a branch multiplies by, its own hook's scale included."""
    assert branch.norm_out is not None
    gain, _ = context.norm_values(branch.norm_out)
    scale = as_diagonal(context.hooks.map_at(branch.norm_out.site))
    return gain if scale is None else gain * scale


def _behind_norm(context: Context, branch: Branch, norm: Norm) -> Pieces:
    """Put diagonal maps behind a post-norm into its gain; no other map folds there."""
    behind, edits = context.hooks.map_at(norm.site), context.hooks.edits_at(norm.site)
    diagonal, aside = as_diagonal(behind), context.stream.folds[branch.target].aside
    if diagonal is not None and behind.is_linear() and not aside.is_nothing():
        by = edits | context.stream.folds[branch.target].aside_by
        gain = _gain_behind(context, branch)
        _, gain = aside.writer(gain, context.stream.least)
        updates = norm_updates(context, norm, by, gain, torch.zeros_like(gain))
        return Pieces(tensors=updates, places=((by, f"gain of {norm.live}"),))
    if behind.is_identity():
        return Pieces()
    into = norm.weight is not None and (behind.is_linear() or norm.bias is not None)
    if diagonal is not None and into:
        updates = scaled_norm(context, norm, edits, diagonal, behind.bias)
        return Pieces(tensors=updates, places=((edits, f"gain of {norm.live}"),))
    what = "is not diagonal" if diagonal is None else "adds a constant"
    reason = f"the map {what}, and behind {norm.live} there is only a gain"
    remedy = f"edit {branch.output_site}, before the norm, where any affine map is exact"
    if not (behind.is_linear() or branch.has_slot):
        remedy = "leave the constant out: no bias slot before the norm takes it either"
        if diagonal is None:
            remedy += f"; and edit {branch.output_site}, before the norm"
    return Pieces(
        failures=tuple(Failure(edit, norm.site, reason, remedy) for edit in sorted(edits))
    )


def _constant(context: Context, point: int) -> Pieces:
    """Say whose bias holds the constant of a stream point, or that none can."""
    layout, hooks, held = context.layout, context.hooks, holder(context.layout, point)
    if not bool(_written(context, point).any()):
        return Pieces()
    sites = _sites(layout, point)
    meeting = hooks.edits_at(*sites)
    if held is not None:
        place = f"bias of {held.writes[0].weight.removesuffix('.weight')}"
        return Pieces(places=((meeting, place),))
    names = " and ".join(
        f"{branch.live} ({_why_no_slot(branch)})" for branch in _writers(layout, point)
    )
    reason = f"{layout.family.architectures[0]} has no bias slot there: {names}"
    # A linear hook is to blame only where it moves the constant of an earlier point.
    blamed = meeting & hooks.of_constants or meeting
    failures = tuple(
        Failure(hook.edit, hook.site, reason, context.slot_remedy(hook.site))
        for hook in hooks.at(*sites)
        if hook.edit in blamed
    )
    return Pieces(failures=failures, slotless=bool(failures))


def _written(context: Context, point: int) -> Tensor:
    """Return the constant of a stream point as the baked stream has it."""
    fold = context.stream.folds[point]
    return fold.inverse.linear(fold.constant)


def _sites(layout: Layout, point: int) -> tuple[Site, ...]:
    """Return the sites of a stream point and of what is written to it."""
    return *layout.points[point], *(branch.output_site for branch in _writers(layout, point))


def _writers(layout: Layout, point: int) -> list[Branch]:
    return [branch for branch in layout.branches if branch.target == point]


def _why_no_slot(branch: Branch) -> str:
    if branch.norm_out is not None:
        return "a norm follows it"
    if branch.writer is None:
        count = sum(linear.experts or 1 for linear in branch.writes)
        return f"{count} experts write together"
    return f"{branch.writes[0].weight.removesuffix('.weight')} is built without bias"


def _oblique(projector: AffineMap, gain: Float[Tensor, " d"]) -> LowRankMap:
    """Return D⁻¹ P D, D = diag(gain): what P does behind a norm, done before it up to a scale.

    Behind the norm D D⁻¹PD u = P D u: the direction of the write is that of the hooked one.
    """
    left, right = projector.delta_factors()
    return LowRankMap(left / gain.unsqueeze(1), right * gain, torch.zeros_like(gain))
