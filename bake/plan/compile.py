"""``compile_plan``: edits × layout → ``Plan``. Pure, but for the values of norms."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from math import prod

from bake.affine import AffineMap
from bake.collection import uncollected
from bake.edits import Edit
from bake.families import TIED, Json, Layout, Recast, configured
from bake.plan.conditional import refused
from bake.plan.emit import Assembly, assemble
from bake.plan.hooks import Hook, Hooks
from bake.plan.lowrank import thin_factors
from bake.plan.pieces import Context, Gain
from bake.plan.quotient import MOST, Gate, computing, gate_of, size_set
from bake.plan.recast import obstacle, recast_changes, recast_layout
from bake.plan.relocated import in_place, into, relocated
from bake.plan.stream import fold_stream, most_fresh
from bake.plan.stream_fold import Failure
from bake.plan.targets import checkpoint_runtimes
from bake.plan.types import BiasUpdate, ConfigChange, Exactness, Finding, Plan, TensorUpdate
from bake.plan.wide_layout import may_widen
from bake.plan.widen import Wide, epsilon, sees_mean, widened
from bake.sites import Site

IMPOSSIBLE = Exactness.IMPOSSIBLE
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@uncollected()
def compile_plan(
    edits: Sequence[Edit],
    layout: Layout,
    *,
    gain: Gain,
    config: Mapping[str, Json],
    allow: Iterable[str] = (),
    targets: Iterable[str] = ("transformers",),
    widen: int | None = None,
) -> Plan:
    """Return what changes in which tensor so that the stock model equals the hooked one.

    Args:
        edits: in the order of the recipe.
        layout: the model.
        gain: reads one norm tensor, [hidden], as float64.
        config: the parsed config.json.
        allow: ``recast``, ``relocate``, ``widen`` and ``nulling``, what the plan may do beyond the
            plain fold.
        targets: the runtimes that must load the result.
        widen: how many dimensions a model that is widened gets; None for as few as runtimes take.

    Raises:
        UsageError: an edit names a site that the model does not have, or the model cannot be
            widened by so many dimensions.
        DirectionError: a map has another width than its site.
    """
    again = partial(
        _compiled,
        layout=layout,
        gain=gain,
        config=config,
        allowed=frozenset(allow),
        targets=tuple(targets),
        widen=widen,
    )
    return refused(edits, layout, again) or again(edits)


def _compiled(
    edits: Sequence[Edit],
    layout: Layout,
    *,
    gain: Gain,
    config: Mapping[str, Json],
    allowed: Set[str],
    targets: Sequence[str],
    widen: int | None,
) -> Plan:
    """Return the plan of affine edits and updates."""
    whole, config = config, layout.family.section(config)
    context, wide = _context(edits, layout, gain, config, allowed, widen)
    assembly = assemble(context)
    may_recast = assembly.found.slotless and "recast" in allowed
    recast, notes = _recast(context.layout, config) if may_recast else (None, [])
    if assembly.found.slotless and recast is None and "widen" in allowed:
        context, wide = _context(edits, layout, gain, config, allowed, widen, constants=True)
        assembly = assemble(context)
    layout, flags = context.layout, assembly.flags
    changes: tuple[ConfigChange, ...] = () if wide is None else wide.config(config)
    if recast is not None:
        changes = (*recast_changes(layout, recast, config), *changes)
        layout = recast_layout(layout, recast)
        assembly = assemble(replace(context, layout=layout))
        flags = assembly.flags | set(layout.flags)
    if wide is not None:
        notes = [wide.note, *notes]
        moved = sorted(context.stream.relocated_edits())
        assembly = replace(wide, layout=layout).completed(assembly, context.gain, moved)
    biases = (*assembly.biases, *_companions(layout, assembly.biases, flags))
    plan = Plan(
        layout=layout,
        edits=tuple(edits),
        tensors=tuple(_ordered(layout, assembly.tensors)),
        biases=biases,
        config=_placed(
            layout, (*changes, *_own_changes(layout, flags, assembly.untied, config)), whole
        ),
        findings=tuple(_findings(edits, context, assembly)),
        runtimes=(),
        notes=(*notes, *_notes(layout, assembly.untied, flags, biases)),
        created_bytes=_created(layout, assembly.tensors, biases, wide),
    )
    return replace(plan, runtimes=checkpoint_runtimes(plan, config, targets))


def _context(
    edits: Sequence[Edit],
    layout: Layout,
    gain: Gain,
    config: Mapping[str, Json],
    allowed: Set[str],
    widen: int | None,
    *,
    constants: bool = False,
) -> tuple[Context, Wide | None]:
    """Return what is folded into what: the model as it is, or widened where edits need that."""
    hooks, nulling = Hooks(edits, layout), "nulling" in allowed
    ways = in_place(layout.dtype) if allowed & {"relocate", "widen"} else None
    stream = fold_stream(layout, hooks, nulling=nulling, relocation=ways)
    gate = _gate(layout, config) if "widen" in allowed else None
    # What leaves nothing behind it, as an invertible map or a suffix, is as good without, but for
    # the norms before it, which a gated layer does not disturb.
    rest = any(
        (one.carried.left and not one.cleared) or (gate and _computable(layout, one.hook))
        for one in stream.relocated
    )
    stuck = len(stream.failures) + len(stream.nulled)
    if "widen" in allowed and (rest or stuck or constants):
        found = _widened(edits, layout, gain, config, hooks, widen, gate=gate, constants=constants)
        if found is not None and (rest or constants or len(found[0].stream.failures) < stuck):
            return found
    if "widen" in allowed and rest and "relocate" not in allowed:
        stream = fold_stream(layout, hooks, nulling=nulling)
    return Context(layout, hooks, stream, gain), None


def _gate(layout: Layout, config: Mapping[str, Json]) -> Gate | None:
    """Return the gate that the layers of a wider model would compute edits with, if any."""
    family = layout.family
    if family.widen is None or not may_widen(layout):
        return None
    experts = family.widen.experts
    if experts is not None and experts.sums:
        if configured(family, config, experts.sums) is not True:
            return None
    act = configured(family, config, family.widen.gate)
    return gate_of(layout, act, epsilon(layout, config))


def _computable(layout: Layout, hook: Hook) -> bool:
    """Whether a gated layer that writes to its site could compute an edit."""
    points = [p for p, sites in enumerate(layout.points) if hook.site in sites]
    thin = thin_factors(hook.map)[0].shape[1] <= MOST
    return thin and any(computing(layout, point) is not None for point in points)


def _widened(
    edits: Sequence[Edit],
    layout: Layout,
    gain: Gain,
    config: Mapping[str, Json],
    hooks: Hooks,
    asked: int | None,
    *,
    gate: Gate | None,
    constants: bool,
) -> tuple[Context, Wide] | None:
    """Return a model that is widened for some edits, or None where it cannot be."""
    mean = sees_mean(edits, layout)

    def folded(fresh: int, neurons: int, asked: int | None) -> tuple[Context, Wide] | None:
        wide = widened(layout, config, fresh, asked, mean=mean, neurons=neurons)
        if wide is None:
            return None
        own = Hooks([wide.edit(edit) for edit in edits], wide.layout)
        size = 0.0 if gate is None else size_set(layout.hidden, wide.eps)
        ways = into(wide.units, layout.dtype, constants=constants, gate=gate, size=size)
        stream = fold_stream(wide.layout, own, nulling=False, relocation=ways)
        if gate is not None:
            wide = replace(wide, size=stream.size)
        return Context(wide.layout, own, stream, wide.gain(gain)), wide

    # First with all that edits may need, then with what they took of it.
    found = folded(most_fresh(layout, hooks) + 1, 0, None)
    if found is None:
        return None
    return folded(found[0].stream.taken, found[0].stream.neurons, asked)


def _recast(layout: Layout, config: Mapping[str, Json]) -> tuple[Recast | None, list[str]]:
    """Return the recast to apply, or None, and what the plan notes of it."""
    if not layout.family.recasts:
        return None, []
    recast = next(iter(layout.family.recasts.values()))
    hindrance = obstacle(layout, recast, config)
    if hindrance is not None:
        return None, [f"not declared as {recast.family}: {hindrance}"]
    note = f"declared as {recast.family}: {layout.family.name} has no such bias slots"
    return recast, [note]


def _closed(context: Context) -> Iterator[Failure]:
    """Yield why edits of a stream do not fold that no weights of one layer write."""
    reason, branches = context.layout.family.stream.closed, context.layout.branches
    outputs = ", ".join(dict.fromkeys(f'"{branch.output_site.kind}.*"' for branch in branches))
    for edit, site in context.hooks.closed:
        remedy = f"edit module outputs (at = [{outputs}]): another edit"
        yield Failure(edit, site, reason, remedy)


def _findings(edits: Sequence[Edit], context: Context, assembly: Assembly) -> Iterator[Finding]:
    """Yield, edit by edit, one finding that it folds, or one for every reason that it does not."""
    stream, closed = context.stream, tuple(_closed(context))
    for index, edit in enumerate(edits):
        hard: dict[tuple[str, str], dict[Site, None]] = {}
        for failure in (*closed, *stream.failures, *assembly.found.failures):
            if failure.edit == index:
                hard.setdefault((failure.reason, failure.remedy), {})[failure.site] = None
        for said, sites in hard.items():
            yield Finding(index, edit.kind, edit.concept, tuple(sites), IMPOSSIBLE, *said)
        if not hard:
            places = {where for acting, where in assembly.found.places if index in acting}
            exactness, reason = _success(edit, index in stream.nulled, places)
            if index in stream.relocated_edits():
                exactness, reason = Exactness.RELOCATED, relocated(stream, index, reason)
            yield Finding(index, edit.kind, edit.concept, edit.sites, exactness, reason)


def _success(edit: Edit, nulled: bool, places: set[str]) -> tuple[Exactness, str]:
    """Return how an edit that folds relates to its hooks, and where it is folded into."""
    if nulled:
        return Exactness.NULLING, (
            "the direction leaves the stream, but every write that a post-norm follows is "
            "rescaled, so the function is not the hooked one"
        )
    if not places or (isinstance(edit.map, AffineMap) and edit.map.is_identity()):
        return Exactness.EXACT, "the map is the identity: nothing changes"
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return Exactness.EXACT, f"folded into {', '.join(sorted(places)[:3])}{more}"


def _companions(
    layout: Layout, biases: Sequence[BiasUpdate], flags: Set[str]
) -> Iterator[BiasUpdate]:
    """Yield explicit zeros for every other slot that a flag opens."""
    names = {bias.name for bias in biases}
    for slot in (linear.bias for linear in layout.linears):
        if slot.state == "closed" and slot.flag in flags and slot.name not in names:
            yield BiasUpdate(slot.name, slot.size, create=True, experts=slot.experts)


def _own_changes(
    layout: Layout, flags: Set[str], untied: bool, config: Mapping[str, Json]
) -> Iterator[ConfigChange]:
    """Yield what the edits themselves change in config.json: bias flags, and an untied head."""
    for flag in sorted(flags):
        if config.get(flag) is not True:
            yield ConfigChange(flag, config.get(flag), True)
    for key in layout.family.tied_by if untied else ():
        if key == TIED or key in config:
            yield ConfigChange(key, config.get(key), False)


def _merged(changes: tuple[ConfigChange, ...]) -> tuple[ConfigChange, ...]:
    """Return one change a key: the last one wins over the recast's defaults."""
    merged: dict[str, ConfigChange] = {}
    for change in changes:
        merged[change.key] = ConfigChange(change.key, change.old, change.new)
    return tuple(change for change in merged.values() if change.old != change.new)


