"""Set bake up and run it: ``python3.11 run.py quickstart`` or ``python3.11 run.py tests``.

It needs Python 3.11 and pip, and nothing else. The environment is made once in ``.cache``, from
the pinned versions of ``constraints.txt``, and made anew when these or the dependencies change.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / ".cache"
OUT = ROOT / "out" / "quickstart"


def main() -> int:
    """Run one of the two jobs."""
    parser = argparse.ArgumentParser(description=__doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("quickstart", help="bake the quickstart model, verify it, and let it speak")
    tests = jobs.add_parser("tests", help="static checks, all tests, real runtimes and model")
    tests.add_argument("--quick", action="store_true", help="leave runtimes and real model out")
    arguments = parser.parse_args()
    if arguments.job == "quickstart":
        return quickstart()
    return run_tests(quick=arguments.quick)


def quickstart() -> int:
    """Plan, export and verify the quickstart recipe, and show what the edit does."""
    python = environment("main", extra="")
    bake = [str(python.with_name("bake"))]
    recipe = str(ROOT / "recipes" / "quickstart.toml")
    shutil.rmtree(OUT, ignore_errors=True)
    return steps(
        [*bake, "plan", recipe],
        [*bake, "export", recipe, "--out", str(OUT)],
        [*bake, "verify", str(OUT)],
        [str(python), str(ROOT / "recipes" / "quickstart" / "generate.py"), str(OUT)],
    )


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
        print("+", " ".join(command), flush=True)
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
