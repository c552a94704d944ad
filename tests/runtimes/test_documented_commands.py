"""The commands of README.md and docs/ for each carrier, run as they stand.

Every command is found in the text, and one that no handler knows fails. Paths are as documented: an
artifact that `bake export` has made lies where the command looks for it. What is added are options
that a test needs: a port, float32, and small limits. `llama-server` is llama.cpp's own parser and
server without the program, which the package xllamacpp does not bring. Ollama is not installed: of
it, the Modelfiles are read. What concerns no runtime (merge, check, push) is parsed, not run.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import peft_warnings
from install import GgufConverter
from reference import Reference, first_disagreement, largest_difference, reference_logprobs
from safetensors.torch import load_file, save_file
from subject import EFFECT, TOLERANCE, answered_by_server
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bake.checkpoints import open_checkpoint
from bake.cli import main
from bake.converter import convert
from bake.process import RuntimeFailed, run_script
from bake.steer import steered
from bake.verify.artifact import open_baked
from bake.verify.models import layout_of
from bake.verify.runtimes.exchange import ask
from bake.verify.runtimes.llamacpp import LLAMA_CPP
from bake.verify.runtimes.request import RuntimeRequest, RuntimeResult

pytestmark = pytest.mark.runtimes

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 16
PROGRAMS = ("vllm", "llama-server", "convert_hf_to_gguf.py", "ollama", "bake export", "bake")
PYTHON = ("AutoModelForCausalLM.", "PeftModel.", "from peft", "from transformers")
FOUND = {"README.md": 9, "docs/carriers.md": 5, "docs/gguf.md": 3}  # at least so many


# --- what is documented --------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """One documented command, snippet or Modelfile."""

    page: str
    text: str

    @property
    def program(self) -> str:
        """The handler's name."""
        first = self.text.strip()
        if first.startswith(PYTHON):
            return "python"
        if first.startswith("FROM "):
            return "modelfile"
        command = first.removeprefix("cd out && ")
        return next((name for name in PROGRAMS if command.startswith(f"{name} ")), "unknown")


def commands(page: str) -> list[Command]:
    """Return what a page tells its reader to run, for a carrier's sake."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        if language == "sh":
            found += block.splitlines()
        elif language == "python" and "from_pretrained" in block:
            found.append(block)
        elif block.startswith("FROM "):
            found.append(block)
    for line in re.findall(r"^\|.*\|$", text, re.M):
        for code in re.findall(r"`([^`]+)`", line):
            if code.startswith((*(f"{p} " for p in PROGRAMS), *PYTHON)) and "…" not in code:
                found.append(code)
    return [Command(page, code) for code in dict.fromkeys(found)]


DOCUMENTED = [command for page in FOUND for command in commands(page)]


def test_every_page_has_its_commands() -> None:
    for page, least in FOUND.items():
        assert len([command for command in DOCUMENTED if command.page == page]) >= least, page
    assert [command for command in DOCUMENTED if command.program == "unknown"] == []
    ways = {command.program for command in DOCUMENTED}
    assert ways == {*PROGRAMS, "python", "modelfile"}


# --- what they are run on ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DocumentedArtifacts:
    """The quickstart's model with a head of its own, its artifacts, and its hooked answers."""

    folder: Path
    prompts: tuple[tuple[int, ...], ...]
    vocab: int
    plain: Reference
    hooked: dict[str, Reference]
    """By recipe: `affine`, and `offset` for the control vector."""

    def request(self, model: Path) -> RuntimeRequest:
        return RuntimeRequest(model, self.prompts, NEW_TOKENS, self.vocab, "float32")

    def check(self, found: RuntimeResult | Reference, recipe: str = "affine") -> None:
        """The command serves the edit, and that is not the base."""
        assert largest_difference(self.hooked[recipe], found) <= TOLERANCE
        assert first_disagreement(self.hooked[recipe], found, TOLERANCE) is None
        assert largest_difference(self.plain, found) > EFFECT


def bake(*words: str | Path, cwd: Path) -> None:
    subprocess.run([sys.executable, "-m", "bake", *map(str, words)], cwd=cwd, check=True)


def untied(source: Path, target: Path) -> None:
    """Copy the model with its head stored for itself: llama.cpp takes no adapter of a tied one."""
    target.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        elif not path.name.endswith("index.json"):
            shutil.copy(path, target)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


