"""The commands of a card that load an artifact, and what is known of each."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from bake.artifact.carrier import vllm_room
from bake.cards.changes import weight_files
from bake.cards.facts import Facts
from bake.cards.text import NOT_MEASURED, Markdown, escape, number, printable

_SAID = {"passed": "Tested", "measured": "Measured", "failed": "**Failed**"}


@dataclass(frozen=True, slots=True)
class Command:
    """One way to load an artifact.

    Attributes:
        runtime: its name for people.
        language: of the code.
        code: what to run.
        tried: what the record says of it.
    """

    runtime: str
    language: str
    code: str
    tried: Markdown


def commands(facts: Facts, repo: str | None) -> tuple[Command, ...]:
    """Return the commands that load an artifact.

    Args:
        facts: of the artifact.
        repo: its id on the Hub; its own folder where it has none yet.
    """
    words = _words(facts, repo)
    return tuple(
        Command(
            way.title,
            way.language,
            way.code.format_map(words),
            tried(facts, way.runtime, way.how),
        )
        for way in facts.carrier.loading
        if way.needs is None or way.needs in facts.names
    )


def _words(facts: Facts, repo: str | None) -> Mapping[str, str]:
    """Return what stands for the words in braces of ``bake.artifact.loading``, quoted."""
    here, place, file = repo or ".", folder(repo), _file(facts)
    base = facts.base_repo or printable(facts.record.base.model)
    python = json.dumps(base) + (f", revision={json.dumps(facts.commit)}" if facts.commit else "")
    rank = None if facts.adapter is None else facts.adapter.r
    most = None if rank is None else vllm_room(rank)
    return {
        "here": here,
        "here_text": json.dumps(here),
        "folder": place,
        "download": download(repo),
        "weights": shlex.quote(f"{place}/{file}"),
        "modelfile": shlex.quote(f"FROM ./base.gguf\\nADAPTER ./{place}/{file}\\n"),
        "base": shlex.quote(base) + (f" --revision {facts.commit}" if facts.commit else ""),
        "base_text": python,
        "max_rank": "" if most is None else f" --max-lora-rank {most}",
    }


def _file(facts: Facts) -> str:
    """Return the file of weights that a runtime is given; the first part of a split model."""
    names = sorted(name for name, _ in weight_files(facts)) or sorted(
        name for name in facts.names if name.endswith(".gguf") and "/" not in name
    )
    return printable(names[0]) if names else "model.gguf"


def folder(repo: str | None) -> str:
    """Return the folder that a download of the artifact is in, as the commands name it."""
    return "." if repo is None else repo.rpartition("/")[2]


def download(repo: str | None) -> str:
    """Return the command that fetches the artifact; empty where it has no repository."""
    return "" if repo is None else f"hf download {repo} --local-dir {folder(repo)}\n"


def tried(facts: Facts, runtime: str, how: str = "") -> Markdown:
    """Return what the record says of an artifact in a runtime: a measurement, or none.

    Args:
        facts: of the artifact.
        runtime: as ``verify.json`` names it.
        how: what was done to the files before they were loaded, as Markdown.
    """
    for served in () if facts.report is None else facts.report.runtimes:
        if served.runtime == runtime and served.status in _SAID:
            value = served.largest
            largest = NOT_MEASURED if value is None else f"{number(float(value))} nats"
            return Markdown(
                f"{_SAID[served.status]} with {escape(runtime)} {escape(served.version)}{how}: "
                f"log-probabilities differ from the hooked base by {largest} at most."
            )
    if runtime == "transformers" and _compared(facts):
        return Markdown(
            "Loaded by `bake verify`, which compared it with the hooks: see "
            "[Verification](#verification)."
        )
    return Markdown("Not tested." + _expected(facts, runtime))


def _compared(facts: Facts) -> bool:
    """Whether these files were run in transformers, in the storage type, beside the hooks."""
    if facts.report is None or not facts.carrier.checkpoint:
        return False
    return facts.report.stored in facts.report.metrics


def _expected(facts: Facts, runtime: str) -> str:
    """Return what the plan says of a runtime that nobody tried."""
    for found in facts.record.plan.runtimes:
        if found.runtime == runtime:
            if found.status == "exact":
                return " The plan says that it serves the edit exactly."
            status = "" if found.status == "not tested" else f"{escape(found.status)}, "
            return f" The plan says: {status}{escape(found.reason)}."
    return ""
