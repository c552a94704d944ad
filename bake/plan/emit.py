"""Make updates of what was decided of every layer, and say of what there is no place for."""

from dataclasses import dataclass

from bake.families import Linear
from bake.plan.pieces import Context, LayerChange, Pieces, joined
from bake.plan.readers import fold_readers
from bake.plan.stream_fold import Failure
from bake.plan.types import BiasUpdate, TensorUpdate
from bake.plan.writers import fold_writers
from bake.sites import STREAM_KINDS, Site


@dataclass(frozen=True, slots=True)
class Assembly:
    """Every update of a plan, and what stood in the way."""

    tensors: tuple[TensorUpdate, ...]
    biases: tuple[BiasUpdate, ...]
    flags: frozenset[str]
    """Config flags that must be on for a created bias."""
    found: Pieces
    """What the parts of the model said besides."""
    untied: bool


def assemble(context: Context) -> Assembly:
    """Return every tensor and bias update of the plan."""
    layout = context.layout
    found = joined([fold_writers(context), fold_readers(context)])
    changed = (layer for layer in found.layers if layer.changes_weight())
    tensors = [*found.tensors, *(_tensor(context, layer) for layer in changed)]
    by_name, head = {update.name: update for update in tensors}, layout.unembed
    untied = layout.tied and not by_name.keys().isdisjoint({layout.embed, head.weight})
    # Where a tied head is stored as well, its copy is what becomes the head.
    if untied and head.weight not in by_name and not layout.head_is_stored:
        # A copy of the base's embedding belongs to the edits that set it apart from the new one.
        edits = by_name[layout.embed].edits
        tensors.append(TensorUpdate(head.weight, layout.embed, head.shape, 0, edits=edits))
    biased = [layer for layer in found.layers if _changes_bias(layer)]
    missing = [_slotless(context, x) for x in biased if x.linear.bias.state == "never"]
    held = [layer for layer in biased if layer.linear.bias.state != "never"]
    flags = {x.linear.bias.flag for x in held if x.linear.bias.state == "closed"}
    return Assembly(
        tuple(tensors),
        tuple(_bias(context, layer) for layer in held),
        frozenset(flag for flag in flags if flag is not None),
        joined([found, *missing]),
        untied,
    )


def _stored(context: Context, linear: Linear) -> str:
    """Return the base tensor that a layer's weight is: a tied head may be the embedding alone."""
    layout = context.layout
    made_of_embedding = linear.weight == layout.unembed.weight and not layout.head_is_stored
    return layout.embed if made_of_embedding else linear.weight


def _tensor(context: Context, layer: LayerChange) -> TensorUpdate:
    linear = layer.linear
    moved = layer.input is not None and not layer.input.is_translation()
    edits = (layer.edits | layer.stream) & context.hooks.of_weights | layer.added_by
    return TensorUpdate(
        linear.weight,
        _stored(context, linear),
        linear.shape,
        linear.output_axis,
        tuple(part for part in layer.outputs if not part.map.is_translation()),
        layer.updates,
        layer.input.without_bias() if moved and layer.input else None,
        edits=tuple(sorted(edits)),
        added=layer.added,
    )


def _changes_bias(layer: LayerChange) -> bool:
    moved = any(not part.map.is_translation() for part in layer.outputs)
    return layer.needs_bias() or (layer.linear.bias.state == "present" and moved)


def _bias(context: Context, layer: LayerChange) -> BiasUpdate:
    linear, hooks = layer.linear, context.hooks
    shifted = layer.input is not None and not layer.input.is_linear()
    create = linear.bias.state == "closed"
    edits = frozenset[int]()
    if layer.needs_bias():
        # Where no edit adds one, the stream moves the constant of an earlier point or of a norm.
        edits = layer.edits & hooks.of_constants or layer.stream
    if not create:
        edits |= (layer.edits | layer.stream) & hooks.of_weights
    return BiasUpdate(
        name=linear.bias.name,
        size=linear.bias.size,
        create=create,
        weight=_stored(context, linear) if shifted else None,
        output_axis=linear.output_axis,
        shift=layer.input.bias if shifted and layer.input else None,
        updates=layer.updates if shifted else (),
        outputs=layer.outputs,
        addend=layer.addend,
        edits=tuple(sorted(edits)),
        experts=linear.bias.experts,
    )


def _slotless(context: Context, layer: LayerChange) -> Pieces:
    """Say that a constant leaves a layer which is built without a bias."""
    hooks, layout = context.hooks, context.layout
    name = layer.linear.weight.removesuffix(".weight")
    reason = f"{layout.family.architectures[0]} builds {name} without a bias, and the edit's "
    reason += "constant needs one"
    made = layer.edits & hooks.of_constants
    if not made:
        # The constant is the norm's own bias, which a turned frame moves into its readers.
        turning = [hook for hook in hooks.of(layer.stream) if hook.site.kind in STREAM_KINDS]
        failures = [Failure(hook.edit, hook.site, reason, "use no rotation") for hook in turning]
        return Pieces(failures=tuple(failures))
    first: dict[int, Site] = {}
    for site in layer.sites:
        for edit in sorted(hooks.edits_at(site) & made):
            first.setdefault(edit, site)
    failures = [
        Failure(edit, site, reason, context.slot_remedy(site)) for edit, site in first.items()
    ]
    return Pieces(failures=tuple(failures), slotless=True)
