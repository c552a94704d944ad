"""Seal an artifact with its sums and its statement, and check one that was sealed."""

from dataclasses import dataclass, field
from pathlib import Path

from bake.artifact.names import CARD, STATEMENT, SUMS, Problem, printable, problem_of
from bake.artifact.record import RECORD, read_record
from bake.artifact.schema import Record
from bake.artifact.verification import unverified
from bake.errors import InputError
from bake.progress import Progress
from bake.seal.manifest import (
    Manifest,
    compare_hashes,
    entry_of_text,
    manifest_of,
    read_manifest,
    read_sums,
    write_text,
)
from bake.seal.provenance import check_statement, made_by_export, statement
from bake.seal.weights import check_unchanged, check_weights

_MEANING = {
    "missing": Problem("", "is missing", "download or export the artifact again"),
    "extra": Problem("", f"is not listed in {SUMS}", "remove it, or seal again if it belongs"),
    "changed": Problem("", f"is not what {SUMS} lists", "download or export the artifact again"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """What was found about an artifact.

    Attributes:
        folder: where it is.
        record: what it says of itself.
        manifest: every file with its hashes.
        unverified: why the artifact does not count as verified, or None.
        problems: everything that is wrong, one line each.
    """

    folder: str
    record: Record = field(repr=False)
    manifest: Manifest = field(repr=False)
    unverified: str | None
    problems: tuple[Problem, ...]

    def failure(self) -> InputError | None:
        """Return the problems as one error, or None when there are none."""
        return as_error(self.problems, self.folder)


def as_error(problems: tuple[Problem, ...], folder: str) -> InputError | None:
    """Return problems as one error: the first in full, all of them one line each."""
    if not problems:
        return None
    if len(problems) == 1:
        only = problems[0]
        return InputError(f"{only.where} {only.what}", where=folder, fix=only.fix or None)
    lines = "\n".join(str(problem) for problem in problems[:50])
    more = f"\nand {len(problems) - 50} more" if len(problems) > 50 else ""
    return InputError(f"{len(problems)} things are wrong", where=folder, why=lines + more)


def raise_problems(problems: tuple[Problem, ...], folder: str) -> None:
    """Raise problems as one error, where there are any.

    Raises:
        InputError: as ``as_error`` words it.
    """
    if (error := as_error(problems, folder)) is not None:
        raise error


@dataclass(frozen=True, slots=True)
class Sealed:
    """An artifact's manifest with the two files that a seal adds.

    Attributes:
        manifest: of the folder as it is once they are written.
        texts: their texts by name.
    """

    manifest: Manifest
    texts: dict[str, str]

    def write(self, folder: Path) -> Manifest:
        """Write the two files, each as a whole or not at all, and return what is there now."""
        files = self.manifest.by_name()
        for name, text in self.texts.items():
            files[name] = write_text(folder, name, text)
        return manifest_of(files.values())


def seal(folder: Path, progress: Progress | None = None) -> Manifest:
    """Write the statement and ``SHA256SUMS`` of a folder and return its manifest.

    Raises:
        InputError: the folder is no artifact, or the export's files are not those that were sealed.
    """
    return prepare(folder, progress).write(folder.resolve())


def prepare(folder: Path, progress: Progress | None = None) -> Sealed:
    """Return what ``seal`` would write, and write nothing.

    What an earlier seal lists of the export must be unchanged: the card and the verification may
    have come or changed since, and other files may not.

    Raises:
        InputError: the folder is no artifact, or the export's files are not those that were sealed.
    """
    record = read_record(folder)
    manifest = read_manifest(folder, progress)
    if (folder / SUMS).exists():
        listed = read_sums(folder)
        problems = tuple(
            _problem(name, state)
            for name, state in compare_hashes(listed, manifest.covered)
            if state != "extra" and made_by_export(name)
        )
        raise_problems(problems, str(folder))
    return seal_of(record, manifest, str(folder))


def seal_of(record: Record, manifest: Manifest, where: str) -> Sealed:
    """Return the seal of files that need not lie in one folder.

    Raises:
        InputError: they are not what the record lists.
    """
    raise_problems(tuple(_unlike_record(record, manifest)), where)
    files = manifest.by_name()
    texts = {STATEMENT: statement(record, manifest)}
    files[STATEMENT] = entry_of_text(STATEMENT, texts[STATEMENT])
    texts[SUMS] = manifest_of(files.values()).sums
    files[SUMS] = entry_of_text(SUMS, texts[SUMS])
    return Sealed(manifest_of(files.values()), texts)


def check(folder: Path, *, base: Path | None = None, progress: Progress | None = None) -> Check:
    """Check that an artifact is what was sealed: sums, statement, index, headers and record.

    Args:
        folder: the artifact, or a download of it.
        base: the base model's folder; every tensor that the plan leaves alone must equal its own.
        progress: called with the bytes that are hashed and their total.

    Raises:
        InputError: the folder is no artifact, or was never sealed.
    """
    record = read_record(folder)
    listed = read_sums(folder)
    manifest = read_manifest(folder, progress)
    problems = [_problem(name, state) for name, state in compare_hashes(listed, manifest.covered)]
    if not problems:
        problems += _unlike_record(record, manifest)
    if not problems:  # it states the same sums: another line for each would say nothing new
        problems += check_statement(folder, record, manifest)
    problems += check_weights(folder, record)
    if base is not None and not problems:
        problems += check_unchanged(folder, record, base)
    reason = None
    try:
        reason = unverified(folder, record)
    except InputError as error:
        problems.append(problem_of(error, "verify.json"))
    return Check(str(folder), record, manifest, reason, tuple(problems))


def _unlike_record(record: Record, manifest: Manifest) -> list[Problem]:
    """Return the files that are not what the record lists, where the output lists any."""
    found = manifest.by_name()
    problems = []
    for name, digest in (record.files or {}).items():
        if name not in found:
            problems.append(Problem(printable(name), f"is missing, and {RECORD} lists it"))
        elif f"sha256:{found[name].sha256}" != f"sha256:{digest.removeprefix('sha256:')}":
            problems.append(Problem(name, f"is not what {RECORD} lists", "export again"))
    return problems


def _problem(name: str, state: str) -> Problem:
    fix = _MEANING[state].fix
    if name == CARD and state == "changed":
        fix = "if it was edited on the Hub, nothing else hangs on it; push it again to seal it"
    return Problem(name, _MEANING[state].what, fix)
