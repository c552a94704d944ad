"""Which carrier holds a plan: a checkpoint, an adapter, a control vector or a GGUF file. Pure.

A carrier holds an edit exactly or not at all. What each holds is said in ``bake.artifact.carrier``;
one that a single program loads is held against that program's table as well, since runtimes drop or
refuse what they have no slot for.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from msgspec.structs import replace

from bake.affine import AffineMap
from bake.artifact.carrier import CARRIERS, VLLM_RANKS, Carrier, Part, carrier_of
from bake.artifact.schema import RuntimeVerdict
from bake.edits import Edit
from bake.errors import InexactPlan
from bake.families import Layout, runtime_of
from bake.plan.lowrank import Role, Target, rank_of, targets_of
from bake.plan.targets import (
    GENERAL,
    ROUNDED,
    Hindrance,
    judged,
    model_hindrance,
    width_hindrance,
)
from bake.plan.types import Exactness, Finding, Plan
from bake.sites import Site, SiteKind

_HEAD_LIMIT = 258048  # vLLM lora/layers/logits_processor.py: rows of a head that an adapter is for
_LLAMA_CPP = "llama.cpp"
OVER_HEAD = (
    "over a copy of the base's GGUF (--gguf) in which the tied head is a tensor of its own, since "
    "llama.cpp takes one tensor for both"
)
"""What an adapter of a tied embedding or head goes over."""
_NO_GRAPH = "llama.cpp's graph of this architecture adds no control vector"
_ACCEPTED_BY = {
    Exactness.RELOCATED: {"relocate", "widen"},
    Exactness.NULLING: {"nulling"},
    Exactness.APPROXIMATE: {"approximate"},
    Exactness.IMPOSSIBLE: set[str](),
}
"""The words of ``export.allow`` that accept a finding below EXACT."""
_PLURAL: dict[Role, str] = {
    "linear": "linear layers",
    "expert": "experts",
    "embed": "the embedding",
    "positions": "position tables",
    "head": "the output head",
}


@dataclass(frozen=True, slots=True)
class _Obstacle:
    """What of a plan a carrier cannot hold."""

    edits: Iterable[int]
    """Those that it comes from."""
    reason: str


def carrier_findings(plan: Plan, carrier: str) -> tuple[Finding, ...]:
    """Return what a carrier does with every edit of a plan.

    Every finding is EXACT or IMPOSSIBLE, or what the plan says of it. One that is
    IMPOSSIBLE names the carriers that hold the edit in its remedy.

    Raises:
        UsageError: there is no such carrier.
    """
    kind = carrier_of(carrier)
    blocked = _blocked(plan, kind)
    findings: list[Finding] = []
    for index, edit in enumerate(plan.edits):
        own = [finding for finding in plan.findings if finding.edit == index]
        if index in blocked:
            findings.append(_refused(plan, kind, index, blocked[index]))
        elif Part.CONSTANTS in kind.holds:
            reason = f"added behind {', '.join(f'block {n}' for n in _layers(plan.layout, edit))}"
            exact = Finding(index, edit.kind, edit.concept, edit.sites, Exactness.EXACT, reason)
            findings.append(exact)
        else:
            findings += own
    over = set[int]()
    for target in beside_head(plan, carrier):
        over.update(() if target.update is None else target.update.edits)
    return tuple(
        dataclasses.replace(finding, reason=f"{finding.reason}; {OVER_HEAD}")
        if finding.edit in over and finding.exactness is not Exactness.IMPOSSIBLE
        else finding
        for finding in findings
    )


def refuse(plan: Plan, carrier: str, allow: frozenset[str] = frozenset()) -> None:
    """Raise when a plan may not be written as a carrier.

    Args:
        plan: the plan.
        carrier: the carrier.
        allow: what the recipe accepts below EXACT.

    Raises:
        InexactPlan: naming the first finding that is not exact, or the first wanted runtime that
            would not serve the carrier as it is meant.
        UsageError: there is no such carrier.
    """
    own = carrier_of(carrier).checkpoint
    for finding in plan.findings if own else carrier_findings(plan, carrier):
        if finding.exactness is Exactness.EXACT or allow & _ACCEPTED_BY[finding.exactness]:
            continue
        sites = ", ".join(str(site) for site in finding.sites[:3])
        more = f" and {len(finding.sites) - 3} more" if len(finding.sites) > 3 else ""
        where = f"{sites}{more}" if own else f"{sites}{more} as {carrier}"
        raise InexactPlan(
            f"cannot {finding.kind} {finding.concept!r} at {where}: {finding.exactness}",
            why=finding.reason,
            fix=finding.remedy,
        )
    for verdict in carrier_runtimes(plan, carrier):
        if verdict.stops:
            other = "choose another edit, or a carrier that `bake plan` calls exact"
            raise InexactPlan(
                f"the target {verdict.runtime} would not serve this {carrier} as it is meant",
                why=verdict.reason,
                fix=f"leave {verdict.runtime} out of export.target, or "
                + (other if own else "write a carrier that `bake plan` calls exact there"),
            )


def carrier_runtimes(
    plan: Plan, carrier: str, *, codes: bool = False
) -> tuple[RuntimeVerdict, ...]:
    """Return what every runtime makes of the carrier.

    Args:
        plan: the plan.
        carrier: the carrier.
        codes: whether it is a GGUF file whose edited weights are stored in a few bits each.

    Raises:
        UsageError: there is no such carrier.
    """
    kind = carrier_of(carrier)
    if kind.checkpoint:
        return plan.runtimes
    wanted = (verdict.runtime for verdict in plan.runtimes if verdict.wanted)
    findings = carrier_findings(plan, carrier)
    verdicts = judged(plan, kind, findings, wanted, lambda name: _hindrance(plan, name, kind))
    return tuple(
        replace(verdict, status="approximate", reason=ROUNDED)
        if codes and verdict.status == "exact"
        else verdict
        for verdict in verdicts
    )


def vector_layers(plan: Plan) -> tuple[tuple[int, Edit], ...]:
    """Return every block behind which an edit adds its constant, in the plan's order."""
    return tuple((layer, edit) for edit in plan.edits for layer in _layers(plan.layout, edit))


