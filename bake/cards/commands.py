"""How to load each kind of artifact in each runtime, and whether that was tried."""

import json
import shlex
from dataclasses import dataclass

from bake.artifact.record import RECORD, VERIFICATION
from bake.cards import stored
from bake.cards.changes import gguf_digests, weight_files
from bake.cards.facts import Facts
from bake.cards.figures import DTYPES, NOT_MEASURED
from bake.cards.text import Markdown, escape, number, printable

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank
_HERE = "."


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
    """Return the commands of an artifact's kind.

    Args:
        facts: of the artifact.
        repo: its id on the Hub; its own folder where it has none yet.
    """
    makers = {
        "checkpoint": _checkpoint,
        "merge": _checkpoint,
        "lora": _lora,
        "gguf": _gguf,
        "gguf-lora": _gguf_lora,
        "control-vector": _control_vector,
    }
    return makers[facts.record.kind](facts, repo)


def _checkpoint(facts: Facts, repo: str | None) -> tuple[Command, ...]:
    here = repo or _HERE
    folder = _folder(repo)
    python = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(here)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(here)})\n"
    )
    convert = (
        f"{_download(repo)}python convert_hf_to_gguf.py {folder} --outfile model.gguf\n"
        "llama-server -m model.gguf\n"
    )
    ollama = "printf 'FROM ./model.gguf\\n' > Modelfile\nollama create edited -f Modelfile\n"
    after = " (converted to F32 by llama.cpp's own converter)"
    return (
        Command("transformers", "python", python, tried(facts, "transformers")),
        Command("vLLM", "sh", f"vllm serve {here}\n", tried(facts, "vllm")),
        Command("llama.cpp", "sh", convert, tried(facts, "llama.cpp", after)),
        Command("Ollama, after the conversion", "sh", ollama, tried(facts, "ollama")),
    )


def _lora(facts: Facts, repo: str | None) -> tuple[Command, ...]:
    here, base = repo or _HERE, facts.base_repo or printable(facts.record.base.model)
    pinned = ""
    if facts.base_repo is not None and facts.record.base.pinned:
        pinned = f", revision={json.dumps(facts.record.base.revision)}"
    python = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}{pinned})\n"
        f"model = PeftModel.from_pretrained(base, {json.dumps(here)})\n"
    )
    rank = stored.whole(facts.adapter, "r", "adapter_config.json")
    most = next((size for size in _RANKS if rank is not None and size >= rank), None)
    ranks = "" if most is None else f" --max-lora-rank {most}"
    at = f" --revision {facts.record.base.revision}" if pinned else ""
    serve = (
        f"vllm serve {shlex.quote(base)}{at} --enable-lora{ranks} --lora-modules edited={here}\n"
    )
    return (
        Command("PEFT", "python", python, tried(facts, "peft")),
        Command("vLLM", "sh", serve, tried(facts, "vllm")),
    )


def _gguf(facts: Facts, repo: str | None) -> tuple[Command, ...]:
    file = _file(facts)
    folder = _folder(repo)
    serve = f"{_download(repo)}llama-server -m {shlex.quote(f'{folder}/{file}')}\n"
    found = [Command("llama.cpp", "sh", serve, tried(facts, "llama.cpp"))]
    if "Modelfile" in facts.names:
        create = f"{_download(repo)}ollama create edited -f {folder}/Modelfile\n"
        found.append(Command("Ollama", "sh", create, tried(facts, "ollama")))
    return tuple(found)


def _gguf_lora(facts: Facts, repo: str | None) -> tuple[Command, ...]:
    folder = _folder(repo)
    adapter = shlex.quote(f"{folder}/{_file(facts)}")
    serve = f"{_download(repo)}llama-server -m base.gguf --lora {adapter}\n"
    lines = f"FROM ./base.gguf\\nADAPTER ./{folder}/{_file(facts)}\\n"
    ollama = f"printf {shlex.quote(lines)} > Modelfile\nollama create edited -f Modelfile\n"
    return (
        Command("llama.cpp, over the base in GGUF", "sh", serve, tried(facts, "llama.cpp")),
        Command("Ollama", "sh", ollama, tried(facts, "ollama")),
    )


def _control_vector(facts: Facts, repo: str | None) -> tuple[Command, ...]:
    vector = shlex.quote(f"{_folder(repo)}/{_file(facts)}")
    serve = f"{_download(repo)}llama-server -m base.gguf --control-vector {vector}\n"
    return (Command("llama.cpp, over the base in GGUF", "sh", serve, tried(facts, "llama.cpp")),)


def reproduce(facts: Facts, repo: str | None) -> str:
    """Return the command that makes the artifact again."""
    if facts.merged:
        return _merge(facts)
    needs = ""
    if base := gguf_digests(facts):
        needs = f" --gguf {shlex.quote(printable(base[0][0]))}"
    elif converter(facts):
        needs = " --llama-cpp llama.cpp"
    if repo is not None and facts.base_repo is not None:
        return f"bake export hf://{repo} --out again{needs}\n"
    to = "" if facts.record.kind == "checkpoint" else f" --to {facts.record.kind}"
    return f"bake export recipe.toml{to} --out again{needs}{_options(facts)}\n"