RECIPE = """
[base]
model = "BASE"
[directions.mood]
file = "mood.safetensors"
layer = 2
[[edits]]
direction = "mood"
"""
EDITS = {
    "affine": 'kind = "affine"\nat = "resid"\nalpha = 2.0\n',
    "offset": 'kind = "offset"\nat = "resid_post.2"\ncoefficient = 1.5\n',
}


@pytest.fixture(scope="module")
def documented(
    gguf_converter: GgufConverter, tmp_path_factory: pytest.TempPathFactory
) -> DocumentedArtifacts:
    """Export every carrier as a user does."""
    folder = tmp_path_factory.mktemp("documented")
    quickstart = ROOT / "recipes" / "quickstart"
    untied(quickstart / "model", folder / "BASE")
    shutil.copy(quickstart / "mood.safetensors", folder)
    for name, edit in EDITS.items():
        (folder / f"{name}.toml").write_text(RECIPE + edit, encoding="utf-8")
    script, python = gguf_converter.script, gguf_converter.python
    convert(folder / "BASE", folder / "base.gguf", converter=script, python=python)
    for carrier in ("checkpoint", "lora", "gguf-lora"):
        bake("export", "affine.toml", "--to", carrier, "--out", carrier, "-q", cwd=folder)
    bake(
        "export", "offset.toml", "--to", "control-vector", "--out", "control-vector", "-q",
        cwd=folder,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "BASE", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "BASE")
    texts = (quickstart / "prompts.txt").read_text(encoding="utf-8").splitlines()[:3]
    prompts = tuple(tuple(tokenizer(text).input_ids) for text in texts)
    layout = layout_of(open_checkpoint(folder / "BASE"))
    hooked = {}
    for recipe, carrier in (("affine", "checkpoint"), ("offset", "control-vector")):
        with steered(model, layout, open_baked(folder / carrier).edits):
            hooked[recipe] = answers(model, prompts)
    vocab = int(model.config.vocab_size)
    return DocumentedArtifacts(folder, prompts, vocab, answers(model, prompts), hooked)


def answers(model: PreTrainedModel, prompts: tuple[tuple[int, ...], ...]) -> Reference:
    return reference_logprobs(model, prompts, NEW_TOKENS)


def laid_out(documented: DocumentedArtifacts, artifacts: dict[str, str], cwd: Path) -> None:
    """Give a working directory the base, the recipe, and artifacts where a command seeks them."""
    for name in ("BASE", *artifacts):
        target = cwd / artifacts.get(name, name)
        shutil.copytree(documented.folder / name, target, dirs_exist_ok=True)
    for name in ("base.gguf", "base.Q4_K_M.gguf"):
        shutil.copy(documented.folder / "base.gguf", cwd / name)
    shutil.copy(documented.folder / "affine.toml", cwd / "recipe.toml")
    shutil.copy(documented.folder / "mood.safetensors", cwd)


def path_in(text: str, pattern: str) -> str:
    """Return the path that a command has at a place."""
    found = re.search(pattern, text)
    assert found is not None, text
    return found[1]


# --- transformers and PEFT -----------------------------------------------------------------------


def run_python(
    command: Command, documented: DocumentedArtifacts, cwd: Path, tools: "Tools"
) -> None:
    """Execute the snippet in the folder; what it ends with is the model."""
    is_lora = "PeftModel" in command.text
    pattern = r'PeftModel\.from_pretrained\(model, "([^"]+)"\)' if is_lora else r'"([^"]+)"'
    laid_out(documented, {"lora" if is_lora else "checkpoint": path_in(command.text, pattern)}, cwd)
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(cwd / "BASE")
    names: dict[str, Any] = {
        "model": model,
        "PeftModel": PeftModel,
        "AutoModelForCausalLM": AutoModelForCausalLM,
    }
    lines = command.text.strip().splitlines()
    if " = " not in lines[-1]:
        lines[-1] = f"model = {lines[-1]}"
    with pytest.MonkeyPatch.context() as patch, peft_warnings():
        patch.chdir(cwd)
        exec("\n".join(lines), names)
    documented.check(answers(names["model"].eval(), documented.prompts))


# --- vLLM ----------------------------------------------------------------------------------------