def _blocked(plan: Plan, kind: Carrier) -> Mapping[int, list[str]]:
    """Return the edits that the carrier cannot hold, each with its reasons."""
    return _blocked_in(plan, kind.name)


@lru_cache(maxsize=16)
def _blocked_in(plan: Plan, carrier: str) -> Mapping[int, list[str]]:
    kind = carrier_of(carrier)
    if Part.CONSTANTS in kind.holds:
        reasons = {i: _no_vector(plan.layout, edit) for i, edit in enumerate(plan.edits)}
        return {i: [reason] for i, reason in reasons.items() if reason is not None}
    blocked: dict[int, list[str]] = {}
    hard = (f for f in plan.findings if f.exactness is Exactness.IMPOSSIBLE)
    for obstacle in (*(_Obstacle([f.edit], f.reason) for f in hard), *_obstacles(plan, kind)):
        for index in obstacle.edits:
            if obstacle.reason not in blocked.setdefault(index, []):
                blocked[index].append(obstacle.reason)
    if Part.CONFIG not in kind.holds and not blocked and (reason := _redeclared(plan)):
        # What opens a bias slot has been named; another change of the model concerns every edit.
        return {index: [reason] for index in range(len(plan.edits))}
    return blocked


def _refused(plan: Plan, kind: Carrier, index: int, reasons: list[str]) -> Finding:
    """Return what is said of an edit that a carrier cannot hold."""
    edit = plan.edits[index]
    hard = [
        finding
        for finding in plan.findings
        if finding.edit == index and finding.exactness is Exactness.IMPOSSIBLE
    ]
    vector = Part.CONSTANTS in kind.holds
    sites = hard[0].sites if hard and not vector else edit.sites
    more = f" (and {len(reasons) - 1} more such reasons)" if len(reasons) > 1 else ""
    others = [carrier_of(name) for name in CARRIERS if name != kind.name]
    fitting = [f"--to {other.name}" for other in others if index not in _blocked(plan, other)]
    remedies = [f"write it with {' or '.join(fitting)}"] if fitting else []
    if not vector or not fitting:
        remedies += [finding.remedy for finding in hard if finding.remedy][:1]
    return Finding(
        index,
        edit.kind,
        edit.concept,
        sites,
        Exactness.IMPOSSIBLE,
        f"{reasons[0]}{more}",
        "; or ".join(remedies),
    )


