"""Which carrier holds a plan: a checkpoint, an adapter, a control vector or a GGUF file. Pure.

A carrier holds an edit exactly or not at all. What each cannot hold:

- ``lora`` (PEFT) and ``gguf-lora`` (llama.cpp): biases, norms, changes of config.json, and changes
  of weights whose rank is not low. Runtimes drop or refuse such parts of an adapter.
- ``control-vector`` (llama.cpp): anything but a constant added to the stream behind block 1 or
  later.
- ``gguf`` (llama.cpp): biases and output heads that its loader has no slot for.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bake.affine import AffineMap
from bake.artifact.carrier import CARRIERS, carrier_of
from bake.edits import Edit
from bake.families import READS, RUNTIMES, Layout, runtime_of
from bake.plan.lowrank import Role, Target, is_copy, rank_of, targets_of
from bake.plan.targets import GGUF_ENGINE, LLAMA_CPP, ROUNDED, conclude, model_hindrance
from bake.plan.types import Exactness, Finding, Plan, RuntimeVerdict
from bake.sites import Site, SiteKind

_HEAD_LIMIT = 258048  # vLLM lora/layers/logits_processor.py: rows of a head that an adapter is for
_RANK_LIMIT = 512  # vLLM config/lora.py: MaxLoRARanks
_NO_GRAPH = "llama.cpp's graph of this architecture adds no control vector"
_PLURAL: dict[Role, str] = {
    "linear": "linear layers",
    "expert": "experts",
    "embed": "the embedding",
    "positions": "position tables",
    "head": "the output head",
}


@dataclass(frozen=True, slots=True)
class _Obstacle:
    """One tensor of a plan that a carrier cannot hold."""

    tensor: str
    reason: str


def carrier_findings(plan: Plan, carrier: str) -> tuple[Finding, ...]:
    """Return what a carrier does with every edit of a plan.

    Every finding is EXACT or IMPOSSIBLE, or NULLING where the plan says so. One that is IMPOSSIBLE
    names the carriers that hold the edit in its remedy.

    Raises:
        UsageError: there is no such carrier.
    """
    carrier_of(carrier)
    blocked = _blocked(plan, carrier)
    by_edit = _plan_findings(plan)
    findings: list[Finding] = []
    for index, edit in enumerate(plan.edits):
        if index in blocked:
            reasons = blocked[index]
            more = f" (and {len(reasons) - 1} more such reasons)" if len(reasons) > 1 else ""
            sites = _blocking_sites(by_edit[index], edit, carrier)
            findings.append(
                Finding(
                    edit.kind,
                    edit.concept,
                    sites,
                    Exactness.IMPOSSIBLE,
                    f"{reasons[0]}{more}",
                    _remedy(plan, carrier, index, by_edit[index]),
                )
            )
        elif carrier == "control-vector":
            reason = f"added behind {', '.join(f'block {n}' for n in _layers(plan.layout, edit))}"
            findings.append(Finding(edit.kind, edit.concept, edit.sites, Exactness.EXACT, reason))
        else:
            findings += by_edit[index]
    return tuple(findings)


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
    carrier_of(carrier)
    if carrier == "checkpoint":
        return plan.runtimes
    wanted = {verdict.runtime for verdict in plan.runtimes if verdict.wanted}
    findings = carrier_findings(plan, carrier)
    verdicts = []
    for name in RUNTIMES:
        reason, known = _hindrance(plan, name, carrier)
        verdict = conclude(plan, findings, name, carrier, name in wanted, reason, known=known)
        if codes and verdict.status == "exact":
            verdict = replace(verdict, status="approximate", reason=ROUNDED)
        verdicts.append(verdict)
    return tuple(verdicts)


def vector_layers(plan: Plan) -> tuple[tuple[int, Edit], ...]:
    """Return every block behind which an edit adds its constant, in the plan's order."""
    return tuple((layer, edit) for edit in plan.edits for layer in _layers(plan.layout, edit))