def run_vllm(command: Command, documented: DocumentedArtifacts, cwd: Path, tools: "Tools") -> None:
    words = shlex.split(command.text)
    if "--lora-modules" in words:
        name, path = words[words.index("--lora-modules") + 1].split("=")
        laid_out(documented, {"lora": path}, cwd)
    else:
        name = words[2]
        laid_out(documented, {"checkpoint": name}, cwd)
    with vllm_server(words[1:], tools.vllm, cwd) as address:
        check_completions(address, name, documented)


@contextmanager
def vllm_server(words: list[str], python: Path, cwd: Path) -> Iterator[str]:
    """Run `vllm serve` on a free port of this machine until it is asked no more."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    small = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "128"]
    small += ["--host", "127.0.0.1", "--port", str(port)]
    script = Path(__file__).with_name("vllm_cli.py")
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | quiet | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("PYTHONPATH", None)
    with (cwd / "vllm.log").open("w") as log:
        server = subprocess.Popen(
            [python, "-I", script, *words, *small],
            cwd=cwd, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, cwd / "vllm.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    """Press Ctrl-C, for the server to end its own processes; in half a minute they are killed."""
    server.send_signal(signal.SIGINT)
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with opener.open(address):
                return
        except urllib.error.URLError:
            time.sleep(0.2)
    pytest.fail(f"vllm serve gave no answer:\n{log.read_text(encoding='utf-8')[-2000:]}")


def check_completions(address: str, model: str, documented: DocumentedArtifacts) -> None:
    """Ask /v1/completions for greedy text: the tokens and the log-probability of each."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    hooked = documented.hooked["affine"]
    for i, prompt in enumerate(documented.prompts):
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
        }
        request = urllib.request.Request(
            f"{address}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with opener.open(request) as answer:
            found = json.load(answer)["choices"][0]["logprobs"]
        tokens = tuple(int(token.removeprefix("token_id:")) for token in found["tokens"])
        assert tokens == hooked.greedy[i]
        first, last = found["token_logprobs"][0], len(prompt) - 1
        assert abs(first - hooked.prompt_logprobs[i][last, tokens[0]]) <= TOLERANCE
        assert tokens != documented.plain.greedy[i]


# --- llama.cpp -----------------------------------------------------------------------------------


def run_llama_server(
    command: Command, documented: DocumentedArtifacts, cwd: Path, tools: "Tools"
) -> None:
    words, recipe = shlex.split(command.text)[1:], "affine"
    if "--lora" in words:
        laid_out(documented, {"gguf-lora": str(Path(words[words.index("--lora") + 1]).parent)}, cwd)
    elif "--control-vector" in words:
        path = Path(words[words.index("--control-vector") + 1])
        laid_out(documented, {"control-vector": str(path.parent)}, cwd)
        recipe = "offset"
    else:
        file = Path(words[words.index("-m") + 1])
        laid_out(documented, {}, cwd)
        export = ["export", "recipe.toml", "--to", "gguf", "--gguf", file.name]
        bake(*export, "--out", file.parent, "-q", cwd=cwd)
    documented.check(llama_server(words, documented, cwd, tools.llamacpp), recipe)


def llama_server(
    words: list[str], documented: DocumentedArtifacts, cwd: Path, python: Path
) -> RuntimeResult:
    """Start llama.cpp's server with a command line that its own parser reads."""
    return answered_by_server(documented.request(cwd), words, python, cwd)


def run_converter(
    command: Command, documented: DocumentedArtifacts, cwd: Path, tools: "Tools"
) -> None:
    words = shlex.split(command.text)
    laid_out(documented, {"checkpoint": words[1]}, cwd)
    chosen = ["--outtype", "f32", "--outfile", "served.gguf"]
    script = tools.converter.script
    assert script.name == words[0]
    subprocess.run([tools.converter.python, script, *words[1:], *chosen], cwd=cwd, check=True)
    documented.check(ask(LLAMA_CPP, documented.request(cwd / "served.gguf"), tools.llamacpp))


# --- bake, and Ollama's files --------------------------------------------------------------------


def run_bake(command: Command, documented: DocumentedArtifacts, cwd: Path, tools: "Tools") -> None:
    """Both ways to a GGUF; the checkout of llama.cpp is a folder with its converter."""
    words = shlex.split(command.text, comments=True)[1:]
    if words[words.index("--to") + 1] != "gguf":
        parse_bake(command, documented, cwd, tools)
        return
    laid_out(documented, {}, cwd)
    if "--llama-cpp" in words:
        place = cwd / words[words.index("--llama-cpp") + 1]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(tools.converter.script.parent)
        words += ["--outtype", "f32"]
    bake(*words, "-q", cwd=cwd)
    out = cwd / words[words.index("--out") + 1]
    (file,) = out.glob("*.gguf")
    documented.check(ask(LLAMA_CPP, documented.request(file), tools.llamacpp))
    check_modelfile(out / "Modelfile")


def parse_bake(
    command: Command, documented: DocumentedArtifacts, cwd: Path, tools: "Tools"
) -> None:
    """bake's other commands have tests of their own: here its own parser reads what is written."""
    words = shlex.split(command.text, comments=True)[1:]
    with main.make_context("bake", list(words)) as context:
        name, found, rest = main.resolve_command(context, list(words))
        assert name is not None and found is not None
        found.make_context(name, rest, parent=context)


def run_ollama(
    command: Command, documented: DocumentedArtifacts, cwd: Path, tools: "Tools"
) -> None:
    """The file that `ollama create` is pointed at is there and names files that are there."""
    laid_out(documented, {}, cwd)
    export = ["export", "recipe.toml", "--to", "gguf", "--gguf", "base.gguf", "--out", "out"]
    bake(*export, "-q", cwd=cwd)
    folder, _, words = command.text.rpartition(" && ")
    given = words.split()
    assert given[:2] == ["ollama", "create"] and given[3] == "-f"
    check_modelfile(cwd / folder.removeprefix("cd ") / given[4])


def run_modelfile(
    command: Command, documented: DocumentedArtifacts, cwd: Path, tools: "Tools"
) -> None:
    path = path_in(command.text, r"ADAPTER \./(\S+)/lora\.gguf")
    laid_out(documented, {"gguf-lora": path}, cwd)
    (cwd / "Modelfile").write_text(command.text, encoding="utf-8")
    check_modelfile(cwd / "Modelfile")


def check_modelfile(path: Path) -> None:
    """Every line is an instruction, and the files that it names exist beside the Modelfile."""
    lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line[0].startswith("#")]
    assert [name for name, _ in lines][:1] == ["FROM"]
    for name, value in lines:
        assert name in ("FROM", "ADAPTER")
        assert (path.parent / value).read_bytes()[:4] == b"GGUF"


