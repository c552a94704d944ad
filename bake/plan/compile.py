"""``compile_plan``: edits × layout → ``Plan``. Pure, but for the values of norms."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod

from bake.affine import AffineMap
from bake.edits import Edit
from bake.families import Layout, Recast
from bake.families.table import Json
from bake.plan.assemble import Assembly, Gain, assemble
from bake.plan.hooks import Hooks
from bake.plan.recast import obstacle, recast_changes, recast_layout
from bake.plan.stream import Failure, fold_stream
from bake.plan.targets import judge
from bake.plan.types import BiasUpdate, ConfigChange, Exactness, Finding, Plan, TensorUpdate
from bake.sites import Site

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def compile_plan(
    edits: Sequence[Edit],
    layout: Layout,
    *,
    gain: Gain,
    config: Mapping[str, Json],
    allow: Iterable[str] = (),
    targets: Iterable[str] = ("transformers",),
) -> Plan:
    """Return what changes in which tensor so that the stock model equals the hooked one.

    Args:
        edits: in the order of the recipe.
        layout: the model.
        gain: reads one norm tensor, [hidden], as float64.
        config: the parsed config.json.
        allow: ``recast`` and ``nulling``, what the plan may do beyond the plain fold.
        targets: the runtimes that must load the result.

    Raises:
        UsageError: an edit names a site that the model does not have.
        DirectionError: a map has another width than its site.
    """
    allowed = frozenset(allow)
    hooks = Hooks(edits, layout)
    stream = fold_stream(layout, hooks, nulling="nulling" in allowed)
    assembly = assemble(layout, hooks, stream, gain)
    changes: tuple[ConfigChange, ...] = ()
    notes: list[str] = []
    if assembly.slotless:
        recast, hindrance = _recast(layout, config)
        if recast is not None and "recast" in allowed and hindrance is None:
            notes.append(
                f"declared as {recast.family}: {layout.family.name} has no such bias slots"
            )
            changes = recast_changes(layout, recast, config)
            layout = recast_layout(layout, recast)
            assembly = assemble(layout, hooks, stream, gain)
            assembly.flags |= set(layout.flags)
        elif recast is not None and "recast" in allowed:
            notes.append(f"not declared as {recast.family}: {hindrance}")
    failures = [*stream.failures, *assembly.failures]
    findings = _findings(edits, failures, stream.nulled, assembly, layout)
    biases = _with_companions(layout, assembly)
    changes += _flag_changes(layout, assembly, config)
    if assembly.untied:
        changes += (ConfigChange("tie_word_embeddings", config.get("tie_word_embeddings"), False),)
    notes += _notes(layout, assembly, biases)
    return Plan(
        layout=layout,
        edits=tuple(edits),
        tensors=tuple(_ordered(layout, assembly.tensors)),
        biases=biases,
        config=_merged(changes),
        findings=findings,
        runtimes=judge(layout, biases, untied=assembly.untied or _untied(layout), targets=targets),
        notes=tuple(notes),
        created_bytes=_created(layout, assembly.tensors, biases),
    )


def _recast(layout: Layout, config: Mapping[str, Json]) -> tuple[Recast | None, str | None]:
    for recast in layout.family.recasts:
        return recast, obstacle(layout, recast, config)
    return None, None


def _findings(
    edits: Sequence[Edit],
    failures: Sequence[Failure],
    nulled: set[int],
    assembly: Assembly,
    layout: Layout,
) -> tuple[Finding, ...]:
    by_edit: defaultdict[int, dict[tuple[str, str], list[Site]]] = defaultdict(dict)
    for failure in failures:
        reasons = by_edit[failure.edit]
        reasons.setdefault((failure.reason, failure.remedy), []).append(failure.site)
    findings = []
    for index, edit in enumerate(edits):
        for (reason, remedy), sites in by_edit[index].items():
            findings.append(
                Finding(
                    edit.kind,
                    edit.concept,
                    tuple(dict.fromkeys(sites)),
                    Exactness.IMPOSSIBLE,
                    reason,
                    remedy,
                )
            )
        if by_edit[index]:
            continue
        idle = isinstance(edit.map, AffineMap) and edit.map.is_identity()
        how = [] if idle else sorted(assembly.how[index])
        shown = ", ".join(how[:3]) + (f" and {len(how) - 3} more" if len(how) > 3 else "")
        if index in nulled:
            reason = "the direction leaves the stream, but every write that a post-norm follows "
            reason += "is rescaled, so the function is not the hooked one"
            findings.append(Finding(edit.kind, edit.concept, edit.sites, Exactness.NULLING, reason))
        else:
            reason = f"folded into {shown}" if how else "the map is the identity: nothing changes"
            findings.append(Finding(edit.kind, edit.concept, edit.sites, Exactness.EXACT, reason))
    return tuple(findings)


def _with_companions(layout: Layout, assembly: Assembly) -> tuple[BiasUpdate, ...]:
    """Return the bias updates with explicit zeros for every other slot that a flag opens."""
    biases = dict(assembly.biases)
    for branch in layout.branches:
        for linear in (*branch.reads, *branch.writes):
            slot = linear.bias
            opened = slot.state == "closed" and slot.flag in assembly.flags
            if opened and slot.name not in biases:
                biases[slot.name] = BiasUpdate(slot.name, slot.size, create=True)
    return tuple(biases.values())


def _flag_changes(
    layout: Layout, assembly: Assembly, config: Mapping[str, Json]
) -> tuple[ConfigChange, ...]:
    return tuple(
        ConfigChange(flag, config.get(flag), True)
        for flag in sorted(assembly.flags)
        if config.get(flag) is not True
    )


def _merged(changes: tuple[ConfigChange, ...]) -> tuple[ConfigChange, ...]:
    """Return one change a key: the last one wins over the recast's defaults."""
    merged: dict[str, ConfigChange] = {}
    for change in changes:
        merged[change.key] = ConfigChange(change.key, change.old, change.new)
    return tuple(change for change in merged.values() if change.old != change.new)


def _notes(layout: Layout, assembly: Assembly, biases: Sequence[BiasUpdate]) -> list[str]:
    notes = []
    if assembly.untied:
        size = prod(layout.unembed.shape) * ITEM_BYTES[layout.dtype]
        notes.append(
            f"the output head is untied from the embedding: {layout.unembed.weight} is written "
            f"({size:,} bytes)"
        )
    zeros = sum(bias.is_zero() for bias in biases)
    if zeros:
        flags = ", ".join(sorted(assembly.flags))
        notes.append(f"{flags} opens bias slots in every layer: {zeros} of them hold zeros")
    return notes


def _ordered(layout: Layout, updates: Sequence[TensorUpdate]) -> list[TensorUpdate]:
    order = {name: index for index, name in enumerate(layout.shapes)}
    return sorted(updates, key=lambda update: order.get(update.name, len(order)))


def _untied(layout: Layout) -> bool:
    return not layout.tied


def _created(layout: Layout, tensors: Sequence[TensorUpdate], biases: Sequence[BiasUpdate]) -> int:
    items = sum(prod(update.shape) for update in tensors if update.create)
    items += sum(bias.size for bias in biases if bias.create)
    return items * ITEM_BYTES[layout.dtype]
