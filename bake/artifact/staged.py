"""The one folder that appears at once: an export of one carrier or of several, a merge, a revert.

    .NAME.bake-partial/journal    what the run makes and what of it is finished; also the lock
    .NAME.bake-partial/files/     becomes NAME by one rename
    .NAME.bake-partial/old/       what --force replaces, for the moment of that rename
    .NAME.bake-partial/scratch/   what a writer needs for a moment only

A run that fails leaves nothing. One that is killed or interrupted leaves the folder above, and the
next run of the same request takes up what is finished, once its hashes have been checked; another
request at the same place removes it. A kill after the last rename leaves an output that is complete
and a journal that says so: the same request then finds it done.

Nothing that is in the way is ever removed but an artifact of bake, with ``force``. rename(2) of a
folder replaces nothing but an empty folder, so a folder that appears during the run is safe too.
The reserved name may have been put there by somebody else: it is opened without following a link,
has to belong to this user, and has to hold what bake put there and nothing more.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from io import FileIO
from pathlib import Path

from bake import __version__
from bake.artifact.artifact import Artifact
from bake.artifact.carrier import CARRIERS
from bake.artifact.record import RECORD
from bake.checkpoints.hashes import sha256_of
from bake.checkpoints.source import Stamps
from bake.checkpoints.writer import Finished
from bake.errors import InputError, UsageError

_JOURNAL, _FILES, _OLD, _SCRATCH = "journal", "files", "old", "scratch"
_FORMAT = 2
_BEGINS = b'{"format": '
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def partial_of(out: Path) -> Path:
    """Return the folder that holds an output until it is complete."""
    place = out.resolve()
    return place.parent / f".{place.name}.bake-partial"


def runs_of(out: Path) -> Path:
    """Return the folder that holds a verification's finished runs until it is complete.

    It is beside what is verified, so that an interruption leaves nothing in there.
    """
    place = out.resolve()
    return place.parent / f".{place.name}.bake-verify-partial"


def check_free(out: Path, *, force: bool) -> None:
    """Refuse an output that is in the way.

    Args:
        out: the output folder.
        force: whether an artifact of bake may be there, or a folder of nothing but artifacts.

    Raises:
        UsageError: it is a link or a file, or it holds something that may not be replaced.
    """
    if out.is_symlink():
        raise UsageError(f"{out} is a link", fix="name the folder that it leads to")
    if _is_empty(out):
        return
    if not force:
        raise UsageError(
            f"{out} exists and is not empty", fix="name another output, or use --force"
        )
    _check_ours(out, out)


def check_before(out: Path, *, force: bool) -> None:
    """Refuse an output that is in the way, before anything is read or downloaded.

    Where an earlier run has left something beside it, what that was decides later. So does what
    ``force`` may not remove: a folder that is read is named as such then.

    Raises:
        UsageError: as ``check_free``.
    """
    if not force and not os.path.lexists(partial_of(out)):
        check_free(out, force=False)


def check_apart(out: Path, source: Path, **others: Path) -> None:
    """Require that an output is apart from what it is made of, which ``force`` could remove.

    Args:
        out: the output folder.
        source: a folder that is read: neither may hold the other.
        others: further files and folders that are read, by what they are, which the output may not
            hold.

    Raises:
        UsageError: they overlap.
    """
    place, folder = out.resolve(), source.resolve()
    if place == folder or folder in place.parents or place in folder.parents:
        raise UsageError(
            f"the output {place} and the base {folder} overlap",
            why="what is read is never changed",
            fix="name an output outside of it",
        )
    for what, other in others.items():
        if place in (other.resolve(), *other.resolve().parents):
            raise UsageError(
                f"the output {out} holds the {what} {other}", fix="name another output"
            )


@dataclass(frozen=True, slots=True)
class Identity:
    """What an output is made of.

    Attributes:
        digest: of all that decides the output's bytes; a run is taken up by one that has the same.
        read: the files that are read, which must be as they were when the output appears.
    """

    digest: str
    read: Stamps = field(default_factory=Stamps)


def identity_of(facts: Iterable[object], read: Stamps) -> Identity:
    """Return what decides an output's bytes.

    Args:
        facts: JSON values.
        read: the files that are read; they count by length and times, since hashing would take as
            long as writing.
    """
    text = json.dumps([__version__, *facts, list(read.found.values())], sort_keys=True)
    return Identity(hashlib.sha256(text.encode()).hexdigest(), read)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its name there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def write_staged(
    out: Path, identity: Identity, *, force: bool, write: Callable[["Place"], Artifact]
) -> Artifact:
    """Write one artifact to ``out``, which appears when all of it is on disk.

    Args:
        out: a folder that does not exist, unless ``force``.
        identity: as ``identity_of`` returns it.
        force: replace an artifact of bake at ``out``.
        write: writes its files to the place that it is given, and says what they are.

    Raises:
        UsageError: something is in the way, or another run is writing there.
        InputError: the disk refuses.
    """
    with staged(out, identity, force=force) as stage:
        if "" not in stage.artifacts:
            stage.finish("", write(stage.place()))
        stage.publish()
        return replace(stage.artifacts[""], path=out)


@contextmanager
def staged(out: Path, identity: Identity, *, force: bool) -> Iterator["Stage"]:
    """Yield a folder that becomes ``out`` by ``publish``, and goes when the block fails.

    Args:
        out: a folder that does not exist, unless ``force``.
        identity: as ``identity_of`` returns it.
        force: replace an artifact of bake at ``out``.

    Raises:
        UsageError: something is in the way, or another run is writing there.
        InputError: the disk refuses.
    """
    stage = Stage(out, identity, force=force)
    try:
        stage.begin()
        yield stage
    except OSError as error:
        stage.give_up()
        raise _refused(error, out) from error
    except Exception:
        stage.give_up()
        raise
    except BaseException:  # an interruption: what is finished is kept
        if not (stage.finished or stage.artifacts):
            stage.give_up()
        raise
    finally:
        stage.close()


class Stage:
    """The folder that an output is written to, before it appears.

    Attributes:
        out: the output folder, as it was named.
        folder: where to write.
        finished: the large files that are complete, by their name in the folder.
        artifacts: what is complete, by the name of its folder here; ``""`` is the folder itself.
    """

    def __init__(self, out: Path, identity: Identity, *, force: bool) -> None:
        """Remember what to make; nothing is touched before ``begin``."""
        self.out, self._identity, self._force = out, identity, force
        self._target, self._root = out.resolve(), partial_of(out)
        self.folder = self._root / _FILES
        self.finished: dict[str, Finished] = {}
        self.artifacts: dict[str, Artifact] = {}
        self._journal: FileIO | None = None
        self._new_parents: list[Path] = []
        self._untouched = False  # whether what an earlier run finished is still as it was
        self._published = False

    def begin(self) -> None:
        """Create the folder, or take it up.

        Raises:
            UsageError: something is in the way, or another run is writing there.
        """
        if not os.path.lexists(self._root):
            check_free(self.out, force=self._force)
        parent = self._target.parent
        self._new_parents = [p for p in (parent, *parent.parents) if not p.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        self._journal = _adopt(self._root, self.out)
        self._journal.seek(0)
        raw = self._journal.readall()
        self._untouched = raw.count(b"\n") > 1 and self.folder.exists()
        earlier = read_journal(raw, self._identity.digest)
        self._recover(complete=b'{"complete": true}\n' in raw)
        if earlier.complete and not self.folder.exists() and self._is_done(earlier.artifacts):
            self.artifacts = dict(earlier.artifacts)
            self._published = True
            return
        check_free(self.out, force=self._force)
        self._untouched = False
        self._take_up(earlier)

    def place(self, name: str = "") -> "Place":
        """Return where an artifact is to be written: the folder, or one of this name in it."""
        (self.folder / name).mkdir(exist_ok=True)
        return Place(self, name)

    @property
    def work(self) -> Path:
        """A folder on the same disk, for what is needed for a moment only; it never appears."""
        found = self._root / _SCRATCH
        found.mkdir(exist_ok=True)
        return found

    def record(self, name: str, finished: Finished) -> None:
        """Note that a file is complete, so that a later run need not write it again."""
        self._append({"file": name, **asdict(finished)})
        self.finished[name] = finished

    def finish(self, name: str, artifact: Artifact) -> None:
        """Note that an artifact is complete, by the name of its folder."""
        self._append({"artifact": name, **asdict(artifact), "path": ""})
        self.artifacts[name] = replace(artifact, path=self.folder / name)

    def publish(self) -> None:
        """Rename the folder to its final name, durably; what was there comes back if that fails.

        Raises:
            UsageError: something has appeared there that may not be replaced.
            CheckpointError: a file that was read has changed.
        """
        if not self._published:
            for path in sorted(self.folder.rglob("*"), reverse=True):
                _sync(path)
            _sync(self.folder)
            self._identity.read.check()
            self._append({"complete": True})
            self._swap()
            self._published = True
        # The output is complete, whatever becomes of the rest: the next run here removes it.
        try:
            self._remove(_FILES, _SCRATCH, _OLD)
        except OSError:
            pass

    def give_up(self) -> None:
        """Remove what this run has made, and the parents that it had to make."""
        held = self._journal is not None and not (self._published or self._untouched)
        if held and not os.path.lexists(self._root / _OLD):  # what cannot be put back stays
            self._remove(_FILES, _SCRATCH)
        for parent in self._new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def close(self) -> None:
        """Let other runs have the place."""
        if self._journal is not None:
            self._journal.close()

    def _append(self, entry: Mapping[str, object]) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(entry).encode() + b"\n")
        os.fsync(self._journal.fileno())

    def _remove(self, *names: str) -> None:
        """Remove these folders, in a second try where the disk refuses one call of the first."""
        try:
            self._remove_once(names)
        except OSError:
            self._remove_once(names)

    def _remove_once(self, names: Iterable[str]) -> None:
        for name in names:
            if os.path.lexists(self._root / name):
                shutil.rmtree(self._root / name)
        # Last, since without it the rest is nobody's.
        (self._root / _JOURNAL).unlink(missing_ok=True)
        self._root.rmdir()

    def _recover(self, *, complete: bool) -> None:
        """Finish or undo what a run that was killed amid its last renames began."""
        aside = self._root / _OLD
        if not aside.exists():
            return
        if self.folder.exists():
            self._put_back()
        elif complete:
            shutil.rmtree(aside)
        else:
            raise _in_the_way(self._root)

    def _put_back(self) -> None:
        """Return what was at ``out`` before, unless somebody took its place.

        Raises:
            UsageError: something is there.
        """
        aside = self._root / _OLD
        try:
            aside.rename(self._target)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            raise UsageError(
                f"{self.out} appeared while bake was replacing what was there",
                why=f"what was there before is in {aside}",
                fix="move one of the two away, then run the same command again",
            ) from error

    def _is_done(self, artifacts: Mapping[str, Artifact]) -> bool:
        """Tell whether the output that an earlier run renamed is there, byte for byte."""
        return all(_holds(self._target / name, made) for name, made in artifacts.items())

    def _take_up(self, earlier: "Journal") -> None:
        """Keep what a run of the same request has finished, remove all else, and begin anew."""
        assert self._journal is not None
        whole = {
            name: made
            for name, made in earlier.artifacts.items()
            if _holds(self.folder / name, made)
        }
        kept = {
            (Path(name) / file).as_posix() for name, made in whole.items() for file in made.files
        }
        _sweep(self.folder, {*kept, *earlier.files})
        if os.path.lexists(self._root / _SCRATCH):
            shutil.rmtree(self._root / _SCRATCH)
        self.folder.mkdir(exist_ok=True)
        self._journal.truncate(0)
        self._append({"format": _FORMAT, "identity": self._identity.digest})
        for name, finished in earlier.files.items():
            if (self.folder / name).exists():
                self.record(name, finished)
        for name, artifact in whole.items():
            self.finish(name, artifact)

    def _swap(self) -> None:
        """Let the folder appear; nothing is lost whichever call fails."""
        check_free(self.out, force=self._force)
        aside = self._root / _OLD
        replaced, appeared = not _is_empty(self._target), False
        if replaced:
            self._target.rename(aside)
        try:
            if replaced:
                _check_ours(aside, self.out)  # somebody may have changed it since
            self._appear()
            appeared = True
            _sync(self._target.parent)
        except BaseException:
            if appeared:
                self._target.rename(self.folder)
            if replaced:
                self._put_back()
            raise

    def _appear(self) -> None:
        try:
            self.folder.rename(self._target)
        except OSError as error:
            if error.errno in _TAKEN:
                check_free(self.out, force=False)
            raise


@dataclass(frozen=True, slots=True)
class Place:
    """Where one artifact is written: a stage's folder, or a folder in it."""

    stage: Stage
    name: str

    @property
    def folder(self) -> Path:
        """Where to write."""
        return self.stage.folder / self.name

    @property
    def final(self) -> Path:
        """Where the folder will be when the run is done."""
        return self.stage.out / self.name

    def finished(self, name: str) -> Finished | None:
        """Return what is known of a file that is complete."""
        return self.stage.finished.get((Path(self.name) / name).as_posix())

    def record(self, name: str, finished: Finished) -> None:
        """Note that a file is complete, so that a later run need not write it again."""
        self.stage.record((Path(self.name) / name).as_posix(), finished)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield an empty folder on the same disk, which goes when the block ends."""
        try:
            yield self.stage.work
        finally:
            shutil.rmtree(self.stage.work)


@dataclass(frozen=True, slots=True)
class Journal:
    """What a journal says of one request."""

    files: Mapping[str, Finished] = field(default_factory=dict)
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    complete: bool = False


def read_journal(raw: bytes, identity: str) -> Journal:
    """Return what a journal says, or nothing if it is about another request.

    A kill can tear the last line; what stands before it counts.
    """
    entries: list[object] = []
    for line in raw.split(b"\n")[:-1]:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    if not entries or entries[0] != {"format": _FORMAT, "identity": identity}:
        return Journal()
    files, artifacts, complete = {}, {}, False
    for entry in entries[1:]:
        match entry:
            case {"file": str(name), "bytes": int(size), "sha256": str(digest)}:
                files[name] = Finished(size, digest)
            case {
                "artifact": str(name),
                "kind": str(kind),
                "files": dict(made),
                "bytes_written": int(written),
                "bytes_edited": int(edited),
            }:
                artifacts[name] = Artifact(kind, Path(), made, written, edited)
            case {"complete": True}:
                complete = True
    return Journal(files, artifacts, complete)


def _refused(error: OSError, out: Path) -> InputError:
    """Return the error of a disk in words: of the output, unless it names something else."""
    named = None if error.filename is None else Path(os.fsdecode(error.filename)).absolute()
    ours = named is None or named.is_relative_to(out.resolve().parent)
    return InputError(
        f"cannot {'write the output' if ours else 'read'}: {error.strerror or error}",
        where=str(out if named is None else named),
        fix="see to the disk and its permissions, then run the same command again",
    )


def _is_empty(out: Path) -> bool:
    """Whether there is nothing, or an empty folder.

    Raises:
        UsageError: it is no folder.
    """
    try:
        with os.scandir(out) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        raise UsageError(f"{out} exists and is no folder", fix="name another output") from None


def _check_ours(folder: Path, called: Path) -> None:
    """Refuse to replace what is neither an artifact of bake nor nothing but artifacts."""
    if (folder / RECORD).is_file():
        return
    runs = {runs_of(folder / carrier).name for carrier in CARRIERS}
    for entry in sorted(entry for entry in folder.iterdir() if entry.name not in runs):
        if entry.name not in CARRIERS or entry.is_symlink() or not (entry / RECORD).is_file():
            raise UsageError(
                f"{called} was not written by bake, so it is not replaced",
                why=f"it holds {entry.name}, which bake did not write, and no {RECORD}; --force "
                "removes the whole folder",
                fix="remove it yourself if nothing in it is needed, or name another output",
            )


def _in_the_way(root: Path) -> UsageError:
    return UsageError(
        f"{root} is in the way and is not bake's", fix="remove it, then run the command again"
    )


def _adopt(root: Path, out: Path) -> FileIO:
    """Return the journal of the folder beside an output, which is created or taken up, locked.

    Raises:
        UsageError: it is not bake's or not this user's, or another run holds it.
    """
    while True:
        try:
            root.mkdir(mode=0o700)
            owner = None  # whoever the system says, since it is ours
        except FileExistsError:
            owner = os.geteuid()
        try:
            if (journal := _lock_in(root, owner, out)) is not None:
                return journal
        except FileNotFoundError:  # a run that has just ended removed it
            continue
        except OSError:
            if owner is None and not any(root.iterdir()):
                root.rmdir()
            raise


def _lock_in(root: Path, owner: int | None, out: Path) -> FileIO | None:
    """Return the locked journal, or None if the folder was removed or replaced meanwhile."""
    if not stat.S_ISDIR(root.lstat().st_mode):
        raise _in_the_way(root)
    beside = os.open(root, _own(os.O_RDONLY | os.O_DIRECTORY))
    journal = None
    try:
        about = os.fstat(beside)
        _check_entries(root, beside, about.st_uid if owner is None else owner)
        handle = os.open(
            _JOURNAL, _own(os.O_RDWR | os.O_CREAT | os.O_APPEND), mode=0o600, dir_fd=beside
        )
        journal = FileIO(handle, "a+b")
        _lock(journal, out)
        held = os.stat(_JOURNAL, dir_fd=beside, follow_symlinks=False)
        same = os.path.samestat(os.fstat(handle), held)
    except BaseException:
        if journal is not None:
            journal.close()
        raise
    finally:
        os.close(beside)
    if same and os.path.samestat(about, root.lstat()):
        return journal
    journal.close()
    return None


def _own(flags: int) -> int:
    return flags | os.O_NOFOLLOW | os.O_CLOEXEC


def _check_entries(root: Path, beside: int, owner: int) -> None:
    """Require that a folder and all in it are this user's, and that bake put it there.

    Raises:
        UsageError: something else is in it.
    """
    names = set()
    with os.scandir(beside) as entries:
        for entry in entries:
            about = entry.stat(follow_symlinks=False)
            if entry.name == _JOURNAL:
                # A second name of the same file could be anywhere.
                fits = stat.S_ISREG(about.st_mode) and about.st_nlink == 1
            else:
                fits = entry.name in (_FILES, _OLD, _SCRATCH) and stat.S_ISDIR(about.st_mode)
            if not fits or about.st_uid != owner:
                raise _in_the_way(root)
            names.add(entry.name)
    if os.fstat(beside).st_uid != owner or (names and _JOURNAL not in names):
        raise _in_the_way(root)
    if names:
        handle = os.open(_JOURNAL, _own(os.O_RDONLY), dir_fd=beside)
        try:
            begins = os.read(handle, len(_BEGINS))
        finally:
            os.close(handle)
        if not _BEGINS.startswith(begins):
            raise _in_the_way(root)


def _lock(file: FileIO, out: Path) -> None:
    """Hold a file, until it is closed, against other runs.

    Raises:
        UsageError: another run holds it.
    """
    import fcntl  # POSIX only

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"another run of bake is writing {out}", fix="wait for it, or name another output"
        ) from error


def _holds(folder: Path, artifact: Artifact) -> bool:
    """Tell whether a folder holds an artifact's very files, and no link."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    links = any(path.is_symlink() for path in folder.rglob("*"))
    return not links and digests(folder) == artifact.files


def _sweep(folder: Path, kept: set[str]) -> None:
    """Remove everything from a folder but these files; a link goes, and nothing behind it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_symlink() or not path.is_dir():
            if path.is_symlink() or path.relative_to(folder).as_posix() not in kept:
                path.unlink()
        elif not any(path.iterdir()):
            path.rmdir()


def _sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    handle = os.open(path, _own(os.O_RDONLY))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
