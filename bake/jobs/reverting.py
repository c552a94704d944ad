"""Take an artifact, here or on the Hub, back to its base."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bake.artifact import KINDS
from bake.errors import UsageError
from bake.jobs.recorded import Source, find
from bake.progress import Bars, no_bars

if TYPE_CHECKING:
    from bake.artifact.schema import Record
    from bake.revert.checkpoint import Reverted


@dataclass(frozen=True, slots=True)
class Reversal:
    """A revert that has been checked, and has written nothing.

    Attributes:
        base: where the base is.
        edited_bytes: how many bytes of tensors come from it.
        notes: what is worth knowing of how the artifact arrived.
    """

    base: str
    edited_bytes: int
    notes: tuple[str, ...]
    _write: "Callable[[Path, bool], Reverted]"

    def write(self, out: Path, *, force: bool = False) -> "Reverted":
        """Write the base to a new folder, in place of what is there with ``force``.

        Raises:
            BakeError: a file does not become the base's, or the disk refuses; nothing is left.
        """
        return self._write(out, force)


def prepare_reversal(
    artifact: str, *, base: str | None = None, revision: str | None = None, bars: Bars = no_bars
) -> Reversal:
    """Check that an artifact can be reverted: only headers and the edited tensors are read.

    Args:
        artifact: a folder, a download or ``hf://owner/name``.
        base: its base, for a GGUF the file; as recorded when None.
        revision: branch, tag or commit of a base on the Hub.
        bars: where progress is shown, of this and of what ``write`` does.

    Raises:
        UsageError: the base has to be named, or what is named has no revision.
        BakeError: it cannot be reverted, or the base is another one.
    """
    from bake.revert.record import read_revertible

    if revision is not None and base is None:
        raise UsageError("--revision is of --base, which is not named")
    source = find(artifact, weights=True)
    record = read_revertible(source.folder)
    if source.published and base is None and record.base.path is not None:
        # A stranger's folder means nothing here.
        raise source.without_base(record.base.model)
    if KINDS[record.kind].checkpoint:
        return _checkpoint(source, record, base, revision, bars)
    if revision is not None:
        raise UsageError("a GGUF file has no revision", fix="leave --revision out")
    return _gguf(source, record, base, bars)


def _checkpoint(
    source: Source, record: "Record", named: str | None, revision: str | None, bars: Bars
) -> Reversal:
    from bake.revert.base import open_base
    from bake.revert.checkpoint import base_hashes, prepare_revert, revert_checkpoint

    folder = source.folder.resolve()
    base = open_base(folder, record, named, revision)
    with bars("checking the base") as move:
        plan = prepare_revert(folder, record, base, move)

    def write(out: Path, force: bool) -> "Reverted":
        with bars("reading the base") as move:
            stated = base_hashes(plan, move)
        with bars(f"writing {out.name}") as move:
            return revert_checkpoint(plan, out, stated, force=force, progress=move)

    return Reversal(base.source, plan.edited_bytes, source.notes, write)


def _gguf(source: Source, record: "Record", named: str | None, bars: Bars) -> Reversal:
    from bake.revert.gguf import prepare_gguf_revert, revert_gguf

    if named is None:
        raise UsageError(
            "a GGUF is reverted to the file that it was made of, which its record does not locate",
            fix="name it with --base FILE.gguf",
        )
    plan = prepare_gguf_revert(source.folder.resolve(), record, Path(named))

    def write(out: Path, force: bool) -> "Reverted":
        with bars(f"writing {out.name}") as move:
            return revert_gguf(plan, out, force=force, progress=move)

    return Reversal(named, plan.edited_bytes, source.notes, write)
