"""What is wrong with a card, told without the network: metadata, links, places, numbers.

It holds for a card that somebody has edited since, too: prose is free, facts are those of the
record.
"""

import ipaddress
import json
import re
from collections.abc import Callable, Iterator
from urllib.parse import unquote, urlsplit

from bake.artifact.frontmatter import body_of, card_metadata
from bake.artifact.names import CARD, Problem, problem_of
from bake.cards import markdown
from bake.cards.facts import Facts
from bake.cards.lint_metadata import AGAIN, lint_metadata, short
from bake.cards.notices import concerns_safety
from bake.cards.stamp import without
from bake.cards.templates import VERIFICATION_PART, render
from bake.cards.text import escape
from bake.cards.view import view
from bake.errors import InputError
from bake.seal.scan import findings
from bake.unseen import unseen

_PLACES = re.compile(
    r"(?<![\w/:.\\-])/(?:home|Users|root|tmp|var|mnt|media|data|scratch|work|workspace|srv|opt|usr|"
    r"private|content|kaggle)/[\w.-]+|\bfile://|\b[A-Za-z]:\\{1,2}\w|(?<![\w/])~/\w"
)
_ADDRESS = re.compile(r"\bhttps?://([^\s/)\"'<>\]`]+)", re.IGNORECASE)
_PRIVATE = (".local", ".lan", ".internal", ".intranet", ".corp", ".home", ".localdomain", ".test")
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


def lint(text: str, facts: Facts) -> tuple[Problem, ...]:
    """Return everything that is wrong with the card of an artifact.

    Args:
        text: of the card.
        facts: of the artifact.
    """
    body = without(body_of(text))
    prose = markdown.prose_of(body)
    checks: tuple[Callable[[], Iterator[Problem]], ...] = (
        lambda: lint_metadata(text, facts),
        lambda: _first_line(body, facts),
        lambda: _unseen(text),
        lambda: _private(text),
        lambda: _links(prose, facts),
        lambda: _tables(prose, facts),
        lambda: _digests(body, facts),
        lambda: _said(body, facts),
    )
    problems: list[Problem] = []
    for check in checks:
        try:
            problems += check()
        except InputError as error:
            problems.append(problem_of(error, CARD))
    return tuple(dict.fromkeys(problems))


def _first_line(body: str, facts: Facts) -> Iterator[Problem]:
    first = next((line for line in body.splitlines() if line.strip()), "")
    if facts.reason is not None and not first.startswith("**Unverified.**"):
        yield Problem(
            CARD, f"does not say in its first line that it is unverified: {facts.reason}", AGAIN
        )


def _unseen(text: str) -> Iterator[Problem]:
    """Report what shows a reader another text; YAML may spell it as an escape."""
    for strange in (*unseen(text, "the text"), *unseen(card_metadata(text), "the metadata")):
        yield Problem(CARD, strange, "remove the character")


def _private(text: str) -> Iterator[Problem]:
    yield from findings(CARD, text)
    for match in _PLACES.finditer(text):
        yield Problem(CARD, f"names a place on one machine: {short(match[0])}", "remove it")
    for match in _ADDRESS.finditer(text):
        if not _public(match[1]):
            yield Problem(CARD, f"names a host that nobody else reaches: {short(match[1])}")


def _public(authority: str) -> bool:
    host = authority.rpartition("@")[2].rstrip(".,;:").casefold()
    name = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." in name and not name.endswith(_PRIVATE)
    return False


def _links(prose: str, facts: Facts) -> Iterator[Problem]:
    for target in markdown.targets(prose):
        parts = urlsplit(target)
        if parts.scheme in ("http", "https", "mailto"):
            continue
        if parts.scheme or parts.netloc:
            yield Problem(CARD, f"links to {short(target)}, which is no page and no file")
        elif parts.path and unquote(parts.path).removeprefix("./") not in (*facts.names, CARD):
            yield Problem(CARD, f"links to {short(target)}, which is not in the folder", AGAIN)


def _tables(prose: str, facts: Facts) -> Iterator[Problem]:
    """Compare the verification's tables with those that verify.json gives, cell by cell."""
    if facts.report is None:
        return
    shown = {table[0]: table[1:] for table in markdown.tables(prose) if table}
    part = render(VERIFICATION_PART, view(facts, None, unverified=False))
    for head, *wanted in markdown.tables(part):
        named = next((repr(cell) for cell in head if cell), "without a head")
        if head not in shown:
            yield Problem(CARD, f"lacks the table {named}", AGAIN)
            continue
        rows = shown[head]
        for row, right in zip(rows, wanted, strict=False):
            yield from _row(row, right)
        if len(rows) != len(wanted):
            what = f"has {len(rows)} rows in the table {named}"
            yield Problem(CARD, f"{what} where verify.json gives {len(wanted)}", AGAIN)


def _row(row: tuple[str, ...], right: tuple[str, ...]) -> Iterator[Problem]:
    for cell, meant in zip(row, right, strict=False):
        if cell != meant:
            what = f"says {short(cell)} in the row {short(row[0])}"
            yield Problem(CARD, f"{what}, where verify.json gives {short(meant)}", AGAIN)
    if len(row) != len(right):
        yield Problem(CARD, f"has another number of cells in the row {short(row[0])}", AGAIN)


def _digests(body: str, facts: Facts) -> Iterator[Problem]:
    """Require that every sha256 in the card is one of the records."""
    prompts = None if facts.report is None else facts.report.prompts.digest
    known = set(_DIGEST.findall(json.dumps(facts.record.to_json()) + str(prompts)))
    for digest in _DIGEST.findall(body):
        if digest not in known:
            yield Problem(CARD, f"has a sha256 that no record has: {digest[:12]}…", AGAIN)


def _said(body: str, facts: Facts) -> Iterator[Problem]:
    """Require what no edit of the prose may take away."""
    if facts.record.plan.digest not in body:
        yield Problem(CARD, "does not name the plan's digest", AGAIN)
    if facts.commit is not None:
        if f"huggingface.co/{facts.base_repo}/tree/{facts.commit}" not in body:
            yield Problem(CARD, "does not link the base at its commit", AGAIN)
    if concerns_safety(facts) and "concerns refusals or safety" not in body:
        yield Problem(CARD, "lacks the notice that the edit concerns refusals or safety", AGAIN)
    if facts.record.bake is not None and escape(facts.record.bake) not in body:
        yield Problem(CARD, "does not name the version of bake that wrote the artifact", AGAIN)
