"""The commands of a card: to load an artifact, to make it again, to undo it and to check it."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from bake.artifact.carrier import vllm_room
from bake.cards.changes import gguf_digests, weight_files
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
    here, folder, file = repo or ".", _folder(repo), _file(facts)
    base = facts.base_repo or printable(facts.record.base.model)
    python = json.dumps(base) + (f", revision={json.dumps(facts.commit)}" if facts.commit else "")
    rank = None if facts.adapter is None else facts.adapter.r
    most = None if rank is None else vllm_room(rank)
    return {
        "here": here,
        "here_text": json.dumps(here),
        "folder": folder,
        "download": _download(repo),
        "weights": shlex.quote(f"{folder}/{file}"),
        "modelfile": shlex.quote(f"FROM ./base.gguf\\nADAPTER ./{folder}/{file}\\n"),
        "base": shlex.quote(base) + (f" --revision {facts.commit}" if facts.commit else ""),
        "base_text": python,
        "max_rank": "" if most is None else f" --max-lora-rank {most}",
    }


def reproduce(facts: Facts, repo: str | None) -> str:
    """Return the command that makes the artifact again."""
    if (adapter := facts.record.adapter) is not None:
        name = f"{adapter.name}@{adapter.revision}" if adapter.revision else adapter.name
        base = f"{facts.base_repo}@{facts.commit}" if facts.commit else facts.record.base.model
        words = (shlex.quote(printable(word)) for word in (name, base))
        return f"bake merge {' '.join(words)} --out again\n"
    needs = ""
    if base_files := gguf_digests(facts):
        needs = f" --gguf {shlex.quote(printable(base_files[0][0]))}"
    elif converter(facts):
        needs = " --llama-cpp llama.cpp"
    if repo is not None and facts.base_repo is not None:
        return f"bake export hf://{repo} --out again{needs}\n"
    to = "" if facts.carrier.checkpoint else f" --to {facts.record.kind}"
    return f"bake export recipe.toml{to} --out again{needs}{_options(facts)}\n"


def _options(facts: Facts) -> str:
    """Return the options of the export that decide the bytes, as the record has them."""
    found = {} if facts.record.export is None else facts.record.export.to_json()
    parts = []
    for key, option, usual in (
        ("edited_type", "--edited-type", None),
        ("rounding", "--rounding", "feedback"),
        ("outtype", "--outtype", "f16"),
    ):
        if found.get(key) not in (None, "", usual):
            parts.append(f" {option} {shlex.quote(printable(found[key]))}")
    return "".join(parts)


def undo(facts: Facts, repo: str | None) -> str:
    """Return the command that gives the base back, for an artifact that holds weights of it."""
    base = gguf_digests(facts)
    named = f" --base {shlex.quote(printable(base[0][0]))}" if base else ""
    out = "../base" if repo is None else "base"
    return f"{_download(repo)}bake revert {_folder(repo)}{named} --out {out}\n"


def download_base(facts: Facts) -> str:
    """Return the command that fetches the base at its commit; empty for a folder."""
    if facts.commit is None:
        return ""
    return f"hf download {facts.base_repo} --revision {facts.commit} --local-dir base\n"


def check(repo: str | None) -> str:
    """Return the commands that compare the files with their sums."""
    enter = "" if repo is None else f"cd {_folder(repo)}\n"
    return f"{enter}bake check .\nsha256sum -c SHA256SUMS\n"


def converter(facts: Facts) -> str:
    """Return what of llama.cpp converted a baked checkpoint; empty where nothing did."""
    gguf = facts.record.gguf
    if gguf is None or not gguf.converter or not gguf.outtype:
        return ""
    return f"{gguf.converter} --outtype {gguf.outtype}"


def _file(facts: Facts) -> str:
    """Return the file of weights that a runtime is given; the first part of a split model."""
    names = sorted(name for name, _ in weight_files(facts)) or sorted(
        name for name in facts.names if name.endswith(".gguf") and "/" not in name
    )
    return printable(names[0]) if names else "model.gguf"


def _folder(repo: str | None) -> str:
    return "." if repo is None else repo.rpartition("/")[2]


def _download(repo: str | None) -> str:
    return "" if repo is None else f"hf download {repo} --local-dir {_folder(repo)}\n"


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
