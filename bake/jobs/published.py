"""What a published artifact says of itself beside what comes out here: plan, files, numbers."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.errors import BakeError, UsageError, VerificationFailed
from bake.jobs.recorded import Replanned, Source, replan
from bake.jobs.reproduce import Reproduced, needs, recorded_options, reproduce
from bake.progress import Bars, no_bars

if TYPE_CHECKING:
    from bake.verify.agreement import Agreement
    from bake.verify.report import Report

JSON, MARKDOWN = "reproduction.json", "reproduction.md"


@dataclass(frozen=True, slots=True, eq=False)
class Reproduction:
    """How far an artifact's record was reproduced.

    Attributes:
        source: the artifact.
        replanned: its plan, made again; None for a merge, which has none.
        rebaked: its files, written again; None where that was not asked for.
        agreement: its published verification beside the one made here; None where it has none.
        notes: what is worth knowing.
    """

    source: Source
    replanned: Replanned | None
    rebaked: Reproduced | None
    agreement: "Agreement | None"
    notes: tuple[str, ...]

    def compared_with(self, report: "Report") -> "Reproduction":
        """Return it with the published verification held against a report.

        Raises:
            InputError: the published verification is malformed.
        """
        from bake.artifact.record import read_json
        from bake.artifact.verification import VERIFICATION
        from bake.verify.agreement import agreement

        if not self.source.published:
            return self
        if not (self.source.folder / VERIFICATION).is_file():
            note = f"no {VERIFICATION} was published: there is nothing to compare the numbers with"
            return replace(self, notes=(*self.notes, note))
        found = agreement(read_json(self.source.folder, VERIFICATION), report)
        return replace(self, agreement=found, notes=(*self.notes, *found.notes))

    def failure(self) -> BakeError | None:
        """Return the first thing that was not reproduced, or None when all was."""
        for part in (self.replanned, self.rebaked):
            if part is not None and (found := part.failure()) is not None:
                return found
        if self.agreement is None or not self.agreement.problems:
            return None
        return VerificationFailed(
            f"the published verification of {self.source.name} is not what is measured here",
            why="\n".join(self.agreement.problems),
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "artifact": self.source.name,
            "plan": None if self.replanned is None else self.replanned.to_json(),
            "rebaked": None if self.rebaked is None else self.rebaked.to_json(),
            "verification": None if self.agreement is None else self.agreement.to_json(),
            "notes": list(self.notes),
        }

    def write(self, folder: Path) -> tuple[Path, ...]:
        """Write it beside the report, for programs and for readers, and return the files."""
        from bake.verify.agreement import markdown
        from bake.verify.files import without_paths

        content = without_paths(self.to_json())
        found = {JSON: json.dumps(content, indent=2, ensure_ascii=False) + "\n"}
        if self.agreement is not None:
            found[MARKDOWN] = markdown(self.agreement, self.source.name)
        for name, text in found.items():
            (folder / name).write_text(text, encoding="utf-8")
        return tuple(folder / name for name in found)


def reproduction_of(
    source: Source,
    *,
    base: str | None,
    family: Path | None,
    assume_harmless: Sequence[str],
    rebake_beside: Path | None = None,
    bars: Bars = no_bars,
) -> Reproduction:
    """Make the plan of an artifact again, and its files where that is asked for.

    Args:
        source: the artifact.
        base: where its base is; as recorded when None.
        family: the user's own table; that of the record when None.
        assume_harmless: as ``replan`` takes it.
        rebake_beside: write the files again, to a temporary folder beside this one; None leaves
            that out.
        bars: where progress is shown.

    Raises:
        UsageError: the files cannot be written again without what `bake export` asks for.
        BakeError: whatever is wrong with the artifact or its base.
    """
    from bake.verify.artifact import open_baked

    if open_baked(source.folder).merged:
        if rebake_beside is not None:
            raise UsageError("a merge is made again with `bake merge`", fix="leave --rebake out")
        return Reproduction(source, None, None, None, source.notes)
    replanned = replan(source, base=base, family=family, assume_harmless=assume_harmless)
    rebaked = None
    if rebake_beside is not None and replanned.same:
        rebaked = _rebake(replanned, rebake_beside, bars)
    return Reproduction(source, replanned, rebaked, None, replanned.notes)


def _rebake(replanned: Replanned, beside: Path, bars: Bars) -> Reproduced:
    if (option := needs(replanned)) is not None:
        raise UsageError(
            f"--rebake cannot make this {replanned.artifact.kind} again without --{option}",
            fix=f"use `bake export {replanned.source.name} --{option} … --out DIR`",
        )
    place = next(p for p in beside.absolute().parents if p.is_dir())
    with tempfile.TemporaryDirectory(prefix=".bake-", dir=place) as folder:
        out = Path(folder) / replanned.source.folder.name
        options = recorded_options(replanned, out=out, gguf=None, llama_cpp=None, force=False)
        return reproduce(replanned, options, out, bars)
