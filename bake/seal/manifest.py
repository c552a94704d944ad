"""The manifest: every file of an artifact with its hashes, and ``SHA256SUMS``, its text."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from bake.artifact.names import HUBS_OWN, OUTSIDE, SUMS, printable, walk
from bake.atomic import write_atomically
from bake.checkpoints import strictjson
from bake.checkpoints.folder import regular_file
from bake.checkpoints.hashes import git_hash
from bake.errors import CheckpointError, InputError
from bake.progress import Progress, Tally

_CHUNK = 8 << 20
_LINE = re.compile(r"([0-9a-f]{64})  (\S(?:.*\S)?)")
_MAX_SUMS = 16_000_000
_GIT_LIMIT = 64 << 20  # the Hub keeps nothing this long in Git itself


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file.

    Attributes:
        name: relative to the folder, with ``/`` between its parts.
        size: in bytes.
        sha256: of its bytes; what the Hub states of a large file.
        git_oid: the sha1 that Git names it by; what the Hub states of a small one. Empty for a
            file that is too long for Git.
        stamp: size, time of change and inode, which tell that nobody has touched it since.
    """

    name: str
    size: int
    sha256: str
    git_oid: str
    stamp: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every file of a folder, in the order of their names."""

    files: tuple[FileEntry, ...]

    @property
    def digest(self) -> str:
        """The sha256 of ``SHA256SUMS``: equal for two artifacts exactly when their files are."""
        return hashlib.sha256(self.sums.encode()).hexdigest()

    @property
    def sums(self) -> str:
        """The text of ``SHA256SUMS``, as ``sha256sum`` writes it, without what it cannot cover."""
        covered = self.covered
        names = sorted(covered, key=os.fsencode)
        return "".join(f"{covered[name]}  {name}\n" for name in names)

    @property
    def covered(self) -> dict[str, str]:
        """The sha256 of every file that ``SHA256SUMS`` lists, by name."""
        return {file.name: file.sha256 for file in self.files if file.name not in OUTSIDE}

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)

    def by_name(self) -> dict[str, FileEntry]:
        """Return the files by name."""
        return {file.name: file for file in self.files}


def manifest_of(files: Iterable[FileEntry]) -> Manifest:
    """Return the manifest of some files."""
    return Manifest(tuple(sorted(files, key=lambda file: os.fsencode(file.name))))


def entry_of_text(name: str, text: str) -> FileEntry:
    """Return the entry of a text that is not written yet."""
    data = text.encode()
    git = git_hash(len(data))
    git.update(data)
    sha256 = hashlib.sha256(data).hexdigest()
    return FileEntry(name, len(data), sha256, git.hexdigest(), (0, 0, 0))


def read_manifest(folder: Path, progress: Progress | None = None) -> Manifest:
    """Hash every file of a folder.

    What the Hub adds to a repository, and what a download leaves there, is no part of it.

    Raises:
        InputError: the folder does not exist, or holds what is no file.
    """
    if not folder.is_dir():
        raise InputError("there is no such folder", where=str(folder))
    folder = folder.resolve()
    found, problems = walk(folder)
    if problems:
        raise InputError(str(problems[0]), where=str(folder))
    names = [name for name in found if name not in HUBS_OWN]
    paths = [regular_file(folder, name) for name in names]
    tally = Tally(sum(path.stat().st_size for path in paths), progress)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return Manifest(tuple(pool.map(entry_of, paths, names, repeat(tally))))


def entry_of(path: Path, name: str, tally: Tally | None = None) -> FileEntry:
    """Return the entry of a file, wherever it lies, under the name that it is published as."""
    before = stamp(path)
    size = before[0]
    sha256 = hashlib.sha256()
    git = git_hash(size)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            if size <= _GIT_LIMIT:
                git.update(chunk)
            if tally is not None:
                tally.advance(len(chunk))
    if stamp(path) != before:
        raise InputError("changed while it was being read", where=name, fix="run again")
    oid = git.hexdigest() if size <= _GIT_LIMIT else ""
    return FileEntry(name, size, sha256.hexdigest(), oid, before)


def stamp(path: Path) -> tuple[int, int, int]:
    """Return what tells that a file has been touched: size, time of change, inode."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def read_sums(folder: Path) -> dict[str, str]:
    """Return the hashes that ``SHA256SUMS`` lists, by name.

    Raises:
        InputError: it is missing or malformed.
    """
    where = str(folder / SUMS)
    try:
        path = regular_file(folder.resolve(), SUMS)
    except (CheckpointError, OSError) as error:
        raise InputError(
            f"there is no {SUMS}: nothing says what these files should be",
            where=str(folder),
            fix="run `bake check --seal` on an artifact that you trust",
        ) from error
    return _parse(strictjson.read_text(path, _MAX_SUMS, where=where).split("\n"), where)


def _parse(lines: list[str], where: str) -> dict[str, str]:
    if lines[-1] != "":
        raise InputError("does not end with a whole line", where=where)
    hashes: dict[str, str] = {}
    for number, line in enumerate(lines[:-1], start=1):
        match = _LINE.fullmatch(line)
        if match is None or not match[2].isprintable():
            raise InputError(f"line {number} is not a sha256 and a name", where=where)
        if match[2] in hashes:
            raise InputError(f"line {number} names {match[2]} again", where=where)
        hashes[match[2]] = match[1]
    if not hashes:
        raise InputError("lists no file", where=where)
    return hashes


def compare_hashes(
    listed: Mapping[str, str], found: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield each name whose hash differs with what is wrong: missing, extra or changed.

    Args:
        listed: the hashes that there should be, by name.
        found: those that there are.
    """
    for name in sorted(listed.keys() | found.keys(), key=os.fsencode):
        if name not in found:
            yield printable(name), "missing"
        elif name not in listed:
            yield printable(name), "extra"
        elif found[name] != listed[name]:
            yield printable(name), "changed"


def write_text(folder: Path, name: str, text: str) -> FileEntry:
    """Write a small file, as a whole or not at all, and return its entry."""
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    # Beside the folder: a run that is killed leaves nothing inside that would be published.
    write_atomically(target, text.encode(), beside=folder.parent)
    return entry_of(target, name)