def _blocked(plan: Plan, carrier: str) -> dict[int, list[str]]:
    """Return the edits that the carrier cannot hold, each with its reasons."""
    if carrier == "control-vector":
        reasons = {i: _no_vector(plan.layout, edit) for i, edit in enumerate(plan.edits)}
        return {i: [reason] for i, reason in reasons.items() if reason is not None}
    blocked: defaultdict[int, list[str]] = defaultdict(list)
    for index, findings in enumerate(_plan_findings(plan)):
        for finding in findings:
            if finding.exactness is Exactness.IMPOSSIBLE:
                blocked[index].append(finding.reason)
    if carrier == "checkpoint":
        return dict(blocked)
    touched = _touched(plan)
    obstacles = _no_slot(plan) if carrier == "gguf" else _obstacles(plan, carrier)
    for obstacle in obstacles:
        sites = touched.get(obstacle.tensor, frozenset())
        concerned = [
            i
            for i, edit in enumerate(plan.edits)
            if any(Site(site.kind, site.layer) in sites for site in edit.sites)
        ]
        for index in concerned or range(len(plan.edits)):
            if obstacle.reason not in blocked[index]:
                blocked[index].append(obstacle.reason)
    redeclared = None if carrier == "gguf" else _redeclared(plan)
    if redeclared is not None and not any(blocked.values()):
        # What opens a bias slot has been named; another change of the model concerns every edit.
        return {index: [redeclared] for index in range(len(plan.edits))}
    return {index: reasons for index, reasons in blocked.items() if reasons}


def _redeclared(plan: Plan) -> str | None:
    """Return why a plan that changes config.json is no adapter; untying a head does not count."""
    keys = [change.key for change in plan.config if change.key != "tie_word_embeddings"]
    if not keys:
        return None
    reason = "an adapter is for the model as it is declared, and the plan changes "
    return reason + f"{', '.join(keys)} in config.json"


def _plan_findings(plan: Plan) -> list[list[Finding]]:
    """Return the plan's findings for each edit; it lists them edit by edit, in order.

    An edit has one finding that is not IMPOSSIBLE, or several that are, each for another reason.
    """
    grouped: list[list[Finding]] = []
    named: dict[tuple[str, str], list[Finding]] = {}
    rest = list(plan.findings)
    for edit in plan.edits:
        own: list[Finding] = []
        while rest and _continues(own, rest[0], edit):
            own.append(rest.pop(0))
        # subtle: of two edits of one name the first may have taken what is said of the second.
        grouped.append(own or named[edit.kind, edit.concept])
        named[edit.kind, edit.concept] = grouped[-1]
    return grouped


def _continues(own: list[Finding], finding: Finding, edit: Edit) -> bool:
    """Whether a finding belongs to an edit, after those that it has."""
    if (finding.kind, finding.concept) != (edit.kind, edit.concept):
        return False
    if not own:
        return True
    hard = own[0].exactness is finding.exactness is Exactness.IMPOSSIBLE
    reasons = {(known.reason, known.remedy) for known in own}
    again = (finding.reason, finding.remedy) in reasons
    return hard and not again and set(finding.sites) <= set(edit.sites)


def _obstacles(plan: Plan, carrier: str) -> Iterator[_Obstacle]:
    """Yield what of a plan an adapter cannot hold."""
    for bias in plan.biases:
        if not bias.is_zero():
            what = "creates" if bias.create else "changes"
            yield _Obstacle(
                bias.name,
                f"an adapter holds no bias that runtimes take, and the edit {what} {bias.name}",
            )
    for update in plan.tensors:
        if update.replacement is not None:
            yield _Obstacle(
                update.name,
                f"an adapter holds no norm, and the edit changes {update.name}",
            )
        elif (rank := rank_of(update)) > min(update.shape) // 2:
            yield _Obstacle(
                update.name,
                f"the change of {update.name} has rank {rank}: factors would be as large as the "
                "weight",
            )
    if carrier == "gguf-lora":
        yield from _served(plan)


def _served(plan: Plan) -> Iterator[_Obstacle]:
    """Yield what llama.cpp, the one runtime that GGUF adapters are for, would drop or refuse."""
    for target in targets_of(plan):
        reason = _refusal(plan, LLAMA_CPP, target)
        if reason is not None:
            yield _Obstacle(target.name, reason)


def _no_slot(plan: Plan) -> Iterator[_Obstacle]:
    """Yield what of a plan llama.cpp's loader has no slot for in a GGUF file."""
    layout, runtime = plan.layout, runtime_of(plan.layout, LLAMA_CPP)
    if runtime is None:
        yield _Obstacle("", f"the table {layout.family.name!r} says nothing of llama.cpp")
        return
    linears = [x for branch in layout.branches for x in (*branch.reads, *branch.writes)]
    modules = {linear.bias.name: linear.module for linear in linears}
    for bias in plan.biases:
        if bias.create and not bias.is_zero() and modules.get(bias.name) not in runtime.biases:
            yield _Obstacle(bias.name, f"llama.cpp has no slot for {bias.name} ({runtime.source})")
    if any(update.create for update in plan.tensors) and not runtime.untied_head:
        reason = f"llama.cpp loads no output head of its own here ({runtime.source})"
        changed = [update.name for update in plan.tensors if not is_copy(update)]
        for name in (layout.embed, layout.unembed.weight):
            if name in changed:
                yield _Obstacle(name, reason)


