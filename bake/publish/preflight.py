"""Everything that is checked before a byte leaves: which files, what is in them, under which terms.

It needs no network. What only the Hub can say (the base's licence) is checked by ``push`` with
``check_terms`` before the repository is created.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bake.artifact.frontmatter import card_metadata, first_line_of, read_card
from bake.artifact.names import CARD, Problem, check_links, check_names, problem_of, walk
from bake.artifact.record import RECORD, read_json, read_record
from bake.artifact.schema import Record
from bake.artifact.verification import ungated, unverified
from bake.cards import licences
from bake.checkpoints.adapter import FILES
from bake.errors import InputError, UsageError
from bake.nearby import nearby
from bake.seal.scan import scan
from bake.seal.weights import check_finite, check_headers, check_weights

_ADMITTED = re.compile(r"\b(?:unverified|not (?:been )?verified)\b", re.IGNORECASE)
_UNGATED = re.compile(r"\bungated\b", re.IGNORECASE)
ADAPTER = FILES[0]
ALLOWANCES = ("licence", "paths", "code")


@dataclass(frozen=True, slots=True)
class Terms:
    """What the user takes on.

    Attributes:
        allow: any of ``licence`` (the base's terms are met in another way than bake can see),
            ``paths`` (home folders in texts) and ``code`` (Python files travel).
        unverified: publish without a verification that passed.
        ungated: publish although nothing shows that the recipe's gate on side effects is held.
        no_card: publish without a card.
    """

    allow: frozenset[str] = frozenset()
    unverified: bool = False
    ungated: bool = False
    no_card: bool = False

    def __post_init__(self) -> None:
        for word in sorted(self.allow):
            if word not in ALLOWANCES:
                raise UsageError(
                    f"{word!r} cannot be allowed", fix=f"known are {', '.join(ALLOWANCES)}"
                )


@dataclass(frozen=True, slots=True)
class Preflight:
    """What was found about an artifact that is to be published.

    Attributes:
        folder: where it is.
        record: what it says of itself.
        names: its files.
        card: the text of its card, or None.
        notes: what the user should know, and what is no reason to stop.
        problems: everything that is.
        unverified: why the artifact does not count as verified, or None.
        ungated: why its recipe's gate does not count as held, or None.
    """

    folder: Path
    record: Record
    names: tuple[str, ...]
    card: str | None = field(repr=False)
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]
    unverified: str | None = None
    ungated: str | None = None


def preflight(
    folder: Path, terms: Terms, *, weights: Sequence[str] = (), card: str | None = None
) -> Preflight:
    """Check an artifact on this machine.

    Args:
        folder: where it is.
        terms: what the user takes on.
        weights: names of weights that are not in the folder; whoever brings them checks what is
            in them.
        card: the card that the folder is going to have, in place of the one that it has.

    Raises:
        InputError: the folder is no artifact at all; everything else is a problem.
    """
    if folder.is_symlink() or not folder.is_dir():
        fix = nearby(folder, "name what `bake export` wrote")
        raise InputError("is no folder", where=str(folder), fix=fix)
    record = read_record(folder)
    found, problems = walk(folder)
    names = list(found)
    links = check_links(folder, names)
    files = [name for name in names if name not in {link.where for link in links}]
    files += weights
    problems += links + check_names(files, record.kind, code="code" in terms.allow)
    if not problems:  # what is inside a file matters only once the file may travel
        problems += check_headers(folder) if weights else check_weights(folder, record)
        problems += scan(folder, names, paths="paths" in terms.allow)
    if not problems and not weights:
        problems += check_finite(folder, record)
    reason, more = _check_verification(folder, record, terms)
    problems += more
    open_gate, more = _check_gate(folder, record, terms)
    problems += more
    card, more = _check_card(folder, record, terms, reason, card)
    problems += more
    problems += [] if "code" in terms.allow else _check_code(folder)
    problems += [] if "paths" in terms.allow else _check_base_place(folder)
    if record.base.on_hub and not record.base.pinned:
        problems.append(
            Problem(RECORD, "names no commit of the base", "export again from the Hub's base")
        )
    if open_gate is not None and card is not None and not _UNGATED.search(card):
        what = f"does not say that the artifact is ungated: {open_gate}"
        problems.append(Problem(CARD, what, "say so there, or run `bake card` again"))
    notes = tuple(_notes(record, terms, reason, open_gate))
    problems = list(dict.fromkeys(problems))
    return Preflight(folder, record, tuple(names), card, notes, tuple(problems), reason, open_gate)


def _check_card(
    folder: Path, record: Record, terms: Terms, reason: str | None, card: str | None
) -> tuple[str | None, list[Problem]]:
    try:
        card = read_card(folder) if card is None else card
        if card is None:
            fix = "run `bake card`, or publish without with --no-card"
            return None, [] if terms.no_card else [Problem(CARD, "there is no card", fix)]
        base = card_metadata(card).get("base_model")
    except InputError as error:
        return None, [problem_of(error, CARD)]
    named = base if isinstance(base, list) else [base]
    if record.base.on_hub and base is not None and record.base.repo not in named:
        what = f"names the base_model {base}, the record names {record.base.repo}"
        return card, [Problem(CARD, what, "run `bake card` again")]
    if reason is not None and terms.unverified and not _ADMITTED.search(first_line_of(card)):
        what = "does not say in its first line that the artifact is not verified"
        return card, [Problem(CARD, what, "say so there, or remove it and have one generated")]
    return card, []


def _check_code(folder: Path) -> list[Problem]:
    """Report a config that has a reader fetch and run Python code."""
    problems = []
    for name in ("config.json", "tokenizer_config.json"):
        try:
            found = read_json(folder, name).get("auto_map") if (folder / name).is_file() else None
        except InputError as error:
            problems.append(problem_of(error, name))
            continue
        if found:
            what = f"names code that a reader would run (auto_map: {found})"
            problems.append(Problem(name, what, "remove it, or --allow code"))
    return problems


def _check_base_place(folder: Path) -> list[Problem]:
    """Report an adapter that names its base by a folder of this machine."""
    try:
        config = read_json(folder, ADAPTER) if (folder / ADAPTER).is_file() else {}
    except InputError as error:
        return [problem_of(error, ADAPTER)]
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not Path(named).is_absolute():
        return []
    what = "names the base by a folder of this machine"
    return [Problem(ADAPTER, what, "export it from the base on the Hub, or --allow paths")]


def _check_verification(
    folder: Path, record: Record, terms: Terms
) -> tuple[str | None, list[Problem]]:
    """Return why the artifact does not count as verified, or None, and whether that stops it."""
    try:
        reason = unverified(folder, record)
    except InputError as error:
        return "verify.json is malformed", [problem_of(error, "verify.json")]
    if reason is None or terms.unverified:
        return reason, []
    fix = "run `bake verify`, or publish as it is with --unverified"
    return reason, [Problem("verify.json", f"is no proof of this plan: {reason}", fix)]


def _check_gate(folder: Path, record: Record, terms: Terms) -> tuple[str | None, list[Problem]]:
    """Return why the recipe's gate does not count as held, or None, and whether that stops it."""
    try:
        reason = ungated(folder, record)
    except InputError:
        return "verify.json is malformed", []  # which is a problem already
    if reason is None or terms.ungated:
        return reason, []
    fix = "run `bake verify`, or publish as it is with --ungated"
    return reason, [Problem("verify.json", f"does not show that the gate is held: {reason}", fix)]


def _notes(record: Record, terms: Terms, reason: str | None, open_gate: str | None) -> list[str]:
    notes = []
    if terms.ungated and open_gate is not None:
        notes.append(f"the recipe's gate on side effects is not held: {open_gate}")
    if terms.unverified and reason is not None:
        notes.append("the artifact is published without a verification that passed")
    if not record.base.on_hub:
        notes.append(
            f"the base {record.base.model} is a folder: nobody else can reproduce this model"
        )
    notes += [f"allowed: {word}" for word in sorted(terms.allow)]
    return notes


def check_terms(
    found: Preflight, terms: Terms, *, base: licences.Stated, repo: str
) -> tuple[Problem, ...]:
    """Return which rules of the base's licence publishing as ``repo`` would break."""
    if "licence" in terms.allow:
        return ()
    metadata = {} if found.card is None else card_metadata(found.card)
    notices = [n for n in found.names if n.upper().startswith("NOTICE")]
    texts = [(found.folder / name).read_text(encoding="utf-8") for name in notices]
    return tuple(
        licences.check_licence(
            base=base,
            ours=licences.stated(metadata),
            repo=repo,
            names=list(found.names),
            notice="\n".join(texts),
            card=found.card,
        )
    )