def _merge(facts: Facts) -> str:
    """Return the command that merges the same adapter into the same base."""
    name, revision = (stored.text(facts.merged, key, RECORD) for key in ("name", "revision"))
    adapter = f"{name}@{revision}" if revision else name
    base = facts.record.base.model
    if facts.base_repo is not None and facts.record.base.pinned:
        base = f"{facts.base_repo}@{facts.record.base.revision}"
    words = (shlex.quote(printable(word)) for word in (adapter, base))
    return f"bake merge {' '.join(words)} --out again\n"


def _options(facts: Facts) -> str:
    """Return the options of the export that decide the bytes, as the record has them."""
    found = stored.mapping(facts.content, "export", RECORD)
    parts = []
    for key, option, usual in (
        ("edited_type", "--edited-type", ""),
        ("rounding", "--rounding", "feedback"),
        ("outtype", "--outtype", "f16"),
    ):
        value = stored.text(found, key, RECORD)
        if value not in ("", usual):
            parts.append(f" {option} {shlex.quote(printable(value))}")
    return "".join(parts)


def undo(facts: Facts, repo: str | None) -> str:
    """Return the command that gives the base back, for an artifact that holds weights of it."""
    base = gguf_digests(facts)
    named = f" --base {shlex.quote(printable(base[0][0]))}" if base else ""
    out = "../base" if repo is None else "base"
    return f"{_download(repo)}bake revert {_folder(repo)}{named} --out {out}\n"


def download_base(facts: Facts) -> str:
    """Return the command that fetches the base at its commit; empty for a folder."""
    if facts.base_repo is None or not facts.record.base.pinned:
        return ""
    return (
        f"hf download {facts.base_repo} --revision {facts.record.base.revision} --local-dir base\n"
    )


def check(repo: str | None) -> str:
    """Return the commands that compare the files with their sums."""
    enter = "" if repo is None else f"cd {_folder(repo)}\n"
    return f"{enter}bake check .\nsha256sum -c SHA256SUMS\n"


def converter(facts: Facts) -> str:
    """Return what of llama.cpp converted a baked checkpoint; empty where nothing did."""
    gguf = stored.mapping(facts.content, "gguf", RECORD)
    name, outtype = (stored.text(gguf, key, RECORD) for key in ("converter", "outtype"))
    return f"{name} --outtype {outtype}" if name and outtype else ""


def _file(facts: Facts) -> str:
    """Return the file of weights that a runtime is given; the first part of a split model."""
    names = sorted(name for name, _ in weight_files(facts)) or sorted(
        name for name in facts.names if name.endswith(".gguf") and "/" not in name
    )
    return printable(names[0]) if names else "model.gguf"


def _folder(repo: str | None) -> str:
    return _HERE if repo is None else repo.rpartition("/")[2]


def _download(repo: str | None) -> str:
    return "" if repo is None else f"hf download {repo} --local-dir {_folder(repo)}\n"


def tried(facts: Facts, runtime: str, how: str = "") -> Markdown:
    """Return what the record says of an artifact in a runtime: a measurement, or none.

    Args:
        facts: of the artifact.
        runtime: as ``verify.json`` names it.
        how: what was done to the files before they were loaded, as Markdown.
    """
    records = (
        ()
        if facts.verification is None
        else stored.objects(facts.verification, "runtimes", VERIFICATION)
    )
    for record in records:
        if stored.text(record, "runtime", VERIFICATION) != runtime:
            continue
        status = stored.text(record, "status", VERIFICATION)
        if status not in ("passed", "measured", "failed"):
            continue
        numbers = stored.mapping(record, "numbers", VERIFICATION)
        value = stored.number(numbers, f"{runtime}: max |Δlog p|, served − hooked", VERIFICATION)
        largest = NOT_MEASURED if value is None else f"{number(float(value))} nats"
        version = escape(stored.text(record, "version", VERIFICATION))
        said = {"passed": "Tested", "measured": "Measured", "failed": "**Failed**"}[status]
        return Markdown(
            f"{said} with {escape(runtime)} {version}{how}: log-probabilities differ from the "
            f"hooked base by {largest} at most."
        )
    if runtime == "transformers" and _compared(facts):
        return Markdown(
            "Loaded by `bake verify`, which compared it with the hooks: see "
            "[Verification](#verification)."
        )
    return Markdown("Not tested." + _expected(facts, runtime))


def _compared(facts: Facts) -> bool:
    """Whether these files were run in transformers, in the storage type, beside the hooks."""
    found = facts.verification
    if found is None or facts.record.kind not in ("checkpoint", "merge"):
        return False
    dtype = DTYPES.get(stored.text(found, "dtype", VERIFICATION), "")
    return dtype in stored.mapping(found, "metrics", VERIFICATION)


def _expected(facts: Facts, runtime: str) -> str:
    """Return what the plan says of a runtime that nobody tried."""
    for found in verdicts(facts):
        if found.runtime == runtime:
            if found.status == "exact":
                return " The plan says that it serves the edit exactly."
            if found.status == "loads":
                return " The plan says that it loads."
            status = "" if found.status == "not tested" else f"{escape(found.status)}, "
            return f" The plan says: {status}{escape(found.reason)}."
    return ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the plan says of a runtime, as the record has it."""

    runtime: str
    status: str
    reason: str


def verdicts(facts: Facts) -> tuple[Verdict, ...]:
    """Return what the plan says of each runtime."""
    return tuple(
        Verdict(*(stored.text(found, key, RECORD) for key in ("runtime", "status", "reason")))
        for found in stored.objects(facts.plan, "runtimes", RECORD)
    )
