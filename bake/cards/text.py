"""Text from a record as Markdown: what it says is shown, and nothing in it takes effect.

A title, a concept or a file's name is whatever somebody wrote. In a card it must not become a
heading, a link, a table's column, HTML or a formula.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from bake.sites import span

_LIMIT = 500
_SPECIAL = re.compile(r"[\\`*_{}\[\]#|~$!<>&^]")
# A backslash before a parenthesis would begin a formula on the Hub.
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "\\": "&#92;"}
_NUMBER = re.compile(r"\d+")
_PLAIN_CODE = re.compile(r"[^`|\n]+")


class Markdown(str):
    """Text that is Markdown, and is not to be escaped again."""

    __slots__ = ()


def printable(text: str, limit: int = _LIMIT) -> str:
    """Return a text as one line of characters that can be seen, cut where it is too long.

    Control characters, line breaks and marks that turn the direction of writing become spaces.
    """
    shown = "".join(c if c.isprintable() else " " for c in text[: 4 * limit])
    line = " ".join(shown.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def escape(text: str, limit: int = _LIMIT) -> Markdown:
    """Return a text as Markdown that shows exactly this text, on one line."""
    line = printable(text, limit)
    line = _SPECIAL.sub(lambda m: _ENTITIES.get(m[0], "\\" + m[0]), line)
    # A bare address, a mention and a list's mark need no brackets to take effect.
    line = line.replace("://", ":&#47;&#47;").replace("@", "&#64;")
    line = re.sub(r"(?i)\bwww\.", lambda m: m[0][:3] + "&#46;", line)
    line = re.sub(r"^(\d{1,9})([.)])(?=\s|$)", r"\1\\\2", line)
    return Markdown(re.sub(r"^[-+=]", lambda m: "\\" + m[0], line))


def paragraphs(text: str) -> Markdown:
    """Return a text of several paragraphs, each as ``escape`` shows it."""
    parts = re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").strip())
    return Markdown("\n\n".join(escape(part, 5000) for part in parts if part.strip()))


def code(text: str) -> Markdown:
    """Return a text as inline code, which may stand in a table."""
    line = printable(text)
    if _PLAIN_CODE.fullmatch(line) and "\\" not in line:
        return Markdown(f"`{line}`")
    entities = re.sub(r"[^\w .:/=-]", lambda m: f"&#{ord(m[0])};", line)
    return Markdown(f"<code>{entities.replace('_', '&#95;')}</code>")


def quoted(text: str) -> Markdown:
    """Return a text as one word of a command for a shell, in a block of code."""
    return Markdown(shlex.quote(printable(text)))


def fenced(text: str, language: str) -> Markdown:
    """Return a text as a block of code, between fences longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}")


def showable(text: str) -> bool:
    """Tell whether every character of a text can be seen, so that a block shows all of it."""
    return all(c.isprintable() or c in "\n\t" for c in text)


def linkable(name: str) -> bool:
    """Tell whether a file's name can stand in a link as it is."""
    return name.isascii() and all(c.isalnum() or c in "./_-" for c in name)


def number(value: float | int) -> Markdown:
    """Return a number in four digits, or a whole one in full."""
    if isinstance(value, int):
        return Markdown(f"{value:,}")
    return Markdown(f"{value:.4g}")


def measured(value: float | None) -> Markdown:
    """Return a number as ``number`` does, or that nobody measured it."""
    return Markdown("not measured") if value is None else number(float(value))


def versions(environment: Mapping[str, Any]) -> Markdown:
    """Return the versions of an environment in one line."""
    texts = ((k, v) for k, v in environment.items() if isinstance(v, str) and k != "system")
    return Markdown(", ".join(f"{escape(name)} {escape(value)}" for name, value in texts))


def json_word(value: object) -> str:
    """Return a value of ``config.json`` as it is written there."""
    if value is None:
        return "absent"
    return str(value).lower() if isinstance(value, bool) else str(value)


def count(number_of: int, thing: str) -> Markdown:
    """Return how many there are of something: ``1 tensor``, ``13 tensors``."""
    return Markdown(f"{number_of:,} {thing}" + ("" if number_of == 1 else "s"))


def merged(names: Sequence[str]) -> list[tuple[str, int]]:
    """Return names that differ in numbers only as one each, with how many they are.

    ``model.layers.0-31.mlp.weight``; names whose numbers are no full grid stay by themselves.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_NUMBER.sub("#", name), []).append(name)
    found: list[tuple[str, int]] = []
    for group in groups.values():
        axes = list(
            zip(*([int(n[:18]) for n in _NUMBER.findall(name)] for name in group), strict=True)
        )
        if len(group) > 1 and prod(len(set(a)) for a in set(axes)) == len(set(group)):
            spans = iter([span(axis) for axis in axes])
            found.append((_NUMBER.sub(lambda _: next(spans), group[0]), len(group)))  # noqa: B023
        else:
            found += [(name, 1) for name in group]
    return found
