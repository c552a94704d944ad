"""Set bake up and run it: ``python3.11 run.py quickstart``, ``demo`` or ``tests``.

It needs Python 3.11 and pip, and nothing else. The environment is made once in ``.cache``, from
the pinned versions of ``constraints.txt``, and made anew when these or the dependencies change.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / ".cache"
OUT = ROOT / "out"
SAD = (
    "One day, Carl the boy and his brother set out for the mountain. It was a rainy day.",
    "Long ago, a sailor named Simon came to the library. It was a snowy afternoon.",
)
"""Beginnings that the story model goes on with sadly, of recipes/quickstart/prompts.txt."""
QUESTIONS = (
    "How was your weekend?",
    "Describe the sea in two sentences.",
    "What is the capital of France?",
)
STRONGER = ("--set", "edits.0.coefficient=2")


def main() -> int:
    """Run one of the jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("quickstart", help="bake the quickstart model, verify it, and let it speak")
    jobs.add_parser("demo", help="fetch a real model, fit a mood to it, bake, verify and ask it")
    tests = jobs.add_parser("tests", help="static checks, all tests, real runtimes and model")
    tests.add_argument("--quick", action="store_true", help="leave runtimes and real model out")
    arguments = parser.parse_args()
    if arguments.job == "quickstart":
        return quickstart()
    if arguments.job == "demo":
        return demo()
    return run_tests(quick=arguments.quick)


def quickstart() -> int:
    """Plan, export and verify the quickstart recipe, and show what the edit does."""
    bake, out = program(), fresh("quickstart")
    recipe, baked = str(ROOT / "recipes" / "quickstart.toml"), str(out / "model")
    return steps(
        [bake, "plan", recipe],
        [bake, "export", recipe, "--out", baked],
        [bake, "verify", baked],
        [bake, "try", baked, *SAD],
    )


def demo() -> int:
    """Fit a mood to a real instruct model, bake and verify it, and show what it says."""
    bake, out = program(), fresh("demo")
    mood, model = ROOT / "recipes" / "mood", CACHE / "smollm2"
    recipe, baked = str(out / "mood.toml"), str(out / "checkpoint")
    fetch = [str(Path(bake).with_name("python")), str(mood / "fetch_smollm2.py"), str(model)]
    classes = ["--positive", str(mood / "happy.jsonl"), "--negative", str(mood / "sad.jsonl")]
    fitted = ["--concept", "mood", "--out", str(out / "mood.safetensors")]
    gguf = ["--to", "gguf", "--gguf", str(model / "SmolLM2-135M-Instruct.Q4_1.gguf")]
    return steps(
        fetch,
        [bake, "fit", str(model / "checkpoint"), *classes, *fitted],
        [bake, "try", recipe, *STRONGER, QUESTIONS[0]],
        [bake, "export", recipe, *STRONGER, "--out", baked],
        [bake, "export", recipe, *STRONGER, *gguf, "--out", str(out / "gguf")],
        [bake, "verify", baked],
        [bake, "try", baked, *QUESTIONS],
    )


def program() -> str:
    """Return the command bake of an environment that has it."""
    return str(environment("main", extra="[plots]").with_name("bake"))


def fresh(name: str) -> Path:
    """Return an empty folder for what a job writes."""
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run_tests(*, quick: bool) -> int:
    """Run every check that continuous integration runs."""
    # What is compiled is kept: without, every process compiles the tests and bake anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # repeng pins numpy<2, which nothing of it that the tests use needs.
    python = str(environment("tests", extra="[test]", alone=("repeng",)))
    pytest = [python, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-q"]
    # All in one session: the short tests fill the time of the worker that a long one leaves idle.
    return steps(
        [python, "-m", "ruff", "check", "."],
        [python, "-m", "ruff", "format", "--check", "."],
        [python, "-m", "mypy"],
        pytest if quick else [*pytest, "-m", "not network and not gpu"],
    )


def steps(*commands: list[str]) -> int:
    """Run commands one after another; return the first exit code that is not zero."""
    for command in commands:
        print("+", shlex.join(command), flush=True)
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
    return 0


def environment(name: str, *, extra: str, alone: tuple[str, ...] = ()) -> Path:
    """Return the Python of an environment that holds bake and its pinned dependencies.

    Args:
        name: of the environment.
        extra: the optional dependencies of bake to install, for example ``[test]``.
        alone: further packages, installed without their own dependencies.
    """
    folder = CACHE / name
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    wanted = hashlib.sha256(sys.version.encode() + extra.encode())
    for file in ("constraints.txt", "pyproject.toml"):
        wanted.update((ROOT / file).read_bytes())
    stamp = folder / "bake-stamp"
    if stamp.is_file() and stamp.read_text() == wanted.hexdigest():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    # torch goes first, so that its pinned build is there when other packages ask for it.
    stages = [["torch"], ["-e", f"{ROOT}{extra}"], *(["--no-deps", name] for name in alone)]
    for packages in stages:
        print("+ pip install", *packages, flush=True)
        subprocess.run([*pip, *packages], check=True)
    stamp.write_text(wanted.hexdigest())
    return python


if __name__ == "__main__":
    sys.exit(main())
