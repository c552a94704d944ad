"""What a failed report means, as the error that the command ends with."""

from bake.errors import ExactnessBug, VerificationFailed
from bake.verify.report import Report, Row

_REASONS = {
    "control": "a broken bake passes the comparison, so it cannot tell a sound one: the edit's "
    "effect on these prompts is too small for this dtype",
    "floor": "a reference that does not round was not evaluated in the dtype that it names",
}
# Where a number has to be larger than its limit.
_ABOVE = ("effect", "control", "floor")


def raise_unless_passed(report: Report) -> None:
    """Raise what a failed report means.

    Raises:
        VerificationFailed: the edit has no effect, a file was changed, a control passed, a runtime
            failed, or a limit of a plan that is not exact was missed.
        ExactnessBug: a plan that says EXACT measures otherwise.
    """
    if report.passed:
        return
    failed = [row for row in report.rows if row.passed is False]
    by_group = {row.group: row for row in reversed(failed)}
    if not failed:
        raise VerificationFailed("nothing was demanded of this artifact", where=report.artifact)
    if "effect" in by_group:
        raise VerificationFailed(
            f"the edit has no effect: hooked and base differ by {by_group['effect'].value:.1e}",
            where=report.artifact,
            why="equality proves nothing where nothing was changed",
            fix="look at the direction and the sites with `bake plan`",
        )
    if "files" in by_group:
        raise VerificationFailed(
            f"the artifact was changed after the export ({by_group['files'].note})",
            where=report.artifact,
            why="its files have other digests than bake.json says",
            fix="export again",
        )
    missed = by_group.get("exact") or failed[0]
    if missed.group == "exact" and report.exactness == "exact":
        raise ExactnessBug(
            _said(missed),
            where=report.artifact,
            why="the plan says EXACT, so the files were changed after the export, or bake is wrong",
            fix="export again; if it fails again, report it with bake.json",
        )
    raise VerificationFailed(_said(missed), where=report.artifact, why=_REASONS.get(missed.group))


def _said(row: Row) -> str:
    side = "not above" if row.group in _ABOVE else "above"
    return f"{row.name}: {row.value:.2e} is {side} {row.limit:.2e}"
