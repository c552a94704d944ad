"""What the runtimes make of a carrier, from the families' tables and from what they read at all."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec.structs import replace

from bake.artifact.carrier import KINDS, Carrier, Part
from bake.artifact.schema import RuntimeVerdict, Status
from bake.families import RUNTIMES, Layout, Linear, Runtime, configured, runtime_of
from bake.families.table import MISSING
from bake.plan.types import (
    BiasUpdate,
    ConfigChange,
    Exactness,
    Finding,
    Plan,
)

Config = Mapping[str, Any]
Hindrance = tuple[str | None, bool]
"""Why a runtime would not serve something as it is meant, or what is not known of it, or None; and
whether the table says anything of it."""

GENERAL = {
    "transformers": "the table is read from its classes",
    "peft": "it adds the factors to transformers' own modules",
}
"""The runtimes that need no section of a table, each with where what is said of it is read."""
ROUNDED = "the edited weights are rounded to a few bits each"
HALF = {
    "transformers": "it computes with dtype=torch.float16",
    "vllm": "it computes with --dtype float16, and by itself on a GPU older than Ampere "
    "(vllm/config/model.py: _resolve_auto_dtype): start it there with --dtype float32",
    "llama.cpp": "it computes on a GPU with weights in F16, or in codes that it decodes for cuBLAS "
    "(ggml-cuda.cu: ggml_cuda_mul_mat_cublas): use a BF16 or F32 file, or set "
    "GGML_CUDA_CUBLAS_COMPUTE_TYPE=f32",
}
"""Where a runtime computes in float16, in which neurons that compute an edit overflow."""
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
    new = _changed(config, plan.config)
    untied = not plan.layout.tied or plan.unties

    def hindrance(name: str) -> Hindrance:
        runtime = runtime_of(plan.layout, name)
        if runtime is None:
            silent = f"the table {plan.layout.family.name!r} says nothing of it"
            return (None, True) if name in GENERAL else (silent, False)
        if (found := width_hindrance(plan, name)) is not None:
            return found
        reason = model_hindrance(plan.layout, runtime, plan.biases, untied=untied)
        return reason or _misread(plan.layout, runtime, new), True

    return judged(plan, KINDS["checkpoint"], plan.findings, targets, hindrance)


def width_hindrance(plan: Plan, name: str) -> Hindrance | None:
    """Return why a runtime does not serve a widened plan, or why nobody knows; None where it does.

    The table is that of the class that the model is declared as.
    """
    widen = plan.layout.family.widen
    if not plan.widened or (widen is not None and name in widen.run):
        return None
    if widen is not None and name in widen.refused:
        return widen.refused[name], True
    return "no widened model of this table has been run in it", False


def judged(
    plan: Plan,
    kind: Carrier,
    findings: Sequence[Finding],
    targets: Iterable[str],
    hindrance: Callable[[str], Hindrance],
) -> tuple[RuntimeVerdict, ...]:
    """Return a verdict on a carrier for every runtime.

    Args:
        plan: the plan.
        kind: the carrier.
        findings: what it does with the edits.
        targets: the runtimes that the recipe wants.
        hindrance: returns what keeps a runtime from serving it as it is meant.
    """
    wanted = frozenset(targets)
    return tuple(
        _verdict(plan, kind, findings, name, name in wanted, hindrance(name)) for name in RUNTIMES
    )


def _verdict(
    plan: Plan,
    kind: Carrier,
    findings: Sequence[Finding],
    name: str,
    wanted: bool,
    hindrance: Hindrance,
) -> RuntimeVerdict:
    verdict = partial(RuntimeVerdict, runtime=name, wanted=wanted, reads=True, known=True)
    if name not in kind.readers:
        status, reason = _unread(name, kind)
        return verdict(status=status, reason=reason, reads=False)
    worst = max((f.exactness for f in findings), key=list(Exactness).index, default=Exactness.EXACT)
    if worst is Exactness.IMPOSSIBLE:
        why = next(f.reason for f in findings if f.exactness is worst)
        return verdict(status="refused", reason=f"a {kind.name} cannot hold the edit: {why}")
    hindered, known = hindrance
    if hindered is not None:
        status = "refused" if known else "not tested"
        return verdict(status=status, reason=hindered, known=known)
    source = _source(plan.layout, name, kind)
    if plan.layout.coded is not None:
        untried = f"no test runs this family of a base in {plan.layout.coded}; `bake verify` does"
        return verdict(status="not tested", reason=untried)
    if kind.name not in plan.layout.family.run.get(name, ()):
        untested = f"read, not run ({source})"
        if name in GENERAL:  # a table of the user's own
            untested = f"no test runs the table {plan.layout.family.name!r}; `bake verify` does"
        return verdict(status="not tested", reason=untested)
    if worst is not Exactness.EXACT:
        why = next(f.reason for f in findings if f.exactness is worst)
        if plan.computes and name in HALF:
            why += f"; not in float16, in which {HALF[name]}"
        return verdict(status="approximate", reason=why)
    return verdict(status="exact", reason=source)


def _unread(name: str, kind: Carrier) -> tuple[Status, str]:
    """Return the verdict on a runtime that a carrier is not for."""
    reason = kind.unread.get(name) or kind.unread_otherwise
    if reason is not None:
        return "refused", reason
    untried = (
        _UNTRIED if kind.suffix == ".gguf" else f"nobody has tried whether it reads a {kind.name}"
    )
    return "not tested", untried


def converted_runtimes(
    verdicts: Sequence[RuntimeVerdict], kind: Carrier, *, codes: bool
) -> tuple[RuntimeVerdict, ...]:
    """Return the verdicts on the file that its loader's own converter makes of a checkpoint.

    Args:
        verdicts: on the checkpoint.
        kind: the carrier of the file.
        codes: whether the file stores weights in a few bits each.
    """
    own = next(verdict for verdict in verdicts if verdict.runtime == kind.loader)
    found = []
    for verdict in verdicts:
        name = verdict.runtime
        if name not in kind.readers:
            status, reason = _unread(name, kind)
            other = replace(verdict, status=status, reason=reason, reads=False, known=True)
        elif name != own.runtime and own.status != "refused":
            reason = f"read, not run (it starts {own.runtime}; {own.reason})"
            other = replace(verdict, status="not tested", reason=reason, reads=True, known=True)
        elif own.status == "exact" and codes:
            other = replace(own, status="approximate", reason=ROUNDED)
        else:
            other = replace(own, runtime=name, wanted=verdict.wanted)
        found.append(other)
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
    for linear in (*layout.linears, layout.unembed):
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


def _source(layout: Layout, name: str, kind: Carrier) -> str:
    if name in GENERAL:
        if name == "transformers" and Part.LOW_RANK in kind.holds:
            return "its load_adapter calls PEFT"
        return GENERAL[name]
    engine = kind.loader or name
    runtime = runtime_of(layout, engine)
    assert runtime is not None
    return runtime.source if engine == name else f"it starts {engine}; {runtime.source}"