def test_a_misspelt_option_is_refused(
    documented: DocumentedArtifacts, vllm_python: Path, llamacpp_python: Path, tmp_path: Path
) -> None:
    """The control of all the others: the runtimes' own parsers read what is documented."""
    laid_out(documented, {"gguf-lora": "out"}, tmp_path)
    with pytest.raises(RuntimeFailed, match="invalid argument: --lorra"):
        llama_server(
            ["-m", "base.gguf", "--lorra", "out/lora.gguf"], documented, tmp_path, llamacpp_python
        )
    script = Path(__file__).with_name("vllm_cli.py")
    words = ["serve", "BASE", "--enable-lorra"]
    with pytest.raises(RuntimeFailed, match="unrecognized arguments: --enable-lorra"):
        run_script(
            "vllm", vllm_python, ["-I", script, *words], folder=tmp_path, timeout=300, variables={}
        )


# --- all of them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tools:
    """The runtimes' interpreters."""

    vllm: Path
    llamacpp: Path
    converter: GgufConverter


HANDLERS: dict[str, Callable[[Command, DocumentedArtifacts, Path, Tools], None]] = {
    "python": run_python,
    "vllm": run_vllm,
    "llama-server": run_llama_server,
    "convert_hf_to_gguf.py": run_converter,
    "bake export": run_bake,
    "bake": parse_bake,
    "ollama": run_ollama,
    "modelfile": run_modelfile,
}


@pytest.mark.parametrize("command", DOCUMENTED, ids=lambda c: f"{c.page}: {c.text.splitlines()[0]}")
def test_documented_command(
    command: Command,
    documented: DocumentedArtifacts,
    vllm_python: Path,
    llamacpp_python: Path,
    gguf_converter: GgufConverter,
    tmp_path: Path,
) -> None:
    tools = Tools(vllm_python, llamacpp_python, gguf_converter)
    HANDLERS[command.program](command, documented, tmp_path, tools)
