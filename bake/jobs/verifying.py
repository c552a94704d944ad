"""Verify an artifact, here or on the Hub, and write what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.errors import BakeError, UsageError
from bake.jobs.planned import planned_of
from bake.jobs.published import Reproduction, reproduction_of
from bake.jobs.recorded import Source, base_of
from bake.progress import Bars, no_bars

if TYPE_CHECKING:
    from bake.verify.report import Report
    from bake.verify.verification import Verification


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """Where a report goes, and in which forms.

    Attributes:
        folder: for verify.json, verify.md and plots/; the artifact's own when None, and
            ``verify-NAME`` here for a published one.
        html: whether it is written as one page as well.
        plots: whether to draw; where matplotlib is installed when None.
        rebake: whether the artifact is exported again, to a temporary folder, and compared.

    Raises:
        UsageError: a page without its plots is asked for.
    """

    folder: Path | None = None
    html: bool = False
    plots: bool | None = None
    rebake: bool = False

    def __post_init__(self) -> None:
        if self.html and self.plots is False:
            raise UsageError("--html and --no-plots exclude each other")

    def place(self, source: Source) -> Path:
        """Return the folder that the report of an artifact goes to."""
        own = Path(f"verify-{source.short}") if source.published else source.folder
        return self.folder or own


@dataclass(frozen=True, slots=True, eq=False)
class Verified:
    """What a verification came to.

    Attributes:
        report: what was measured.
        reproduction: what the record gives again; None where that was not asked for.
        written: the files of the report.
    """

    report: "Report"
    reproduction: Reproduction | None
    written: tuple[Path, ...]

    def failure(self) -> BakeError | None:
        """Return what it means that a limit was missed or something not reproduced, or None."""
        from bake.verify.gate import gate_failure
        from bake.verify.judgement import raise_unless_passed

        try:
            raise_unless_passed(self.report)
        except BakeError as error:
            return error
        ungated = gate_failure(self.report.gate, self.report.artifact)
        if ungated is not None:
            return ungated
        return None if self.reproduction is None else self.reproduction.failure()

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        again = self.reproduction
        extra = {} if again is None else {"reproduction": again.to_json()}
        return {**self.report.to_json(), **extra}


def verify_artifact(
    artifact: str | Path, *, base: str | None = None, runtimes: Sequence[str] = ()
) -> Verified:
    """Measure an artifact against hooks on its base, and write the report into its folder.

    Args:
        artifact: what ``export`` wrote, or its id on the Hub.
        base: where its base is, where it has moved since.
        runtimes: which serve it as well, by the names that ``bake verify --runtime`` takes.

    Raises:
        BakeError: whatever is wrong with the artifact or its base. That it does not pass raises
            nothing: see ``Verified.failure``.
    """
    from bake.jobs.recorded import find
    from bake.verify.runtimes.registry import Runtimes
    from bake.verify.verification import Verification

    source = find(str(artifact), weights=True)
    named = Runtimes(tuple(runtimes)) if runtimes else None
    return verify(source, Verification(source.folder, base=base, runtimes=named), ReportFiles())


def verify(
    source: Source, asked: "Verification", files: ReportFiles, bars: Bars = no_bars
) -> Verified:
    """Measure an artifact and write the report.

    A published one is held against its record and its own report as well.

    Args:
        source: the artifact, with its weights.
        asked: what is measured and how; its base is as recorded where it names none.
        files: what is written.
        bars: where progress is shown.

    Raises:
        BakeError: whatever is wrong with the artifact or its base, or with what is asked of it.
    """
    from bake.verify.artifact import open_baked
    from bake.verify.compare import compare
    from bake.verify.files import check_place, write_report
    from bake.verify.runtimes.registry import RUNTIMES, Runtimes

    folder = files.place(source)
    check_place(folder, plots=files.plots, html=files.html)
    artifact = open_baked(source.folder)
    if asked.runtimes is None and artifact.kind in RUNTIMES["peft"].serves:
        # The one runtime of an adapter that is here wherever bake is.
        asked = replace(asked, runtimes=Runtimes(("peft",)))
    if source.published:
        asked = replace(asked, base=base_of(source, artifact, asked.base))
    reproduction = None
    if source.published or files.rebake:
        reproduction = reproduction_of(
            source,
            base=asked.base,
            family=asked.family,
            assume_harmless=asked.assume_harmless,
            rebake_beside=folder if files.rebake else None,
            bars=bars,
        )
    report = compare(asked, planned_of(source, asked))
    if source.published:  # an artifact in the cache is called by its commit there
        report = replace(report, artifact=source.name)
    written = write_report(report, folder, plots=files.plots, html=files.html)
    if reproduction is not None:
        reproduction = reproduction.compared_with(report)
        written = (*written, *reproduction.write(folder))
    return Verified(report, reproduction, written)