def _redeclared(plan: Plan) -> str | None:
    """Return why a plan that changes config.json is no adapter; untying a head does not count."""
    tied = plan.layout.family.tied_by
    keys = [change.key for change in plan.config if change.key not in tied]
    if not keys:
        return None
    reason = "an adapter is for the model as it is declared, and the plan changes "
    return reason + f"{', '.join(keys)} in config.json"


def _obstacles(plan: Plan, kind: Carrier) -> Iterator[_Obstacle]:
    """Yield what of a plan a carrier cannot hold, or the one program that loads it."""
    if plan.widened and Part.CONFIG not in kind.holds and (reason := _redeclared(plan)):
        # Of another width is every tensor, whichever edit it is for.
        yield _Obstacle(range(len(plan.edits)), reason)
        return
    if Part.BIASES not in kind.holds:
        for bias in plan.biases:
            if not bias.is_zero():
                what = "creates" if bias.create else "changes"
                reason = "an adapter holds no bias that runtimes take, and the edit "
                yield _Obstacle(bias.edits, f"{reason}{what} {bias.name}")
    for update in plan.tensors:
        if update.replacement is not None:
            if Part.NORMS not in kind.holds:
                reason = f"an adapter holds no norm, and the edit changes {update.name}"
                yield _Obstacle(update.edits, reason)
        elif Part.WEIGHTS not in kind.holds and len(update.shape) > 2:
            reason = f"an adapter has factors of matrices, and {update.name} is one tensor of all "
            yield _Obstacle(update.edits, f"{reason}experts")
        elif Part.WEIGHTS not in kind.holds and (rank := rank_of(update)) > min(update.shape) // 2:
            reason = f"the change of {update.name} has rank {rank}: factors would be as large as "
            yield _Obstacle(update.edits, f"{reason}the weight")
    if kind.loader is not None:
        yield from _no_slot(plan, kind.loader) if kind.whole else _no_factor(plan, kind.loader)


def _no_factor(plan: Plan, loader: str) -> Iterator[_Obstacle]:
    """Yield what of an adapter the one program that it is for would drop or refuse."""
    for target in targets_of(plan):
        reason = _refusal(plan, loader, target)
        if reason is not None and target.update is not None:
            yield _Obstacle(target.update.edits, reason)


def _no_slot(plan: Plan, loader: str) -> Iterator[_Obstacle]:
    """Yield what of a plan the one program that loads a model has no slot for."""
    layout, runtime = plan.layout, runtime_of(plan.layout, loader)
    if runtime is None:
        reason = f"the table {layout.family.name!r} says nothing of {loader}"
        yield _Obstacle(range(len(plan.edits)), reason)
        return
    modules = {linear.bias.name: linear.module for linear in layout.linears}
    for bias in plan.biases:
        if bias.create and not bias.is_zero() and modules.get(bias.name) not in runtime.biases:
            reason = f"{loader} has no slot for {bias.name} ({runtime.source})"
            yield _Obstacle(bias.edits, reason)
    if plan.unties and not runtime.untied_head:
        reason = f"{loader} loads no output head of its own here ({runtime.source})"
        for update in plan.tensors:
            if update.source == layout.embed:
                yield _Obstacle(update.edits, reason)


def _hindrance(plan: Plan, name: str, kind: Carrier) -> Hindrance:
    if name not in kind.readers or name in GENERAL:
        return None, True
    layout = plan.layout
    where = f"the table {layout.family.name!r}"
    engine = kind.loader or name
    runtime = runtime_of(layout, engine)
    if runtime is None:
        return f"{where} says nothing of {engine}", False
    if (found := width_hindrance(plan, engine)) is not None:
        return found
    if kind.whole:
        untied = not layout.tied or plan.unties
        reason = model_hindrance(layout, runtime, plan.biases, untied=untied, companions=False)
        return reason, True
    base = model_hindrance(layout, runtime, untied=not layout.tied)
    if base is not None:
        return base, True
    if Part.CONSTANTS in kind.holds:
        if runtime.control_vector is None:
            return f"{where} says nothing of control vectors", False
        return (None if runtime.control_vector else _NO_GRAPH), True
    if runtime.lora is None:
        return f"{where} says nothing of adapters in {engine}", False
    return _adapter_hindrance(plan, engine), True


