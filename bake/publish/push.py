"""``push``: an artifact becomes one commit of a repository on the Hub.

The order is what makes it safe. Everything that can be refused is refused before the first byte is
sent; the repository is private until its contents are known to be right; the commit names its
parent, so that of two runs at most one succeeds and a reply that is lost can be looked up; the tag
and the public view come last. Every step may be repeated, and a run after an interrupted one takes
it up.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from bake.artifact.carrier import KINDS
from bake.artifact.destination import Destination, Pushed
from bake.artifact.names import CARD, SIGNATURE, STATEMENT, SUMS
from bake.artifact.record import ArtifactRecord
from bake.checkpoints import open_checkpoint
from bake.checkpoints.config import CONFIG
from bake.errors import CheckpointError, HubError, InputError
from bake.progress import Progress
from bake.publish.commit import Parts
from bake.publish.failures import redact
from bake.publish.preflight import Preflight, Terms, preflight
from bake.publish.run import Run
from bake.publish.session import patience
from bake.seal.keys import Passphrase
from bake.seal.manifest import (
    Manifest,
    entry_of,
    entry_of_text,
    manifest_of,
    stamp,
    write_text,
)
from bake.seal.scan import MAX_TEXT
from bake.seal.seal import Sealed, as_error, prepare, seal_of
from bake.seal.weights import check_unchanged

TIMEOUT = 120.0
"""Seconds that the Hub may take for one answer; it gives a commit up after 60."""


def push(
    folder: Path,
    to: Destination,
    terms: Terms,
    *,
    dry_run: bool = False,
    download: bool = False,
    key: Path | None = None,
    passphrase: Passphrase = lambda: None,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
    remark: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Publish an artifact.

    Args:
        folder: what ``bake export`` wrote.
        to: where.
        terms: what the user takes on.
        dry_run: say what would be done; the Hub is read where it can be reached.
        download: download everything again before the tag and the public view, and compare it.
        key: sign the artifact with this private key.
        passphrase: called where the key is encrypted.
        timeout: seconds that the Hub may take for one answer.
        progress: called with the bytes that are hashed and their total.
        remark: told what is being done.

    Raises:
        InputError: the artifact must not be published as it is.
        HubError: the Hub refuses, fails or holds other bytes than were sent.
    """
    if not dry_run:
        refuse_offline()
    card = _card_for(folder, to, terms)
    found, sealed = _checked(folder, terms, progress, card, write=not dry_run)
    if card is not None:
        remark(f"{CARD} {'would be' if dry_run else 'is'} generated")
    folder = folder.resolve()
    if key is None:
        _check_signature(folder, sealed.manifest)
    manifest = sealed.manifest if dry_run else _written(folder, sealed)
    if key is not None and not dry_run:
        manifest = _signed(folder, manifest, key, passphrase)
    receipt = folder.parent / f"{folder.name}.push.json"
    run = Run(folder, to, terms, receipt, remark, download=download, manifest=manifest)
    run.take(found)
    if dry_run and constants.HF_HUB_OFFLINE:
        run.account = replace(run.account, name="")
        run.notes.append("the Hub is switched off and was not asked")
        return run.would(Parts((), (), ()))
    with listening(timeout) as said:
        pushed = run.dry() if dry_run else run.complete(run.begin())
    return replace(pushed, notes=(*pushed.notes, *said))


def refuse_offline() -> None:
    """Refuse to publish while the Hub is switched off.

    Raises:
        HubError: it is.
    """
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            "publishing needs the Hub, which is switched off", fix="unset HF_HUB_OFFLINE"
        )


@contextmanager
def listening(timeout: float) -> Iterator[list[str]]:
    """Bound the client's patience; yield a list that holds its remarks on the card afterwards."""
    said: list[str] = []
    with patience(timeout), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield said
    said += [redact(str(w.message)) for w in warned if "metadata" in str(w.message)]


