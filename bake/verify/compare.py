"""Compare a baked artifact with the hook-steered base model: three questions, in their order.

The reference shares no code with the fold: it loads the base with transformers, puts the edits on
as hooks and runs it (for a merge, PEFT's adapter at work is the reference). What the plan comes to
is handed in as values, which the hooks judge. The baked checkpoint is loaded as any user would load
it.
"""

from dataclasses import replace
from functools import partial
from time import perf_counter

from bake.verify.artifact import changed_files
from bake.verify.assemble import report_of
from bake.verify.collect import collect, draw_further
from bake.verify.effects import read_by_baked, read_by_base, with_side_effects
from bake.verify.inputs import Inputs, opened
from bake.verify.planned import Planned
from bake.verify.precision import full_float32
from bake.verify.report import Report
from bake.verify.runner import Runner
from bake.verify.serving import serve
from bake.verify.stages import stages_of
from bake.verify.stored.check import FilesChecked, check_files
from bake.verify.verification import Verification


def compare(asked: Verification, planned: Planned) -> Report:
    """Measure how far an artifact lies from the hook-steered base model.

    Args:
        asked: the artifact, and how it is measured.
        planned: what its plan comes to, made again from base and edits.

    Raises:
        UsageError: something is asked for that has no meaning for the artifact.
        InputError: the artifact or the base cannot be read, or the base is another one.
        FamilyError: no table fits the base.
    """
    start = perf_counter()
    with opened(asked, planned) as inputs, full_float32():
        runner = Runner(inputs)
        report = _report_of(runner)
        runner.store.clear()
    return replace(report, timing={**report.timing, "total": perf_counter() - start})


def _report_of(runner: Runner) -> Report:
    inputs = runner.inputs
    inputs.asked.expect(stages_of(inputs))
    inputs.asked.remark("digests of the artifact's files")
    changed = changed_files(inputs.artifact)
    checked = _checked(inputs)
    reading = read_by_base(runner)
    limits = collect(runner)
    reading = read_by_baked(runner, reading)
    runner.release()
    served = serve(limits, partial(draw_further, runner, limits.evidence))
    runner.release()
    report = report_of(limits, checked, changed, served)
    return with_side_effects(report, runner, limits.evidence.texts, reading)


def _checked(inputs: Inputs) -> FilesChecked:
    """Compare what the files hold with the plan."""
    inputs.asked.remark("files against the plan")
    return check_files(inputs.files, inputs.planned.model.digest)
