"""What a published artifact says of itself beside what comes out here: plan, files, numbers."""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.cli.output import Output
from bake.cli.recorded import Again, Source, plan_again
from bake.cli.reproduce import Reproduced, needs, recorded_options, reproduce
from bake.errors import BakeError, UsageError, VerificationFailed

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bake.verify.agreement import Agreement
    from bake.verify.report import Report

JSON, MARKDOWN = "reproduction.json", "reproduction.md"


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """How far an artifact's record was reproduced.

    Attributes:
        source: the artifact.
        again: its plan, made again; None for a merge, which has none.
        rebaked: its files, written again; None where that was not asked for.
        agreement: its published verification beside the one made here; None where it has none.
        notes: what is worth knowing.
    """

    source: Source
    again: Again | None
    rebaked: Reproduced | None
    agreement: "Agreement | None"
    notes: tuple[str, ...]

    def beside(self, report: "Report") -> "Record":
        """Return the record with the published verification held against a report.

        Raises:
            InputError: the published verification is malformed.
        """
        from bake.artifact.record import VERIFICATION, read_json
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
        for part in (self.again, self.rebaked):
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
            "plan": None if self.again is None else self.again.to_json(),
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

    def view(self) -> list["RenderableType"]:
        """Return it for a reader: the published numbers beside those that were measured here."""
        from bake.cli import render
        from bake.verify.agreement import outcome, shown

        rows = [("artifact", self.source.name)]
        if self.again is not None:
            rows.append(("plan", self.again.told))
        if self.rebaked is not None:
            rows.append(("exported again", self.rebaked.told))
        parts: list[RenderableType] = []
        if self.agreement is not None:
            rows.append(("verification", outcome(self.agreement)))
            made = render.table(
                "comparison", "published", "measured here", "", right=("published", "measured here")
            )
            for pair in self.agreement.pairs:
                made.add_row(pair.name, shown(pair.published), shown(pair.here), pair.problem or "")
            parts.append(render.section("Published, and measured here", made))
        parts.append(render.section("Made again", render.facts(rows)))
        if self.notes:
            parts.append(render.section("Notes", render.indented(self.notes)))
        return parts


def record_again(
    source: Source, *, base: str | None, family: Path | None, beside: Path | None, output: Output
) -> Record:
    """Make the plan of an artifact again, and its files where that is asked for.

    Args:
        source: the artifact.
        base: where its base is; as recorded when None.
        family: the user's own table; that of the record when None.
        beside: write the files again, to a temporary folder beside this one; None leaves that out.
        output: where progress is shown.

    Raises:
        UsageError: the files cannot be written again without what `bake export` asks for.
        BakeError: whatever is wrong with the artifact or its base.
    """
    from bake.verify.artifact import MERGE, open_baked

    if open_baked(source.folder).kind == MERGE:
        if beside is not None:
            raise UsageError("a merge is made again with `bake merge`", fix="leave --rebake out")
        return Record(source, None, None, None, source.notes)
    again = plan_again(source, base=base, family=family)
    rebaked = None
    if beside is not None and again.same:
        rebaked = _rebake(again, beside, output)
    return Record(source, again, rebaked, None, again.notes)


def _rebake(again: Again, beside: Path, output: Output) -> Reproduced:
    if (option := needs(again)) is not None:
        raise UsageError(
            f"--rebake cannot make this {again.artifact.kind} again without --{option}",
            fix=f"use `bake export {again.source.name} --{option} … --out DIR`",
        )
    place = next(p for p in beside.absolute().parents if p.is_dir())
    with tempfile.TemporaryDirectory(prefix=".bake-", dir=place) as folder:
        out = Path(folder) / again.source.folder.name
        options = recorded_options(again, out=out, gguf=None, llama_cpp=None, force=False)
        return reproduce(again, out, options, output)
