"""Write an artifact again from its record, and compare the files with those that the record lists.

What the record does not hold is asked for again and checked by its digest: the base, and the GGUF
that an edited GGUF was made from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.artifact import KINDS
from bake.errors import InputError, UsageError, VerificationFailed
from bake.jobs.recorded import Replanned
from bake.progress import Bars, no_bars

if TYPE_CHECKING:
    from bake.artifact import Artifact
    from bake.artifact.schema import ExportOptions, GgufFile, Record
    from bake.outputs.export import Export


def recorded_options(
    replanned: Replanned, *, out: Path, gguf: Path | None, llama_cpp: Path | None, force: bool
) -> "Export":
    """Return the recorded export, with the files that it needs given again.

    Raises:
        UsageError: a file is missing from the command line, or is none that this kind is made from.
        InputError: a GGUF is not the one that the artifact was made from, or the record is
            malformed.
    """
    from bake.artifact.schema import ExportOptions
    from bake.checkpoints.gguf.storage import KEEP

    record, kind = replanned.artifact.record, replanned.artifact.kind
    stated = record.export or ExportOptions()
    needed = needs(replanned)
    for name, given, what in (
        ("gguf", gguf, "the base's GGUF"),
        ("llama-cpp", llama_cpp, "the llama.cpp checkout"),
    ):
        if given is None and needed == name:
            raise UsageError(
                f"this {kind} was made with {what}, which the artifact does not hold",
                fix=f"name it with --{name}",
            )
        if given is not None and needed != name:
            raise UsageError(f"this {kind} was not made with --{name}", fix="leave it out")
    if gguf is not None:
        _check_parts(gguf, stated.gguf, replanned)
    if llama_cpp is not None:
        _check_converter(stated, out, llama_cpp)
    return replanned.request.export(
        out,
        force=force,
        gguf=gguf,
        llama_cpp=llama_cpp,
        gguf_type=stated.gguf_type or stated.edited_type or KEEP,
        storage=stated.storage,
        outtype=stated.outtype or (record.gguf and record.gguf.outtype) or "f16",
        rounding=stated.rounding,
        dequantize=stated.dequantize,
    )


def needs(replanned: Replanned) -> str | None:
    """Return which option names what the artifact was made with beside its base, or None."""
    if from_gguf(replanned):
        return "gguf"
    return "llama-cpp" if _is_gguf(replanned) else None


def from_gguf(replanned: Replanned) -> bool:
    """Return whether an artifact was made from, or for, a GGUF of its base."""
    record = replanned.artifact.record
    if _is_gguf(replanned):
        return record.gguf is None or not record.gguf.converter
    return record.export is not None and bool(record.export.gguf)


def _is_gguf(replanned: Replanned) -> bool:
    carrier = KINDS[replanned.artifact.record.kind]
    return carrier.whole and not carrier.checkpoint


def _check_parts(gguf: Path, recorded: "Sequence[GgufFile]", replanned: Replanned) -> None:
    if not recorded:  # an earlier bake, which kept no digest: the result's digests decide
        return
    from bake.outputs.export import gguf_parts

    found = gguf_parts(gguf)
    if found != recorded:
        raise InputError(
            f"{gguf} is not the GGUF that {replanned.source.name} was made from",
            why=f"it is {_parts(found)}, recorded is {_parts(recorded)}",
            fix="name that file, under its own name",
        )


def _parts(parts: "Sequence[GgufFile]") -> str:
    return ", ".join(f"{part.name!r} {part.sha256[:12]!r}" for part in parts)


def _check_converter(stated: "ExportOptions", out: Path, llama_cpp: Path) -> None:
    name, digest = stated.name, stated.converter
    if name is not None and out.name != name:
        raise UsageError(
            f"the output is called {out.name!r}, and that of the record {name!r}",
            why="llama.cpp's converter takes the model's name from the folder's",
            fix="name an output that ends in it",
        )
    from bake.outputs.export import CONVERTER, sha256

    script = llama_cpp / CONVERTER
    if digest is not None and script.is_file() and sha256(script) != digest:
        raise InputError(
            f"{script} is another converter than the recorded one",
            why=f"its sha256 is {sha256(script)}, recorded is {digest}",
            fix="name the llama.cpp that the artifact was made with",
        )


@dataclass(frozen=True, slots=True)
class Reproduced:
    """An artifact that was written again.

    Attributes:
        written: the artifact that was made here.
        recorded: the digests of the artifact's files by name, its record included.
        versions: the version of bake that the record names, and this one.
        record_differs_at: where the new record differs from the artifact's.
        other_base: the edited tensors of the base that are not those that the record names.
    """

    written: "Artifact"
    recorded: Mapping[str, str]
    versions: tuple[str, str]
    record_differs_at: tuple[str, ...]
    other_base: tuple[str, ...] = ()

    @property
    def differing(self) -> tuple[str, ...]:
        """The names of the files that are not identical, or on one side only."""
        names = {**self.recorded, **self.written.files}
        return tuple(n for n in names if self.recorded.get(n) != self.written.files.get(n))

    @property
    def count(self) -> int:
        """How many files there are on either side."""
        return len({**self.recorded, **self.written.files})

    @property
    def summary(self) -> str:
        """How many of them are identical."""
        return f"{self.count - len(self.differing)} of {self.count} files identical"

    def failure(self) -> VerificationFailed | None:
        """Return what it means that files differ, or None when none does."""
        from bake.artifact.record import RECORD

        if not self.differing:
            return None
        theirs, ours = self.versions
        why = "the base's weights, the edits or the arithmetic are others"
        if self.other_base:
            first, *more = self.other_base
            why = f"the base's weights are others than the recorded: {first}"
            why += f" and {len(more)} more edited tensors" if more else ""
        if self.differing == (RECORD,):
            where = ", ".join(self.record_differs_at) or "its layout"
            why = f"what the record says differs at {where}"
            if self.record_differs_at == ("plan.digest",):
                why += ", which is over every bit of the plan: this processor or torch rounds "
                why += "in another way, and every other file is the same all the same"
        if theirs != ours:
            why += f"; it was made by bake {theirs}, and this is bake {ours}"
        return VerificationFailed(
            f"{self.summary}, and these are not: {', '.join(self.differing)}",
            where=str(self.written.path),
            why=why,
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "identical": self.count - len(self.differing),
            "of": self.count,
            "record_differs_at": list(self.record_differs_at),
            "differing": [
                {"file": n, "recorded": self.recorded.get(n), "here": self.written.files.get(n)}
                for n in self.differing
            ],
        }


def reproduce(replanned: Replanned, what: "Export", out: Path, bars: Bars = no_bars) -> Reproduced:
    """Write the artifact again to a new folder, and compare its files with the recorded ones.

    Raises:
        VerificationFailed: the plan is not the recorded one; nothing is written.
        BakeError: the base or the disk refuses.
    """
    from bake import __version__
    from bake.artifact.record import RECORD, has_text, read_record
    from bake.jobs.exporting import export

    request = replanned.request
    recorded = recorded_files(replanned)
    for failure in (replanned.failure(), request.refusal(what)):
        if failure is not None:
            raise failure
    written = export(request, out, what, bars).artifacts[0]
    theirs, ours = replanned.artifact.record, read_record(written.path)
    text = (replanned.source.folder / RECORD).read_text(encoding="utf-8")
    if theirs == ours and has_text(theirs, text):  # the number of its form is no difference
        recorded[RECORD] = written.files[RECORD]
    versions = (str(theirs.bake), __version__)
    return Reproduced(
        written,
        recorded,
        versions,
        _where(theirs.to_json(), ours.to_json()),
        _other_base(theirs, ours),
    )


def _other_base(theirs: "Record", ours: "Record") -> tuple[str, ...]:
    """Return the tensors of the base that both records have hashes of, and not the same."""
    before, here = theirs.base_tensors, ours.base_tensors
    return tuple(name for name in before if name in here and here[name] != before[name])


def _where(theirs: Mapping[str, Any], ours: Mapping[str, Any], stem: str = "") -> tuple[str, ...]:
    """Return the keys at which two records differ; those of the plan one by one."""
    found: list[str] = []
    for key in dict.fromkeys((*theirs, *ours)):
        if theirs.get(key) == ours.get(key):
            continue
        if key == "plan" and not stem:
            found += _where(theirs[key], ours[key], "plan.")
        else:
            found.append(stem + key)
    return tuple(found)


def recorded_files(replanned: Replanned) -> dict[str, str]:
    """Return the digests that the artifact lists, and that of the list itself.

    Raises:
        InputError: it lists none.
    """
    from bake.artifact.record import RECORD

    record = replanned.artifact.record
    if not record.files:
        raise InputError(
            "lists no files, so that nothing can be compared",
            where=f"{replanned.source.name}: {RECORD}",
        )
    from bake.outputs.export import sha256

    found = {name: digest.removeprefix("sha256:") for name, digest in record.files.items()}
    return {**found, RECORD: sha256(replanned.source.folder / RECORD)}
