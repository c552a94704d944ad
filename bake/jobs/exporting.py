"""Write what a request plans: one carrier, or several in one run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.artifact import KINDS
from bake.jobs.request import Request
from bake.progress import Bars, no_bars

if TYPE_CHECKING:
    from bake.artifact import Artifact
    from bake.artifact.schema import CodedTensor, ExportOptions
    from bake.outputs.export import Export


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """What an export wrote, in the order of the carriers that the recipe names."""

    request: Request
    artifacts: tuple["Artifact", ...]

    def rounded(self, written: "Artifact") -> "Sequence[CodedTensor]":
        """Return what rounding did to tensors of codes that were edited in place."""
        from bake.artifact.record import read_record

        record = read_record(written.path)
        tensors = record.codes if record.gguf is None else record.gguf.tensors
        return [tensor for tensor in tensors if tensor.error is not None]

    def options(self, written: "Artifact") -> "ExportOptions":
        """Return what a carrier's record says of the options that decide its bytes."""
        from bake.artifact.record import read_record
        from bake.artifact.schema import ExportOptions

        return read_record(written.path).export or ExportOptions()

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values: one artifact by itself, several as a list."""
        found = [
            {**written.to_json(), "plan_digest": self.request.plan.digest}
            for written in self.artifacts
        ]
        return found[0] if len(found) == 1 else {"artifacts": found}


def export(
    request: Request, out: str | Path, what: "Export | None" = None, bars: Bars = no_bars
) -> Exported:
    """Write every carrier of a request: one to ``out``, several to folders of their names in it.

    Args:
        request: what ``compile_request`` or ``plan_edits`` returns.
        out: the folder to create.
        what: as ``Request.export`` returns it; without options where it is None.
        bars: where progress is shown.

    Raises:
        InexactPlan: a carrier does not hold the plan, or a wanted runtime refuses the result.
        BakeError: the base or the disk refuses; nothing is left behind.
    """
    from bake.outputs.write import export

    out = Path(out)
    request.refuse_unfit()
    # The plan needed headers only; the files are fetched once it is known to be exact, and what the
    # base's card states, which comes with them, is recorded after that.
    checkpoint = request.model.complete()
    whole = replace(what or request.export(out), checkpoint=checkpoint, bars=bars)
    whole = replace(whole, record=request.provenance(out))
    return Exported(request, export(whole, request.recipe.export.to, out))


def would_be(request: Request, what: "Export", out: Path) -> dict[str, Any]:
    """Return what an export would write, once everything but writing has been tried.

    Raises:
        BakeError: what ``export`` would raise, save for what a weight or the disk decides.
    """
    from bake.outputs.registry import prepare

    request.refuse_unfit()
    carriers = request.recipe.export.to
    for carrier in carriers:
        prepare(what, carrier)
    found: dict[str, Any] = {"dry_run": True, "out": str(out), "carriers": list(carriers)}
    if any(KINDS[carrier].checkpoint for carrier in carriers):
        base = request.model.checkpoint
        written = base if what.dequantize else base.as_stored
        size = sum(info.nbytes for info in written.tensors.values())
        found["weight_bytes"] = size + request.plan.created_bytes
    return found
