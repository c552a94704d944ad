"""What the runtimes make of a carrier, from the families' tables and from what they read at all."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bake.artifact.carrier import KINDS
from bake.families import READS, RUNTIMES, Layout, Linear, Runtime, configured, runtime_of
from bake.families.table import MISSING
from bake.plan.types import (
    BiasUpdate,
    ConfigChange,
    Exactness,
    Finding,
    Plan,
    RuntimeVerdict,
    Status,
)

Config = Mapping[str, Any]

LLAMA_CPP = "llama.cpp"
GGUF_ENGINE = {LLAMA_CPP: LLAMA_CPP, "ollama": LLAMA_CPP}
"""Whose code reads GGUF files: Ollama starts llama.cpp's server."""

_GENERAL = {
    "transformers": "the table is read from its classes",
    "peft": "it adds the factors to transformers' own modules",
}
ROUNDED = "the edited weights are rounded to a few bits each"
_UNTRIED = "it has a reader of GGUF files, which was neither read nor run"


def checkpoint_runtimes(
    plan: Plan, config: Config, targets: Iterable[str]
) -> tuple[RuntimeVerdict, ...]:
    """Return a verdict on the planned checkpoint for every runtime.

    Args:
        plan: what its own ``runtimes`` say does not count.
        config: the base's config.json.
        targets: the runtimes that the recipe wants.
    """
    wanted = frozenset(targets)
    new = _changed(config, plan.config)
    untied = not plan.layout.tied or any(
        c.key == "tie_word_embeddings" and c.new is False for c in plan.config
    )
    verdicts = []
    for name in RUNTIMES:
        runtime, known, reason = runtime_of(plan.layout, name), True, None
        if name not in _GENERAL and runtime is None:
            known, reason = False, f"the table {plan.layout.family.name!r} says nothing of it"
        elif runtime is not None:
            reason = model_hindrance(plan.layout, runtime, plan.biases, untied=untied)
            reason = reason or _misread(plan.layout, runtime, new)
        verdicts.append(
            conclude(plan, plan.findings, name, "checkpoint", name in wanted, reason, known=known)
        )
    return tuple(verdicts)


def conclude(
    plan: Plan,
    findings: Sequence[Finding],
    name: str,
    carrier: str,
    wanted: bool,
    hindrance: str | None,
    *,
    known: bool = True,
) -> RuntimeVerdict:
    """Return the verdict on a runtime.

    Args:
        plan: the plan.
        findings: what the carrier does with the edits.
        name: the runtime.
        carrier: the carrier.
        wanted: whether the runtime is a target.
        hindrance: why the runtime would not serve it as it is meant, or what is not known of it.
        known: whether the table says anything of the runtime with this carrier.
    """
    if carrier not in READS[name]:
        status, reason = unread(name, carrier)
        return RuntimeVerdict(name, status, reason, wanted, reads=False)
    worst = max((f.exactness for f in findings), key=list(Exactness).index, default=Exactness.EXACT)
    if worst is Exactness.IMPOSSIBLE:
        why = next(f.reason for f in findings if f.exactness is worst)
        return RuntimeVerdict(name, "refused", f"a {carrier} cannot hold the edit: {why}", wanted)
    if hindrance is not None:
        status = "refused" if known else "not tested"
        return RuntimeVerdict(name, status, hindrance, wanted, known=known)
    source = _source(plan.layout, name, carrier)
    if carrier not in plan.layout.family.run.get(name, ()):
        untested = f"read, not run ({source})"
        if name in _GENERAL:  # a table of the user's own
            untested = f"no test runs the table {plan.layout.family.name!r}; `bake verify` does"
        return RuntimeVerdict(name, "not tested", untested, wanted)
    if worst is not Exactness.EXACT:
        why = next(f.reason for f in findings if f.exactness is worst)
        return RuntimeVerdict(name, "approximate", why, wanted)
    return RuntimeVerdict(name, "exact", source, wanted)


def unread(name: str, carrier: str) -> tuple[Status, str]:
    """Return the verdict on a runtime that a carrier is not for."""
    kind = KINDS[carrier]
    reason = kind.unread.get(name) or kind.unread_otherwise
    return ("not tested", _UNTRIED) if reason is None else ("refused", reason)


