"""The templates of ``model_cards/``: found in a wheel and in a checkout, rendered in a sandbox.

A value that is not ``Markdown`` is escaped when it is printed, so that a template cannot forget to;
a name that is not there is an error, so that no gap survives.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bake
from bake.artifact.carrier import KINDS
from bake.cards import text
from bake.cards.text import Markdown, escape, number
from bake.checkpoints.hub_names import is_commit, is_repository
from bake.errors import BakeError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

VERIFICATION_PART = "parts/verification.md.jinja"
"""The part of every card that shows what was measured, with each number of ``verify.json``."""

_FILTERS = (
    *(text.code, text.count, text.fenced, text.json_word),
    *(text.measured, text.paragraphs, text.quoted, text.versions),
)


def folder() -> Path:
    """Return the folder of the templates.

    Raises:
        BakeError: they are missing, so bake was not installed as a whole.
    """
    package = Path(bake.__file__).parent
    for found in (package / "cards" / "templates", package.parent / "model_cards"):
        if all((found / carrier.template).is_file() for carrier in KINDS.values()):
            return found
    raise BakeError(
        "the templates of the model cards are missing",
        where=str(package),
        fix="install bake again: they belong to it",
    )


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return a card, or a part of one.

    Args:
        template: its file.
        values: what the template prints, by name.
    """
    return _environment(folder()).get_template(template).render(**values)


@cache
def _environment(place: Path) -> "ImmutableSandboxedEnvironment":
    """Return what renders the templates of a folder, and keeps each once it is compiled."""
    from jinja2 import FileSystemLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(place, encoding="utf-8"),
        undefined=StrictUndefined,
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # finalize escapes, for Markdown; HTML's escaping would do it twice
    )
    environment.filters |= {make.__name__: make for make in _FILTERS}
    environment.tests |= {"commit": is_commit, "repository": is_repository}
    # raw is for what was checked to be an id, a commit or a formula, inside links and code.
    environment.filters["raw"] = Markdown
    return environment


def _printed(value: object) -> str:
    """Return a value as the card shows it."""
    if isinstance(value, Markdown):
        return value
    if isinstance(value, bool) or value is None:
        raise TypeError(f"{value!r} is not for a card")
    if isinstance(value, int | float):
        return number(value)
    return escape(str(value))
