"""The temporary folder beside an output: locked, resumable, and renamed into place at the end.

    .NAME.bake-partial/journal    what the run makes, and the files that are finished
    .NAME.bake-partial/files/     becomes NAME by one rename
    .NAME.bake-old/               the folder that --force replaces, for the moment of that rename

A run that is killed leaves the first two, and the next run of the same plan takes up the finished
files once their hashes have been checked. A run that fails leaves nothing.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType

from bake.checkpoints.config import CONFIG
from bake.errors import UsageError

_JOURNAL_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Finished:
    """A file that is complete in the staging folder."""

    bytes: int
    sha256: str


class Staging:
    """A folder that becomes ``out`` by ``publish``, or disappears when the block fails.

    ``KeyboardInterrupt`` and a kill keep it once a first file is finished; every other exception
    removes it.
    """

    def __init__(self, out: Path, identity: str, *, force: bool) -> None:
        """Remember what to make; nothing is touched before the block is entered.

        Args:
            out: the output folder, its path resolved.
            identity: a digest of all that decides the output's bytes.
            force: replace an existing checkpoint at ``out``.
        """
        self._out = out
        self._identity = identity
        self._force = force
        self._root = out.with_name(f".{out.name}.bake-partial")
        self._aside = out.with_name(f".{out.name}.bake-old")
        self._finished: dict[str, Finished] = {}
        self._new_parents: list[Path] = []
        self._journal: FileIO | None = None
        self.folder = self._root / "files"

    @property
    def finished(self) -> Mapping[str, Finished]:
        """The files that an earlier run or this one has finished, by name."""
        return self._finished

    def __enter__(self) -> "Staging":
        """Create or take up the folder.

        Raises:
            UsageError: something that may not be replaced is in the way, or another run is at it.
        """
        self._check_free()
        parent = self._out.parent
        self._new_parents = [p for p in (parent, *parent.parents) if not p.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        if self._root.is_symlink() or (self._root.exists() and not self._is_ours()):
            raise UsageError(
                f"{self._root} is in the way and is not bake's", fix="remove it, then run again"
            )
        self._root.mkdir(exist_ok=True)
        self._journal = (self._root / "journal").open("a+b", buffering=0)
        try:
            lock(self._journal, self._out)
            self._recover()
            self._check_free()  # again, for what has just come back
            self._take_up()
        except UsageError:
            self._journal.close()
            raise
        return self

    def _recover(self) -> None:
        """Undo or finish what a run that was killed amid its last rename began."""
        if not self._aside.exists():
            return
        if self._out.exists():
            shutil.rmtree(self._aside)
        else:
            self._aside.rename(self._out)

    def _check_free(self) -> None:
        out = self._out
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} exists and is no folder", fix="name another output")
        if not out.exists() or not any(out.iterdir()):
            return
        if not self._force:
            raise UsageError(
                f"{out} exists and is not empty", fix="name another output, or use --force"
            )
        if not (out / CONFIG).is_file():
            raise UsageError(
                f"{out} is no checkpoint, so it is not replaced",
                why=f"it holds no {CONFIG}, and --force removes the whole folder",
                fix="remove it yourself if nothing in it is needed, or name another output",
            )

    def _is_ours(self) -> bool:
        return self._root.is_dir() and (
            (self._root / "journal").is_file() or not any(self._root.iterdir())
        )

    def _take_up(self) -> None:
        """Keep the finished files of the same plan, remove all else, and begin the journal anew."""
        assert self._journal is not None
        self._journal.seek(0)
        recorded = _read_journal(self._journal.readall(), self._identity)
        self.folder.mkdir(exist_ok=True)
        for entry in self.folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name not in recorded:
                entry.unlink()
        self._journal.truncate(0)
        self._append({"format": _JOURNAL_FORMAT, "identity": self._identity})
        for name, finished in recorded.items():
            if (self.folder / name).is_file():
                self.record(name, finished)

    def record(self, name: str, finished: Finished) -> None:
        """Note that a file is complete, so that a later run need not write it again."""
        self._append({"file": name, **asdict(finished)})
        self._finished[name] = finished

    def _append(self, entry: Mapping[str, object]) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(entry).encode() + b"\n")
        os.fsync(self._journal.fileno())

    def publish(self) -> None:
        """Rename the folder to its final name; from here on the output is complete."""
        for folder, _, _ in os.walk(self.folder):
            _sync(Path(folder))
        replaced = self._out.exists() and any(self._out.iterdir())
        if replaced:
            self._out.rename(self._aside)
        done = False
        try:
            self.folder.rename(self._out)
            done = True
        finally:
            if replaced and not done:
                self._aside.rename(self._out)
        _sync(self._out.parent)
        if replaced:
            shutil.rmtree(self._aside)
        shutil.rmtree(self._root)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the folder after a failure; keep it after an interruption that left a result."""
        failed = kind is not None and issubclass(kind, Exception)
        if self._root.exists() and (failed or not self._finished):
            shutil.rmtree(self._root)
            for parent in self._new_parents:
                if not any(parent.iterdir()):
                    parent.rmdir()
        assert self._journal is not None
        self._journal.close()


def _read_journal(raw: bytes, identity: str) -> dict[str, Finished]:
    """Return the finished files that a journal names, or none if it is about another plan.

    A kill can tear the last line; what stands before it counts.
    """
    entries: list[dict[str, object]] = []
    for line in raw.split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    if not entries or entries[0] != {"format": _JOURNAL_FORMAT, "identity": identity}:
        return {}
    found = {}
    for entry in entries[1:]:
        match entry:
            case {"file": str(name), "bytes": int(size), "sha256": str(digest)}:
                found[name] = Finished(size, digest)
    return found


def lock(file: FileIO, out: Path) -> None:
    """Hold a file of the output's staging folder, until it is closed, against other runs.

    Raises:
        UsageError: another run holds it.
    """
    if sys.platform == "win32":
        return
    import fcntl  # POSIX only

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"another run of bake is writing {out}", fix="wait for it, or name another output"
        ) from error


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