def compare_with_base(folder: Path, record: ArtifactRecord) -> list[str]:
    """Compare every tensor that the plan leaves alone with the base's, where the base is at hand.

    Args:
        folder: the artifact.
        record: what it says of itself.

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
    error = as_error(tuple(check_unchanged(folder, record, base)), str(folder))
    if error is not None:
        raise error
    return []


def _base_at_hand(folder: Path, record: ArtifactRecord) -> Path | None:
    """Return the folder of the base, its own or that of the Hub's cache, when it is whole."""
    path = record.content["base"].get("path")
    base = folder / path if isinstance(path, str) else None
    if record.base_on_hub and record.pinned:
        config = try_to_load_from_cache(record.base_repo, CONFIG, revision=record.revision)
        base = Path(config).parent if isinstance(config, str) else None
    if base is None:
        return None
    try:
        open_checkpoint(base)
    except CheckpointError:
        return None  # moved, or in the cache in part
    return base


def _card_for(folder: Path, to: Destination, terms: Terms) -> str | None:
    """Return the card that is to be generated: there is none, or one of bake's that nobody edited.

    Raises:
        InputError: the folder is no artifact, or its records do not make a card.
    """
    path = folder / CARD
    if folder.is_symlink() or not folder.is_dir() or path.is_symlink():
        return None  # the preflight says what that means
    if terms.no_card if not path.exists() else not is_bakes(path):
        return None
    from bake.cards.card import lint_card, render_card

    text = render_card(folder, repo=to.repo, unverified=terms.unverified)
    error = as_error(lint_card(text, folder), str(path))
    if error is not None:
        raise error
    return text


def is_bakes(path: Path) -> bool:
    """Tell whether a file is a card that bake wrote and nobody has edited since."""
    from bake.cards.stamp import is_stamped

    if not path.is_file() or path.stat().st_size > MAX_TEXT:
        return False
    return is_stamped(path.read_bytes().decode("utf-8", errors="replace"))


def _checked(
    folder: Path,
    terms: Terms,
    progress: Progress | None,
    card: str | None,
    *,
    write: bool,
) -> tuple[Preflight, Sealed]:
    """Check a folder that nobody writes to meanwhile, and return its seal."""
    found = preflight(folder, terms, card=card)
    error = as_error(found.problems, str(folder))
    if error is not None:
        raise error
    compared = compare_with_base(folder.resolve(), found.record)
    found = replace(found, notes=(*found.notes, *compared))
    if write and card is not None:
        write_text(folder.resolve(), CARD, card)
    there = {*found.names, CARD} if write and card is not None else found.names
    stamps = {name: stamp(folder / name) for name in there}
    sealed = prepare(folder, progress)
    for file in sealed.manifest.files:
        if file.name not in sealed.texts and stamps.get(file.name) != file.stamp:
            raise InputError("changed while it was being checked", where=file.name, fix="run again")
    if not write and card is not None:
        files = sealed.manifest.by_name() | {CARD: entry_of_text(CARD, card)}
        sealed = seal_of(found.record, manifest_of(files.values()), str(folder))
    return found, sealed


def _written(folder: Path, sealed: Sealed) -> Manifest:
    """Write the seal and return what is there now."""
    files = sealed.manifest.by_name()
    for name, text in sealed.texts.items():
        files[name] = write_text(folder, name, text)
    return manifest_of(files.values())


def _signed(folder: Path, manifest: Manifest, key: Path, passphrase: Passphrase) -> Manifest:
    """Sign what is sealed; the signature is the last file that comes."""
    from bake.seal.sign import sign

    sign(folder, key, passphrase=passphrase)
    # Signing seals again, which gives the same bytes in other files.
    again = {name: entry_of(folder / name, name) for name in (STATEMENT, SUMS, SIGNATURE)}
    return manifest_of((manifest.by_name() | again).values())


def _check_signature(folder: Path, manifest: Manifest) -> None:
    """Refuse a signature that is over other files: whoever verifies it would see a forgery.

    Raises:
        InputError: it is out of date, or none.
    """
    if SIGNATURE not in manifest.by_name():
        return
    from bake.seal.sign import out_of_date

    error = as_error(tuple(out_of_date(folder, manifest)), str(folder))
    if error is not None:
        raise error