def _placed(
    layout: Layout, changes: tuple[ConfigChange, ...], config: Mapping[str, Json]
) -> tuple[ConfigChange, ...]:
    """Return changes where config.json has them: those of a wrapped model below its own key.

    Whether the head is tied is said in both places, since programs read the one or the other.
    """
    changes, wrapper = _merged(changes), layout.family.within
    if wrapper is None or wrapper.config not in config or not changes:
        return changes
    old = layout.family.text(config)
    new = {**old, **{change.key: change.new for change in changes}}
    top = (change for change in changes if change.key == TIED)
    tied = (ConfigChange(c.key, config.get(c.key), c.new) for c in top)
    return (ConfigChange(wrapper.config, dict(old), new), *tied)


def _notes(
    layout: Layout, untied: bool, flags: Set[str], biases: Sequence[BiasUpdate]
) -> list[str]:
    notes = []
    if layout.family.within is not None:
        notes.append(
            "for text: what towers write in place of tokens, or add behind blocks, enters the "
            "stream unedited"
        )
    if untied and layout.head_is_stored:
        notes.append(
            f"the output head is untied from the embedding: {layout.unembed.weight}, until now its "
            "copy, is the head"
        )
    elif untied:
        size = prod(layout.unembed.shape) * ITEM_BYTES[layout.dtype]
        notes.append(
            f"the output head is untied from the embedding: {layout.unembed.weight} is written "
            f"({size:,} bytes)"
        )
    zeros = sum(bias.is_zero() for bias in biases)
    if zeros:
        opened = ", ".join(sorted(flags))
        notes.append(f"{opened} opens bias slots in every layer: {zeros} of them hold zeros")
    return notes


def _ordered(layout: Layout, updates: Sequence[TensorUpdate]) -> list[TensorUpdate]:
    order = {name: index for index, name in enumerate(layout.shapes)}
    return sorted(updates, key=lambda update: order.get(update.name, len(order)))


def _created(
    layout: Layout,
    tensors: Sequence[TensorUpdate],
    biases: Sequence[BiasUpdate],
    wide: Wide | None,
) -> int:
    items = sum(prod(update.shape) for update in tensors if update.create)
    if wide is not None:
        before, after = wide.base.shapes, wide.layout.shapes
        items += sum(prod(after[name]) - prod(shape) for name, shape in before.items())
    items += sum(prod(bias.shape) for bias in biases if bias.create)
    return items * ITEM_BYTES[layout.dtype]
