"""Compare a baked artifact with the hook-steered base model, logit by logit.

The reference shares no code with the fold: it loads the base with transformers, puts the edits on
as hooks and runs it (for a merge, PEFT's adapter at work is the reference). The baked checkpoint is
loaded as any user would load it.
"""

from dataclasses import replace
from time import perf_counter

from bake.verify.artifact import changed_files
from bake.verify.assemble import report_of, served_report
from bake.verify.effects import with_side_effects
from bake.verify.evidence import collect
from bake.verify.inputs import opened
from bake.verify.report import Report
from bake.verify.runner import Runner
from bake.verify.serving import serve
from bake.verify.verification import Verification


def compare(asked: Verification) -> Report:
    """Measure how far an artifact lies from the hook-steered base model.

    Raises:
        UsageError: something is asked for that has no meaning for the artifact.
        InputError: the artifact or the base cannot be read, or the base is another one.
        FamilyError: no table fits the base.
    """
    start = perf_counter()
    with opened(asked) as inputs:
        runner = Runner(inputs)
        report = _report_of(runner)
        runner.store.clear()
    return replace(report, timing={**report.timing, "total": perf_counter() - start})


def _report_of(runner: Runner) -> Report:
    """Return the report of a checkpoint, or of what runtimes alone load."""
    inputs = runner.inputs
    inputs.asked.remark("digests of the artifact's files")
    changed = changed_files(inputs.artifact)
    if not inputs.artifact.carrier.checkpoint:
        return with_side_effects(served_report(inputs, serve(runner), changed), runner, {})
    evidence = collect(runner)
    report = report_of(inputs, evidence, changed)
    report = with_side_effects(report, runner, evidence.texts)
    served = serve(runner)
    return replace(
        report,
        rows=(*report.rows, *served.rows),
        runtimes=served.records,
        timing={"forward": evidence.seconds},
    )
