"""What ``bake export`` wrote: its record, its edits, and whether its files are still the same."""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bake.artifact.carrier import KINDS, Carrier
from bake.artifact.record import RECORD, read_record
from bake.artifact.schema import Record
from bake.checkpoints.folder import regular_file
from bake.checkpoints.hashes import sha256_of
from bake.edit_store import EDITS, FITTED, load_edits
from bake.edits import Edit
from bake.errors import InputError
from bake.families import Family
from bake.families.table import parse_family


@dataclass(frozen=True, slots=True)
class Baked:
    """An artifact with the record that it carries."""

    path: Path
    record: Record
    edits: tuple[Edit, ...]
    """What the hooks apply."""
    fitted: tuple[Edit, ...] | None = None
    """What the weights hold instead, where stand-ins were fitted for some of the edits."""

    @property
    def kind(self) -> str:
        """Which output wrote it: ``checkpoint``, ``lora``, ``gguf``, …"""
        return self.record.kind

    @property
    def carrier(self) -> Carrier:
        """What kind of files it is."""
        return KINDS[self.kind]

    @property
    def merged(self) -> bool:
        """Whether it executes an adapter that was merged, and no edits: no export wrote it."""
        return not self.carrier.exported

    @property
    def exactness(self) -> str:
        """What the plan says of the artifact."""
        return self.record.plan.exactness

    @property
    def plan_digest(self) -> str:
        """The digest of the plan that the artifact executes."""
        return self.record.plan.digest

    @property
    def most_kl(self) -> float | None:
        """The share of the effect's KL that the recipe allows, where it names one."""
        return None if self.record.verify is None else self.record.verify.most_kl

    def family(self) -> Family | None:
        """Return the table of the user's own that the artifact was made with, or None.

        Raises:
            FamilyError: it is malformed.
        """
        table = self.record.family
        return None if table is None else parse_family(table.text, f"{RECORD}: family")

    @property
    def base(self) -> str:
        """Where the base model is: a folder, or a Hub id with its commit."""
        base = self.record.base
        return base.address if base.path is None else str((self.path / base.path).resolve())


def open_baked(path: Path) -> Baked:
    """Return an artifact. Its record may be anybody's: what is used of it is checked here.

    Raises:
        InputError: the folder holds no record of bake, or a malformed one.
    """
    record = read_record(path)
    where = str(path / RECORD)
    for text in _shown(record):
        if not text.isprintable():
            raise InputError(f"the record holds {text!r:.80}, which cannot be shown", where=where)
    if Baked(path, record, ()).merged:
        return Baked(path, record, ())
    if not (path / EDITS).is_file():
        return Baked(path, record, load_edits(path / EDITS))  # which says that it is missing
    edits = load_edits(_own_file(path, EDITS))
    for edit in edits:
        if not edit.concept.isprintable():
            raise InputError(f"the concept {edit.concept!r} cannot be shown", where=where)
    fitted = None if record.calibration is None else load_edits(_own_file(path, FITTED))
    return Baked(path, record, edits, fitted)


def _shown(record: Record) -> Iterator[str]:
    """Yield what of a record a terminal shows as it is."""
    base, recipe = record.base, record.recipe
    yield from (record.plan.digest, record.bake or "", *(record.files or {}))
    yield from (base.model, base.revision or "", base.digest or "", base.path or "")
    yield from () if recipe is None else (recipe.title, recipe.digest, *recipe.settings)


def changed_files(baked: Baked, only: Container[str] | None = None) -> tuple[str, ...] | None:
    """Return the names of recorded files that are missing or have other bytes than recorded.

    None where the record has no digests, so that nothing can be said.

    Args:
        baked: the artifact.
        only: the names that are looked at; all of them when None.

    Raises:
        InputError: the record names a file outside the artifact.
    """
    files = baked.record.files
    if files is None:
        return None
    changed = []
    for name, digest in files.items():
        if only is not None and name not in only:
            continue
        if not is_inside(name):
            raise InputError(f"{RECORD} names the file {name}, outside the artifact")
        if not (baked.path / name).is_file():
            changed.append(name)
        elif sha256_of(_own_file(baked.path, name)) != digest.removeprefix("sha256:"):
            changed.append(name)
    return tuple(changed)


def is_inside(name: str) -> bool:
    """Tell whether a name from a record stays below the folder that it is taken from."""
    parts = PurePosixPath(name).parts
    drive = "\\" in name or ":" in parts[0] if parts else True
    return not (drive or name.startswith("/") or ".." in parts)


def _own_file(folder: Path, name: str) -> Path:
    """Return a file of the artifact: no link out of it, but for those of the Hub's cache.

    Raises:
        InputError: it is missing, or lies outside.
    """
    resolved = folder.resolve()
    if not (resolved / name).parent.resolve().is_relative_to(resolved):
        raise InputError(f"{name} lies outside the artifact", where=str(folder))
    return regular_file(resolved, name)
