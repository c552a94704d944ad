"""A folder becomes what is published: checked, with its card, sealed and signed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from bake.artifact.carrier import KINDS
from bake.artifact.names import CARD, SIGNATURE, STATEMENT, SUMS
from bake.artifact.schema import Record
from bake.cards.card import lint_card, render_card
from bake.cards.stamp import is_bakes
from bake.checkpoints import open_checkpoint
from bake.checkpoints.config import CONFIG
from bake.errors import CheckpointError, InputError
from bake.progress import Progress
from bake.publish.options import PushOptions
from bake.publish.preflight import Preflight, preflight
from bake.seal.manifest import (
    Manifest,
    entry_of,
    entry_of_text,
    manifest_of,
    stamp,
    write_text,
)
from bake.seal.seal import Sealed, prepare, raise_problems, seal_of
from bake.seal.sign import out_of_date, sign
from bake.seal.weights import check_unchanged


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is published.

    Attributes:
        folder: where its files are; weights that stay on the Hub are in none.
        manifest: every file that the repository is to hold.
        checked: what the preflight found.
        receipt: the file that says afterwards what was done.
        title: of the commit.
        notes: what the user should know.
        gated: how access to the base is gated, and so to the model; empty where it is not.
    """

    folder: Path
    manifest: Manifest
    checked: Preflight
    receipt: Path
    title: str
    notes: tuple[str, ...] = ()
    gated: str = ""

    @property
    def record(self) -> Record:
        """What the artifact says of itself."""
        return self.checked.record

    @property
    def tag(self) -> str:
        """What names the artifact in the repository."""
        return f"bake-{self.manifest.digest[:12]}"


def prepare_push(
    folder: Path,
    options: PushOptions,
    progress: Progress | None,
    remark: Callable[[str], None],
) -> Prepared:
    """Check a folder, and write its card, its seal and its signature unless nothing is written.

    Args:
        folder: what ``bake export`` wrote.
        options: what the user asks for.
        progress: called with the bytes that are hashed and their total.
        remark: called with what is being done.

    Raises:
        InputError: the artifact must not be published as it is.
    """
    card = _card_for(folder, options)
    found = preflight(folder, options.terms, card=card)
    raise_problems(found.problems, str(folder))
    folder = folder.resolve()
    notes = (*found.notes, *_compare_with_base(folder, found.record))
    if card is not None:
        remark(f"{CARD} {'would be' if options.dry_run else 'is'} generated")
    write = None if options.dry_run else card
    sealed = _sealed(folder, found, write, progress)
    if options.dry_run and card is not None:
        files = sealed.manifest.by_name() | {CARD: entry_of_text(CARD, card)}
        sealed = seal_of(found.record, manifest_of(files.values()), str(folder))
    if options.key is None and SIGNATURE in sealed.manifest.by_name():
        # One that is over other files would look like a forgery to whoever verifies it.
        raise_problems(tuple(out_of_date(folder, sealed.manifest)), str(folder))
    manifest = sealed.manifest if options.dry_run else sealed.write(folder)
    if options.key is not None and not options.dry_run:
        sign(folder, options.key, passphrase=options.passphrase)
        # Signing seals again, which gives the same bytes in other files; the signature comes last.
        again = {name: entry_of(folder / name, name) for name in (STATEMENT, SUMS, SIGNATURE)}
        manifest = manifest_of((manifest.by_name() | again).values())
    return Prepared(
        folder,
        manifest,
        found,
        receipt=folder.parent / f"{folder.name}.push.json",
        title=f"Publish {found.record.kind} of plan {short_digest(found.record)}",
        notes=notes,
    )


def short_digest(record: Record) -> str:
    """Return the beginning of the plan's digest, for titles."""
    return record.plan.digest.removeprefix("sha256:")[:12]


def _card_for(folder: Path, options: PushOptions) -> str | None:
    """Return the card that is to be generated: there is none, or one of bake's that nobody edited.

    Raises:
        InputError: the folder is no artifact, or its records do not make a card.
    """
    path, terms = folder / CARD, options.terms
    if folder.is_symlink() or not folder.is_dir() or path.is_symlink():
        return None  # the preflight says what that means
    if terms.no_card if not path.exists() else not is_bakes(path):
        return None
    text = render_card(folder, repo=options.to.repo, unverified=terms.unverified)
    raise_problems(lint_card(text, folder), str(path))
    return text


def _sealed(folder: Path, found: Preflight, card: str | None, progress: Progress | None) -> Sealed:
    """Return the seal of a folder to which nobody but this has written since it was checked."""
    if card is not None:
        write_text(folder, CARD, card)
    there = {*found.names, CARD} if card is not None else found.names
    stamps = {name: stamp(folder / name) for name in there}
    sealed = prepare(folder, progress)
    for file in sealed.manifest.files:
        if file.name not in sealed.texts and stamps.get(file.name) != file.stamp:
            raise InputError("changed while it was being checked", where=file.name, fix="run again")
    return sealed


def _compare_with_base(folder: Path, record: Record) -> list[str]:
    """Compare every tensor that the plan leaves alone with the base's, where the base is at hand.

    Returns:
        what there is to say when it is not.

    Raises:
        InputError: a tensor differs although the plan leaves it alone.
    """
    if not KINDS[record.kind].checkpoint:
        return []
    base = _base_at_hand(folder, record)
    if base is None:
        return ["the base is not on this machine: untouched tensors were not compared with it"]
    raise_problems(tuple(check_unchanged(folder, record, base)), str(folder))
    return []


def _base_at_hand(folder: Path, record: Record) -> Path | None:
    """Return the folder of the base, its own or that of the Hub's cache, when it is whole."""
    path = record.base.path
    base = folder / path if path is not None else None
    if record.base.on_hub and record.base.pinned:
        config = try_to_load_from_cache(record.base.repo, CONFIG, revision=record.base.revision)
        base = Path(config).parent if isinstance(config, str) else None
    if base is None:
        return None
    try:
        open_checkpoint(base)
    except CheckpointError:
        return None  # moved, or in the cache in part
    return base
