"""What the runtimes make of a merged checkpoint: the verdicts that a plan gives of an exported one.

They depend on what the result stores (a head of its own, biases of the base, keys of its
configuration) and not on how its values came about. Where no table describes it, nothing is known.
"""

from bake.artifact.carrier import KINDS
from bake.artifact.schema import RuntimeVerdict
from bake.checkpoints import Checkpoint
from bake.errors import BakeError
from bake.families import fit
from bake.plan.targets import checkpoint_runtimes
from bake.plan.types import Plan


def merged_runtimes(result: Checkpoint) -> tuple[RuntimeVerdict, ...]:
    """Return a verdict on a merged checkpoint for every runtime, from its headers."""
    try:
        layout = fit.layout_of(result)
    except BakeError as error:  # no table, or one that is for other files: a merge needs neither
        return tuple(_unknown(runtime, error.what) for runtime in KINDS["merge"].readers)
    nothing = Plan(layout, (), (), (), (), (), (), (), 0)
    return checkpoint_runtimes(nothing, result.config, ())


def _unknown(runtime: str, why: str) -> RuntimeVerdict:
    reason = f"no table describes it: {why}"
    if runtime == "transformers":
        reason += "; `bake verify` runs it"
    return RuntimeVerdict(
        runtime=runtime, status="not tested", reason=reason, wanted=False, reads=True, known=False
    )
