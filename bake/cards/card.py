"""The model card: written from ``bake.json`` and ``verify.json`` alone, checked without the Hub.

Every number in it is one of the records'. What they do not hold is left out or said to be not
measured, so that no gap has to be filled by hand.
"""

from pathlib import Path

from bake.artifact.destination import Destination
from bake.artifact.frontmatter import read_card
from bake.artifact.names import CARD, Problem
from bake.artifact.record import RECORD
from bake.atomic import write_atomically
from bake.cards import lint, stamp, templates
from bake.cards.facts import read_facts
from bake.cards.view import view
from bake.errors import InputError, UsageError
from bake.seal.seal import raise_problems


def render_card(out: Path, *, repo: str | None = None, unverified: bool = False) -> str:
    """Return the card of an artifact.

    Args:
        out: what ``bake export`` wrote.
        repo: ``owner/name`` that it is, or is to be, published as; the commands name it.
        unverified: it is published without relying on its verification, and says so in its first
            line. One that has no verification that passed says so in any case.

    Raises:
        InputError: the folder is no artifact, or a record in it is malformed.
        UsageError: ``repo`` names no repository.
    """
    if repo is not None:
        Destination(repo)
    facts = read_facts(out)
    values = view(facts, repo, unverified=unverified)
    return stamp.stamped(templates.render(facts.carrier.template, values))


def write_card(out: Path, *, repo: str | None = None, force: bool = False) -> Path:
    """Write the card of an artifact to its ``README.md``, as a whole or not at all.

    Args:
        out: what ``bake export`` wrote.
        repo: as for ``render_card``.
        force: replace a card that bake did not write, or that was edited since.

    Raises:
        UsageError: there is such a card, and ``force`` is not given.
        InputError: the folder is no artifact, a record is malformed, or the card would be wrong.
    """
    text = render_card(out, repo=repo)
    problems = lint_card(text, out)
    raise_problems(problems, str(out / CARD))
    return save_card(text, out / CARD, force=force)


def save_card(text: str, path: Path, *, force: bool = False) -> Path:
    """Write a card's text to a file, as a whole or not at all.

    Raises:
        UsageError: a card is there that bake did not write unchanged, and ``force`` is not given.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder", fix="name a file")
    if (path.exists() or path.is_symlink()) and not force and not stamp.is_bakes(path):
        raise UsageError(
            f"{path} was not written by bake, or was edited since",
            why="what is in it would be lost",
            fix="keep it, or replace it with --force",
        )
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", fix="make it, or name another file")
    place = path.parent.resolve()
    # Nothing is left in an artifact; and the parent of a folder of notes may not be the user's.
    beside = place.parent if (place / RECORD).is_file() else None
    write_atomically(place / path.name, text.encode(), beside=beside)
    return path


def lint_card(text: str, out: Path) -> tuple[Problem, ...]:
    """Return everything that is wrong with a card; it may have been edited since it was written.

    Args:
        text: of the card.
        out: the artifact that it is of.

    Raises:
        InputError: the folder is no artifact, or a record in it is malformed.
    """
    return lint.lint(text, read_facts(out))


def check_card(out: Path) -> tuple[Problem, ...]:
    """Return everything that is wrong with the card that an artifact has.

    Raises:
        InputError: the folder is no artifact, or has no card.
    """
    facts = read_facts(out)
    text = read_card(out)
    if text is None:
        raise InputError("there is no card", where=str(out / CARD), fix="run `bake card`")
    return lint.lint(text, facts)


def card_notes(out: Path) -> tuple[str, ...]:
    """Return what the publisher of an artifact should know, and what makes no card wrong.

    Raises:
        InputError: the folder is no artifact, or a record in it is malformed.
    """
    facts = read_facts(out)
    notes = []
    if facts.reason is not None:
        notes.append(f"the card says in its first line that nothing is verified: {facts.reason}")
    if facts.ungated is not None:
        notes.append(f"the card says that the gate on side effects is not held: {facts.ungated}")
    if facts.licence.id is None:
        notes.append(
            "the card states no licence: the record has none of the base, and the recipe's [card] "
            "names none"
        )
    if facts.base_repo is None:
        notes.append("the base is a folder: the card names no base_model")
    return tuple(notes)
