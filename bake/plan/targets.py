"""Which runtimes load the planned checkpoint, from the families' tables."""

from collections.abc import Iterable, Sequence

from bake.families import Layout, runtime_of
from bake.plan.types import BiasUpdate, RuntimeVerdict, Status

KNOWN = ("transformers", "vllm", "llama.cpp")


def judge(
    layout: Layout, biases: Sequence[BiasUpdate], *, untied: bool, targets: Iterable[str]
) -> tuple[RuntimeVerdict, ...]:
    """Return a verdict for every runtime, those that the recipe wants marked as such."""
    wanted = tuple(targets)
    names = [*KNOWN, *(name for name in wanted if name not in KNOWN)]
    return tuple(
        RuntimeVerdict(name, *_verdict(name, layout, biases, untied), name in wanted)
        for name in names
    )


def _verdict(
    name: str, layout: Layout, biases: Sequence[BiasUpdate], untied: bool
) -> tuple[Status, str]:
    if name == "transformers":
        return "loads", "the tables are read from its classes"
    runtime = runtime_of(layout, name)
    if runtime is None:
        return "unknown", f"the table {layout.family.name!r} says nothing of it"
    modules = {
        linear.bias.name: linear.module
        for branch in layout.branches
        for linear in (*branch.reads, *branch.writes)
    }
    lost = [b for b in biases if modules.get(b.name) not in runtime.biases]
    # A zero companion may be dropped without harm, but a loader that counts tensors refuses it.
    if runtime.extra_bias == "dropped":
        lost = [bias for bias in lost if not bias.is_zero()]
    if lost:
        verb = "drops" if runtime.extra_bias == "dropped" else "refuses to load"
        return "refused", f"it {verb} {lost[0].name} ({runtime.source})"
    if untied and not runtime.untied_head:
        return "refused", f"it loads no output head of its own ({runtime.source})"
    return "loads", runtime.source
