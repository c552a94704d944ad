"""Write what a request plans: one carrier, or several in one run."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.jobs.request import Request
from bake.progress import Bars, no_bars

if TYPE_CHECKING:
    from bake.artifact import Artifact
    from bake.artifact.schema import ExportOptions, GgufFile, GgufTensor
    from bake.outputs.carry import Options

CONVERTER = "convert_hf_to_gguf.py"


def export_options(carrier: str, options: "Options", out: Path) -> "ExportOptions | None":
    """Return what a record keeps of an export's options: those that decide this carrier."""
    from bake.artifact.schema import ExportOptions

    if carrier not in ("gguf", "gguf-lora"):
        return None
    if options.gguf is not None:
        parts = gguf_parts(options.gguf)
        if carrier == "gguf-lora":
            return ExportOptions(gguf=parts)
        return ExportOptions(gguf=parts, edited_type=options.edited_type, rounding=options.rounds)
    if options.llama_cpp is None or carrier == "gguf-lora":
        return None
    script = options.llama_cpp / CONVERTER
    facts = {"outtype": options.outtype, "name": out.name}
    return ExportOptions.of(facts | {"converter": sha256(script)} if script.is_file() else facts)


def gguf_parts(path: Path) -> "tuple[GgufFile, ...]":
    """Return the names and digests of the files of a GGUF model."""
    from bake.artifact.schema import GgufFile
    from bake.checkpoints.gguf.file import open_gguf

    parts = [part.path for part in open_gguf(path).parts]
    return tuple(GgufFile(name=part.name, sha256=sha256(part)) for part in parts)


_KNOWN: dict[tuple[str, int, int], str] = {}


def sha256(path: Path) -> str:
    """Return the digest of a file, computed once for each state of it."""
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _KNOWN:
        with path.open("rb") as file:
            _KNOWN[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _KNOWN[key]


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """What an export wrote, in the order of the carriers that the recipe names."""

    request: Request
    artifacts: tuple["Artifact", ...]

    def rounded(self, written: "Artifact") -> "Sequence[GgufTensor]":
        """Return what rounding did to the tensors of a GGUF that was edited in place."""
        if written.kind != "gguf":
            return ()
        from bake.artifact.record import read_record

        gguf = read_record(written.path).gguf
        return [] if gguf is None else [t for t in gguf.tensors if t.error is not None]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values: one artifact by itself, several as a list."""
        found = [
            {**written.to_json(), "plan_digest": self.request.plan.digest}
            for written in self.artifacts
        ]
        return found[0] if len(found) == 1 else {"artifacts": found}


def export(
    request: Request, out: Path, options: "Options | None" = None, bars: Bars = no_bars
) -> Exported:
    """Write every carrier of a request: one to ``out``, several to folders of their names in it.

    Args:
        request: what ``compile_request`` or ``plan_edits`` returns.
        out: the folder to create.
        options: what the export is told beyond its plan.
        bars: where progress is shown.

    Raises:
        InexactPlan: a carrier does not hold the plan, or a wanted runtime refuses the result.
        BakeError: the base or the disk refuses; nothing is left behind.
    """
    from bake.outputs.carry import Options, write
    from bake.outputs.several import write_several

    options = options or Options(allow=frozenset(request.recipe.export.allow))
    # The plan needed headers only; the files are fetched once it is known to be exact.
    checkpoint, carriers = request.model.complete(), request.recipe.export.to
    if len(carriers) > 1:
        written = write_several(
            carriers,
            request.plan,
            checkpoint,
            out,
            record=lambda place: _record(request, place.name, options, place),
            options=options,
            bar=lambda name: bars(f"writing {name}"),
        )
        return Exported(request, tuple(written))
    with bars(f"writing {out.name}") as move:
        one = write(
            carriers[0],
            request.plan,
            checkpoint,
            out,
            record=_record(request, carriers[0], options, out),
            options=options,
            progress=move,
        )
    return Exported(request, (one,))


def would_be(request: Request, out: Path, options: "Options") -> dict[str, Any]:
    """Return what an export would write, once everything but writing has been tried.

    Raises:
        BakeError: what ``export`` would raise, save for what a weight or the disk decides.
    """
    from bake.outputs.carry import check

    carriers = request.recipe.export.to
    for carrier in carriers:
        check(carrier, request.plan, request.model.checkpoint, options)
    found: dict[str, Any] = {"dry_run": True, "out": str(out), "carriers": list(carriers)}
    if "checkpoint" in carriers:
        size = sum(info.nbytes for info in request.model.checkpoint.tensors.values())
        found["weight_bytes"] = size + request.plan.created_bytes
    return found


def _record(request: Request, carrier: str, options: "Options", out: Path) -> dict[str, Any]:
    """Return what the record keeps of the request, and of the options that decide this carrier."""
    from msgspec import structs

    stated = export_options(carrier, options, out)
    return structs.replace(request.provenance(out), export=stated).to_json()