def _adapter_hindrance(plan: Plan, engine: str) -> str | None:
    """Return why a runtime would not serve an adapter of a plan as it is meant, or None."""
    targets = targets_of(plan)
    rank = max((rank_of(target.update) for target in targets if target.update), default=0)
    if engine == "vllm" and rank > VLLM_RANKS[-1]:
        return f"vllm takes adapters of rank up to {VLLM_RANKS[-1]}, and this one has {rank}"
    reasons = (_refusal(plan, engine, target) for target in targets)
    return next((reason for reason in reasons if reason is not None), None)


def _refusal(plan: Plan, name: str, target: Target) -> str | None:
    """Return why a runtime would not serve one target of an adapter as it is meant."""
    layout, runtime = plan.layout, runtime_of(plan.layout, name)
    where = f"the table {layout.family.name!r}"
    if runtime is None or runtime.lora is None:
        return f"{where} says nothing of adapters in {name}"
    if name == "llama.cpp" and layout.family.gguf is None:
        return f"{where} has no names of tensors in GGUF files"
    if not runtime.lora:
        return f"{name} takes no adapters for {layout.family.architectures[0]}"
    if target.role not in runtime.lora:
        reason = f"{name} takes no adapter of {_PLURAL[target.role]} in "
        reason += f"{layout.family.architectures[0]} ({runtime.source})"
        if (name, target.role) == ("vllm", "embed") and layout.embed_multiplier != 1:
            reason += ", and its general backend leaves the embedding's multiplier off such rows"
        return reason
    if _needs_head(layout, name, target) and not runtime.untied_head:
        return (
            "the head is tied to the embedding, llama.cpp takes one tensor for both, and loads no "
            f"head of its own here ({runtime.source}): with an adapter of it the process aborts"
        )
    if target.role == "head" and name == "vllm":
        if layout.tied:
            return "the head is tied to the embedding, and vllm has not been run so with an adapter"
        if target.shape[0] > _HEAD_LIMIT:
            return f"vllm takes adapters of heads up to {_HEAD_LIMIT} tokens"
    return None


def _needs_head(layout: Layout, name: str, target: Target) -> bool:
    """Whether an adapter is for a tensor that a runtime takes a tied head for as well."""
    return layout.tied and name == _LLAMA_CPP and target.role in ("embed", "head")


def beside_head(plan: Plan, carrier: str) -> tuple[Target, ...]:
    """Return what of an adapter is for a base in which a tied head is a tensor of its own."""
    kind = carrier_of(carrier)
    if kind.beside is None or kind.loader is None:
        return ()
    return tuple(t for t in targets_of(plan) if _needs_head(plan.layout, kind.loader, t))


def _no_vector(layout: Layout, edit: Edit) -> str | None:
    """Return why an edit is no control vector, or None."""
    runtime = runtime_of(layout, "llama.cpp")
    if runtime is None or runtime.control_vector is None:
        return f"the table {layout.family.name!r} says nothing of control vectors"
    if not runtime.control_vector:
        return _NO_GRAPH
    if not isinstance(edit.map, AffineMap) or not edit.map.is_translation():
        return f"a control vector adds a constant, and {edit.kind} does more than that"
    for site in edit.sites:
        layer = _layer(layout, site)
        if layer is None:
            return f"llama.cpp adds a control vector behind a whole block, and {site} is elsewhere"
        if layer < 1:
            return (
                f"llama.cpp adds a control vector behind block 1 and later, and {site} comes before"
            )
    return None


def _layers(layout: Layout, edit: Edit) -> list[int]:
    found = [_layer(layout, site) for site in edit.sites]
    return [layer for layer in found if layer is not None]


def _layer(layout: Layout, site: Site) -> int | None:
    """Return the block behind which a site is; −1 before the first, None inside one."""
    if site.kind is SiteKind.EMBED:
        return -1
    if site.layer is None:
        return None
    if site.kind is SiteKind.RESID_PRE:
        return site.layer - 1
    return site.layer if site.kind is SiteKind.RESID_POST else None
