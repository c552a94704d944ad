"""As much of Markdown as the lint reads: blocks of code, tables, links."""

import re
from collections.abc import Iterator

_FENCE = re.compile(r"^(`{3,}|~{3,})[^\n`]*\n", re.MULTILINE)
_LINK = re.compile(r"(?<!\\)\]\(\s*<?([^()\s<>]+)")
_HTML_LINK = re.compile(
    r"""<\w[^<>]{0,1000}?\b(?:src|href)\s*=\s*["']?([^"'\s>]+)""", re.IGNORECASE
)
_REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?\s*$", re.MULTILINE)


def prose_of(text: str) -> str:
    """Return a text without its blocks of code."""
    prose: list[str] = []
    position = 0
    while match := _FENCE.search(text, position):
        prose.append(text[position : match.start()])
        end = re.compile(rf"^{match[1]}+[ \t]*$", re.MULTILINE).search(text, match.end())
        position = len(text) if end is None else end.end()
    return "".join([*prose, text[position:]])


def tables(prose: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Return the tables of a text without blocks of code: rows of cells, the head first."""
    found: list[tuple[tuple[str, ...], ...]] = []
    rows: list[tuple[str, ...]] = []
    for line in [*prose.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("|"):
            rows.append(cells(stripped))
        elif rows:
            found.append(tuple(row for i, row in enumerate(rows) if i != 1))
            rows = []
    return tuple(found)


def cells(line: str) -> tuple[str, ...]:
    """Return the cells of one line of a table; a pipe with a backslash belongs to its cell."""
    parts = re.split(r"(?<!\\)\|", line.strip().removeprefix("|"))
    if parts and not parts[-1].strip():
        parts = parts[:-1]
    return tuple(part.strip() for part in parts)


def targets(prose: str) -> Iterator[str]:
    """Yield what every link and image of a text without blocks of code leads to."""
    without = re.sub(r"`[^`\n]*`", "", prose)
    for pattern in (_LINK, _REFERENCE, _HTML_LINK):
        yield from (match[1] for match in pattern.finditer(without))