def converted_runtimes(
    verdicts: Sequence[RuntimeVerdict], *, codes: bool
) -> tuple[RuntimeVerdict, ...]:
    """Return the verdicts on the GGUF file that llama.cpp's converter makes of a checkpoint.

    Args:
        verdicts: on the checkpoint.
        codes: whether the file stores weights in a few bits each.
    """
    own = next(verdict for verdict in verdicts if verdict.runtime == LLAMA_CPP)
    found = []
    for verdict in verdicts:
        name = verdict.runtime
        if "gguf" not in READS[name]:
            status, reason = unread(name, "gguf")
            found.append(RuntimeVerdict(name, status, reason, verdict.wanted, reads=False))
        elif name != own.runtime and own.status != "refused":
            reason = f"read, not run (it starts {own.runtime}; {own.reason})"
            found.append(RuntimeVerdict(name, "not tested", reason, verdict.wanted))
        elif own.status == "exact" and codes:
            found.append(replace(own, status="approximate", reason=ROUNDED))
        else:
            found.append(replace(own, runtime=name, wanted=verdict.wanted))
    return tuple(found)


def model_hindrance(
    layout: Layout,
    runtime: Runtime,
    biases: Sequence[BiasUpdate] = (),
    *,
    untied: bool,
    companions: bool = True,
) -> str | None:
    """Return why a runtime would not load the model whole, or None.

    Args:
        layout: the model.
        runtime: the runtime.
        biases: what the plan changes.
        untied: whether there is an output head besides the embedding.
        companions: whether biases that are zero are written as well, for a config flag's sake.
    """
    if not runtime.checkpoint:
        return f"it loads no {layout.family.architectures[0]} ({runtime.source})"
    changed = {bias.name: bias for bias in biases}
    linears = [x for branch in layout.branches for x in (*branch.reads, *branch.writes)]
    for linear in (*linears, layout.unembed):
        reason = _bias_hindrance(linear, runtime, changed.get(linear.bias.name), companions)
        if reason is not None:
            return reason
    if untied and not runtime.untied_head:
        verb = "silently drops" if runtime.extra_head == "dropped" else "refuses"
        return f"it {verb} an output head that differs from the embedding ({runtime.source})"
    return None


def _bias_hindrance(
    linear: Linear, runtime: Runtime, update: BiasUpdate | None, companions: bool
) -> str | None:
    slot = linear.bias
    if slot.state != "present" and update is None:
        return None
    zero = update is not None and update.is_zero()
    if linear.module not in runtime.biases:
        # A zero companion may be dropped without harm, but a loader that counts tensors refuses it.
        if zero and (runtime.extra_bias == "dropped" or not companions):
            return None
        verb = "silently drops" if runtime.extra_bias == "dropped" else "refuses to load"
        own = ", which the base has" if update is None else ""
        return f"it {verb} {slot.name}{own} ({runtime.source})"
    if linear.module in runtime.misplaced and not zero:
        return f"it silently loads {slot.name} in the wrong order ({runtime.source})"
    return None


def _misread(layout: Layout, runtime: Runtime, config: Config) -> str | None:
    """Return what the runtime would take for another value than the model has, or None.

    transformers 5 writes ``rope_theta`` below ``rope_parameters``, where others do not look.
    """
    for key, default in runtime.defaults.items():
        taken, meant = config.get(key, default), _meant(layout, config, key)
        if taken != meant:
            shown = "is unsaid" if meant is MISSING else f"is {json_text(meant)}"
            return (
                f"it silently takes {json_text(taken)} for {key}, which {shown}: it reads the top "
                f"level of config.json only ({runtime.source})"
            )
    return None


def _meant(layout: Layout, config: Config, key: str) -> Any:
    """Return a config key's value as transformers reads it."""
    nested = config.get("rope_parameters")
    if isinstance(nested, Mapping):
        # Of a model with two kinds of attention, the one that the plain key stands for.
        nested = nested.get("full_attention", nested)
    if isinstance(nested, Mapping) and key in nested:
        return nested[key]
    return configured(layout.family, config, key)


def json_text(value: Any) -> str:
    """Return a config value as config.json would show it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _changed(config: Config, changes: Sequence[ConfigChange]) -> Config:
    new = dict(config)
    for change in changes:
        if change.new is None:
            new.pop(change.key, None)
        else:
            new[change.key] = change.new
    return new


def _source(layout: Layout, name: str, carrier: str) -> str:
    if name in _GENERAL:
        if name == "transformers" and carrier == "lora":
            return "its load_adapter calls PEFT"
        return _GENERAL[name]
    engine = name if carrier == "checkpoint" else GGUF_ENGINE.get(name, name)
    runtime = runtime_of(layout, engine)
    assert runtime is not None
    return runtime.source if engine == name else f"it starts {engine}; {runtime.source}"
