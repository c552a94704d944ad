"""The commands of a card that load an artifact."""

import json
import shlex
from collections.abc import Mapping

from bake.artifact.carrier import vllm_room
from bake.artifact.loading import Loading
from bake.cards.changes import weight_files
from bake.cards.facts import Facts
from bake.cards.text import printable


def commands(facts: Facts, repo: str | None) -> tuple[tuple[Loading, str], ...]:
    """Return the ways to load an artifact, each with the code to run.

    Args:
        facts: of the artifact.
        repo: its id on the Hub; its own folder where it has none yet.
    """
    words = _words(facts, repo)
    return tuple(
        (way, way.code.format_map(words))
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
    own = facts.carrier.beside
    model = f"{place}/{own}" if own is not None and own in facts.names else "base.gguf"
    return {
        "loader": facts.record.plan.loader or "AutoModelForCausalLM",
        "here": here,
        "here_text": json.dumps(here),
        "folder": place,
        "download": download(repo),
        "weights": shlex.quote(f"{place}/{file}"),
        "base_gguf": shlex.quote(model),
        "modelfile": shlex.quote(f"FROM ./{model}\\nADAPTER ./{place}/{file}\\n"),
        "base": shlex.quote(base) + (f" --revision {facts.commit}" if facts.commit else ""),
        "base_text": python,
        "max_rank": "" if most is None else f" --max-lora-rank {most}",
    }


def _file(facts: Facts) -> str:
    """Return the file of weights that a runtime is given; the first part of a split model."""
    names = sorted(name for name, _ in weight_files(facts)) or sorted(
        name for name in facts.names if name.endswith(".gguf") and "/" not in name
    )
    names = [name for name in names if name != facts.carrier.beside]
    return printable(names[0]) if names else "model.gguf"


def folder(repo: str | None) -> str:
    """Return the folder that a download of the artifact is in, as the commands name it."""
    return "." if repo is None else repo.rpartition("/")[2]


def download(repo: str | None) -> str:
    """Return the command that fetches the artifact; empty where it has no repository."""
    return "" if repo is None else f"hf download {repo} --local-dir {folder(repo)}\n"
