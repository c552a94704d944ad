"""How a runtime is told to load a carrier: the commands that cards print and the docs show.

The words in braces are filled in for one artifact: ``here`` is its id on the Hub or its folder,
``folder`` and ``file`` where its weights are once it is downloaded, which ``download`` does,
``base`` the model that an adapter goes over, and ``loader`` the class of transformers that loads
it. ``bake.cards.commands`` quotes each for its language.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Loading:
    """One way to load an artifact.

    Attributes:
        runtime: as ``verify.json`` names it.
        title: for people.
        language: of the code.
        code: what to run.
        how: what is done to the files first, to follow "tested with" the runtime.
        needs: the file of the artifact without which there is no such command.
    """

    runtime: str
    title: str
    language: str
    code: str
    how: str = ""
    needs: str | None = None


_OVER_BASE = "llama.cpp, over the base in GGUF"

CHECKPOINT = (
    Loading(
        "transformers",
        "transformers",
        "python",
        "from transformers import {loader}, AutoTokenizer\n\n"
        "model = {loader}.from_pretrained({here_text})\n"
        "tokenizer = AutoTokenizer.from_pretrained({here_text})\n",
    ),
    Loading("vllm", "vLLM", "sh", "vllm serve {here}\n"),
    Loading(
        "llama.cpp",
        "llama.cpp",
        "sh",
        "{download}python convert_hf_to_gguf.py {folder} --outfile model.gguf\n"
        "llama-server -m model.gguf\n",
        how=" (converted to F32 by llama.cpp's own converter)",
    ),
    Loading(
        "ollama",
        "Ollama, after the conversion",
        "sh",
        "printf 'FROM ./model.gguf\\n' > Modelfile\nollama create edited -f Modelfile\n",
    ),
)
LORA = (
    Loading(
        "peft",
        "PEFT",
        "python",
        "from peft import PeftModel\nfrom transformers import {loader}\n\n"
        "base = {loader}.from_pretrained({base_text})\n"
        "model = PeftModel.from_pretrained(base, {here_text})\n",
    ),
    Loading(
        "vllm",
        "vLLM",
        "sh",
        "vllm serve {base} --enable-lora{max_rank} --lora-modules edited={here}\n",
    ),
)
GGUF = (
    Loading("llama.cpp", "llama.cpp", "sh", "{download}llama-server -m {weights}\n"),
    Loading(
        "ollama",
        "Ollama",
        "sh",
        "{download}ollama create edited -f {folder}/Modelfile\n",
        needs="Modelfile",
    ),
)
GGUF_LORA = (
    Loading(
        "llama.cpp", _OVER_BASE, "sh", "{download}llama-server -m {base_gguf} --lora {weights}\n"
    ),
    Loading(
        "ollama",
        "Ollama",
        "sh",
        "printf {modelfile} > Modelfile\nollama create edited -f Modelfile\n",
    ),
)
CONTROL_VECTOR = (
    Loading(
        "llama.cpp",
        _OVER_BASE,
        "sh",
        "{download}llama-server -m base.gguf --control-vector {weights}\n",
    ),
)