def _hindrance(plan: Plan, name: str, carrier: str) -> tuple[str | None, bool]:
    """Return why a runtime would not serve a carrier as it is meant, or what is not known of it.

    Second is whether the table says anything of the runtime with this carrier.
    """
    if carrier not in READS[name] or name in ("transformers", "peft"):
        return None, True
    layout = plan.layout
    where = f"the table {layout.family.name!r}"
    engine = GGUF_ENGINE.get(name, name)
    runtime = runtime_of(layout, engine)
    if runtime is None:
        return f"{where} says nothing of {engine}", False
    if carrier == "gguf":
        untied = not layout.tied or any(update.create for update in plan.tensors)
        return (
            model_hindrance(layout, runtime, plan.biases, untied=untied, companions=False),
            True,
        )
    base = model_hindrance(layout, runtime, untied=not layout.tied)
    if base is not None:
        return base, True
    if carrier == "control-vector":
        if runtime.control_vector is None:
            return f"{where} says nothing of control vectors", False
        return (None if runtime.control_vector else _NO_GRAPH), True
    if runtime.lora is None:
        return f"{where} says nothing of adapters in {engine}", False
    targets = targets_of(plan)
    rank = max((rank_of(target.update) for target in targets if target.update), default=0)
    if engine == "vllm" and rank > _RANK_LIMIT:
        return f"vllm takes adapters of rank up to {_RANK_LIMIT}, and this one has {rank}", True
    reasons = (_refusal(plan, engine, target) for target in targets)
    return next((reason for reason in reasons if reason is not None), None), True


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
    if layout.tied and name == "llama.cpp" and target.role in ("embed", "head"):
        return (
            "the head is tied to the embedding, and llama.cpp takes one tensor for both: with an "
            "adapter of it the process aborts"
        )
    if target.role == "head" and name == "vllm":
        if layout.tied:
            return "the head is tied to the embedding, and vllm has not been run so with an adapter"
        if target.shape[0] > _HEAD_LIMIT:
            return f"vllm takes adapters of heads up to {_HEAD_LIMIT} tokens"
    return None


def _no_vector(layout: Layout, edit: Edit) -> str | None:
    """Return why an edit is no control vector, or None."""
    runtime = runtime_of(layout, LLAMA_CPP)
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


def _touched(plan: Plan) -> dict[str, frozenset[Site]]:
    """Return the sites whose edits change a tensor, for every tensor of the model."""
    layout = plan.layout
    first = {Site(SiteKind.EMBED), *layout.points[0]}
    found: dict[str, set[Site]] = {name: first for name in (layout.embed, *layout.positions)}
    for branch in layout.branches:
        after = {branch.output_site, *layout.points[branch.target]}
        for norm in (branch.norm_in, branch.norm_out):
            if norm is not None and norm.site is not None:
                for name in (norm.weight, norm.bias):
                    if name is not None:
                        found.setdefault(name, set()).add(norm.site)
        for linear in branch.writes:
            sites = after | ({linear.input_site} if linear.input_site else set())
            found[linear.weight] = found[linear.bias.name] = sites
        before = {branch.norm_in.site} if branch.norm_in and branch.norm_in.site else set()
        for linear in branch.reads:
            sites = before | {part.site for part in linear.parts}
            found[linear.weight] = found[linear.bias.name] = sites
    last = {Site(SiteKind.LN_FINAL_OUT)}
    for name in (layout.final_norm.weight, layout.final_norm.bias, layout.unembed.bias.name):
        if name is not None:
            found[name] = last
    found.setdefault(layout.unembed.weight, set()).update(last)
    return {name: frozenset(sites) for name, sites in found.items()}


def _blocking_sites(findings: list[Finding], edit: Edit, carrier: str) -> tuple[Site, ...]:
    hard = [f for f in findings if f.exactness is Exactness.IMPOSSIBLE]
    if hard and carrier != "control-vector":
        return hard[0].sites
    return edit.sites


def _remedy(plan: Plan, carrier: str, index: int, findings: list[Finding]) -> str:
    """Return the carriers that hold the edit; failing those, what the plan advises."""
    fitting = [
        f"--to {other}"
        for other in CARRIERS
        if other != carrier and index not in _blocked(plan, other)
    ]
    own = [f.remedy for f in findings if f.exactness is Exactness.IMPOSSIBLE and f.remedy]
    parts = [f"write it with {' or '.join(fitting)}"] if fitting else []
    if carrier != "control-vector" or not fitting:
        parts += own[:1]
    return "; or ".join(parts) if parts else "use an edit that one of the carriers holds"
