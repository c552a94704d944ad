"""What the templates print, put together from the facts of one artifact."""

from pathlib import PurePosixPath
from typing import Any

from bake.artifact.names import IMAGES, is_legal
from bake.artifact.verification import VERIFICATION, Report
from bake.cards import commands, metadata
from bake.cards.changes import changes, gguf_digests, gguf_types, weight_files
from bake.cards.edits import LEVELS, EditRow, asked_edits, direction_rows, edit_rows
from bake.cards.facts import Facts
from bake.cards.notices import concerns_safety, safety_words
from bake.cards.text import Markdown, linkable, showable


def view(facts: Facts, repo: str | None, *, unverified: bool) -> dict[str, Any]:
    """Return the values of a card by the names that the templates know.

    Args:
        facts: of the artifact.
        repo: its id on the Hub, or None.
        unverified: it is published without relying on its verification.
    """
    text = "" if facts.record.recipe is None else facts.record.recipe.text
    edits, asked = edit_rows(facts), asked_edits(facts)
    cited = [row.method for row in asked] + [row.method for row in edits if not row.stand_in]
    return {
        "facts": facts,
        "record": facts.record,
        "report": facts.report,
        "metadata": Markdown(metadata.metadata(facts, repo)),
        "unverified": unverified,
        "safety": concerns_safety(facts),
        "safety_words": Markdown(", ".join(f"*{word}*" for word in safety_words(facts))),
        "edits": edits,
        "asked": asked,
        "directions": direction_rows(facts),
        "changes": changes(facts),
        "gguf_types": gguf_types(facts),
        "gguf_base": gguf_digests(facts),
        "exactness": _exactness(facts, edits),
        "plots": _plots(facts),
        "reports": [name for name in (VERIFICATION, "verify.md") if name in facts.names],
        "papers": tuple(dict.fromkeys(paper for method in cited for paper in method.papers)),
        "versions": _versions(facts),
        "repo": repo or "",
        "commands": commands.commands(facts, repo),
        "download": Markdown(commands.download(repo)),
        "folder": Markdown(commands.folder(repo)),
        "weights": weight_files(facts),
        "recipe": text if showable(text) else "",
        "legal_files": [name for name in facts.names if is_legal(name) and linkable(name)],
        # The base's licence governs, where the record names it.
        "terms": (facts.base_licence if facts.base_licence.id else facts.licence).known,
    }


def _exactness(facts: Facts, edits: tuple[EditRow, ...]) -> str:
    """Return the class of exactness of the whole: that of the plan, or of the worst edit."""
    classes = [facts.record.plan.exactness, *(row.exactness for row in edits)]
    return max(classes, key=LEVELS.index)


def _plots(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Return the plots of the verification: file and title."""
    found = (name for name in facts.names if name.startswith("plots/"))
    return tuple(
        (name, PurePosixPath(name).stem.replace("-", " "))
        for name in found
        if PurePosixPath(name).suffix in IMAGES and linkable(name)
    )


def _versions(facts: Facts) -> tuple[tuple[str, str], ...]:
    """Return every version that the records name, and what it is of."""
    report = facts.report or Report()
    found: list[tuple[str, Any]] = [("bake, which wrote the artifact", facts.record.bake)]
    found += [(f"{name}, in the verification", found) for name, found in report.environment.items()]
    found += [(f"{served.runtime}, as a runtime", served.version) for served in report.runtimes]
    return tuple(dict.fromkeys(row for row in found if isinstance(row[1], str) and row[1]))
