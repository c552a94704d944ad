"""Make the records of the example cards anew: export the quickstart, verify it, render its cards.

    python model_cards/make_examples.py --vllm PYTHON --llama-cpp PYTHON --converter FILE

The records hold what was measured on this machine; ``tests/test_card.py`` renders the cards from
them again and compares.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = Path(__file__).parent / "examples"
RECIPE = Path("recipes/quickstart.toml")
PROMPTS = Path("recipes/quickstart/prompts.txt")
KEPT = ("bake.json", "verify.json", "verify.md", "README.md", "Modelfile", "adapter_config.json")


def main() -> None:
    """Write the three examples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", type=Path, required=True, help="Python of vLLM's environment")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="Python with xllamacpp")
    parser.add_argument("--converter", type=Path, required=True, help="convert_hf_to_gguf.py")
    given = parser.parse_args()
    # Beside the recipes: the record tells the base's folder from the artifact's.
    with tempfile.TemporaryDirectory(prefix=".examples-", dir=ROOT) as name:
        folder = Path(name)
        base = folder / "storyteller.gguf"
        model = ROOT / "recipes/quickstart/model"
        call(given.converter, model, "--outtype", "f32", "--outfile", base)
        outs = {kind: folder / kind / f"out-{kind}" for kind in ("checkpoint", "adapter", "gguf")}
        bake("export", RECIPE, "--out", outs["checkpoint"])
        bake("export", RECIPE, "--to", "lora", "--out", outs["adapter"])
        bake("export", RECIPE, "--to", "gguf", "--gguf", base, "--out", outs["gguf"])
        served = {
            "checkpoint": ("transformers", "vllm", "llama.cpp"),
            "adapter": ("peft", "vllm"),
            "gguf": ("llama.cpp",),
        }
        pythons = {"vllm": given.vllm, "llama.cpp": given.llama_cpp}
        for kind, out in outs.items():
            options: list[object] = []
            for runtime in served[kind]:
                options += ["--runtime", runtime]
                if runtime in pythons:
                    options += ["--python", f"{runtime}={pythons[runtime]}"]
            if kind == "checkpoint":
                options += ["--converter", given.converter]
                options += ["--score", "contains:happy", "--score", "contains:sad"]
                options += ["--generate", 48]  # a story's mood is seldom in its first words
            if kind == "gguf":
                options += ["--gguf", base]
            bake("verify", out, "--prompts", PROMPTS, *options)
            bake("card", out)
            keep(out, EXAMPLES / kind)


def keep(out: Path, example: Path) -> None:
    """Copy the records, the card and its plots."""
    shutil.rmtree(example, ignore_errors=True)
    example.mkdir(parents=True)
    for name in KEPT:
        if (out / name).is_file():
            shutil.copyfile(out / name, example / name)
    if (out / "plots").is_dir():
        shutil.copytree(out / "plots", example / "plots")


def bake(*words: object) -> None:
    """Run a command of bake, in the root of the repository."""
    call("-m", "bake", *words)


def call(*words: object) -> None:
    """Run Python; stop where it fails."""
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
