"""Which carrier holds a plan: a checkpoint, an adapter or a control vector. Pure.

A carrier holds an edit exactly or not at all. What each cannot hold:

- ``lora`` (PEFT) and ``gguf-lora`` (llama.cpp): biases, norms, changes of config.json, and changes
  of weights whose rank is not low. Runtimes drop or refuse such parts of an adapter.
- ``control-vector`` (llama.cpp): anything but a constant added to the stream behind block 1 or
  later.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from bake.affine import AffineMap
from bake.edits import Edit
from bake.errors import UsageError
from bake.families import Layout, runtime_of
from bake.plan.lowrank import Role, Target, rank_of, targets_of
from bake.plan.types import Exactness, Finding, Plan, RuntimeVerdict, Status
from bake.sites import Site, SiteKind

CARRIERS = ("checkpoint", "lora", "gguf-lora", "control-vector")
_HEAD_LIMIT = 258048  # vLLM lora/layers/logits_processor.py: rows of a head that an adapter is for
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
    _check(carrier)
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


def carrier_runtimes(plan: Plan, carrier: str) -> tuple[RuntimeVerdict, ...]:
    """Return which runtimes load the carrier as it is meant, of those that read such files.

    Raises:
        UsageError: there is no such carrier.
    """
    _check(carrier)
    if carrier == "checkpoint":
        return plan.runtimes
    wanted = {verdict.runtime for verdict in plan.runtimes if verdict.wanted}
    if carrier == "lora":
        verdicts = [("transformers", "loads", "PEFT adds the factors to its modules")]
        verdicts.append(("vllm", *_adapter_verdict(plan, "vllm")))
    elif carrier == "gguf-lora":
        verdicts = [("llama.cpp", *_adapter_verdict(plan, "llama.cpp"))]
    else:
        verdicts = [("llama.cpp", *_vector_verdict(plan.layout))]
    return tuple(
        RuntimeVerdict(name, status, reason, name in wanted)  # type: ignore[arg-type]
        for name, status, reason in verdicts
    )


def vector_layers(plan: Plan) -> tuple[tuple[int, Edit], ...]:
    """Return every block behind which an edit adds its constant, in the plan's order."""
    return tuple((layer, edit) for edit in plan.edits for layer in _layers(plan.layout, edit))


def _check(carrier: str) -> None:
    if carrier not in CARRIERS:
        raise UsageError(
            f"there is no carrier {carrier!r}", fix=f"the carriers are {', '.join(CARRIERS)}"
        )


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
    for obstacle in _obstacles(plan, carrier):
        sites = touched.get(obstacle.tensor, frozenset())
        concerned = [
            i
            for i, edit in enumerate(plan.edits)
            if any(Site(site.kind, site.layer) in sites for site in edit.sites)
        ]
        for index in concerned or range(len(plan.edits)):
            if obstacle.reason not in blocked[index]:
                blocked[index].append(obstacle.reason)
    redeclared = _redeclared(plan)
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
    yield from _served(plan, carrier)


def _served(plan: Plan, carrier: str) -> Iterator[_Obstacle]:
    """Yield what the runtimes that read the adapter, and are wanted, would drop or refuse."""
    wanted = {verdict.runtime for verdict in plan.runtimes if verdict.wanted}
    readers = ["llama.cpp"] if carrier == "gguf-lora" else [n for n in ("vllm",) if n in wanted]
    for name in readers:
        for target in targets_of(plan):
            reason = _refusal(plan, name, target)
            if reason is not None:
                yield _Obstacle(target.name, reason)


def _adapter_verdict(plan: Plan, name: str) -> tuple[Status, str]:
    runtime = runtime_of(plan.layout, name)
    if runtime is None or runtime.lora is None:
        return "unknown", f"the table {plan.layout.family.name!r} says nothing of adapters in it"
    for target in targets_of(plan):
        reason = _refusal(plan, name, target)
        if reason is not None:
            return "refused", reason
    return "loads", runtime.source


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
        reason += layout.family.architectures[0]
        if target.role == "embed" and layout.embed_multiplier != 1:
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


def _vector_verdict(layout: Layout) -> tuple[Status, str]:
    runtime = runtime_of(layout, "llama.cpp")
    if runtime is None or runtime.control_vector is None:
        return "unknown", f"the table {layout.family.name!r} says nothing of control vectors"
    if not runtime.control_vector:
        return "refused", "its graph of this architecture adds no control vector"
    return "loads", runtime.source


def _no_vector(layout: Layout, edit: Edit) -> str | None:
    """Return why an edit is no control vector, or None."""
    status, why = _vector_verdict(layout)
    if status != "loads":
        return why
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
