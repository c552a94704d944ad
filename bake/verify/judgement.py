"""What a report that did not pass means, as the error that the command ends with."""

from collections.abc import Sequence

from bake.errors import ExactnessBug, Inconclusive, VerificationFailed
from bake.verify.report import Report
from bake.verify.rows import Row


def raise_unless_passed(report: Report) -> None:
    """Raise what a report that did not pass means.

    Raises:
        VerificationFailed: a file was changed, a runtime failed, or a limit was missed.
        ExactnessBug: a plan that says EXACT measures otherwise, in files that nobody changed.
        Inconclusive: no limit was missed, and one of the questions could not be answered.
    """
    if report.passed:
        return
    failed = [row for row in report.rows if row.passed is False]
    if report.verdict == "inconclusive":
        raise _inconclusive(report, failed)
    changed = [row for row in failed if row.name == "files as exported"]
    if changed:
        raise VerificationFailed(
            f"the artifact was changed after the export ({changed[0].note})",
            where=report.artifact,
            why="its files have other digests than bake.json says",
            fix="export again",
        )
    missed = next(row for row in failed if row.group in ("plan", "files", "cost", "runtime"))
    if missed.group in ("plan", "files") and report.exactness == "exact":
        raise ExactnessBug(
            _said(missed),
            where=report.artifact,
            why="the plan says EXACT and the files are those of the export, or have no digests",
            fix="export again; if it fails again, report it with bake.json",
        )
    raise VerificationFailed(_said(missed), where=report.artifact, why=_WHY.get(missed.group))


_WHY = {
    "cost": "the stored weights lose more of the edit than the rounding of their type explains, or "
    "than is asked for ([verify] most_kl)",
    "runtime": "what is served is further from the hooked model than storage and runtime explain",
}


def _inconclusive(report: Report, failed: Sequence[Row]) -> Inconclusive:
    """Return what kept a question from being answered."""
    effects = [row for row in failed if row.group == "effect"]
    if effects:
        return Inconclusive(
            f"the edit has no effect: hooked and base differ by {effects[0].value:.1e}",
            where=report.artifact,
            why="equality proves nothing where nothing was changed",
            fix="look at the direction and the sites with `bake plan`, or name prompts on which "
            "the edit acts with --prompts",
        )
    open_ = [answer for answer in report.answers if answer.verdict == "inconclusive"]
    answer = open_[0] if open_ else report.answers[0]
    unknown = next((r.note for r in report.rows if r.group == "files" and r.passed is None), "")
    unknown = unknown if answer.key == "files" else ""
    return Inconclusive(
        f"nothing tells a sound bake from a broken one here: {answer.text} {answer.reason}",
        where=report.artifact,
        why=unknown or "a comparison that no broken bake could fail proves nothing",
        fix="name it with --gguf" if unknown else "name more prompts with --prompts",
    )


def _said(row: Row) -> str:
    return f"{row.name}: {row.value:.2e} is above {row.limit:.2e}" + (
        f" ({row.note})" if row.note else ""
    )
