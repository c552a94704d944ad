"""Install what the runtime tests run: vLLM, llama.cpp and its converter, and steering packages.

    python tests/runtimes/install.py [--cache DIR] [vllm | llamacpp | converter | steering ...]

It needs Python's standard library and pip, and where pip finds packages is pip's own configuration
(on a machine that has no other source of torch's CPU build, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS
names one). Each part is a folder of the cache. Its stamp holds the digests of its requirements and
of this file, and the Python that made it. A part without a fitting stamp is made anew.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
STAMP = "installed.json"
CONVERTER_PARTS = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")


@dataclass(frozen=True, slots=True)
class GgufConverter:
    """llama.cpp's converter script, and a Python that has what the script imports."""

    script: Path
    python: Path
    """With torch, transformers, sentencepiece and protobuf: bake's own test environment will do."""


def default_cache() -> Path:
    """`$BAKE_TEST_CACHE`, or `.cache/runtimes` in the repository."""
    chosen = os.environ.get("BAKE_TEST_CACHE")
    return Path(chosen).resolve() if chosen else HERE.parents[1] / ".cache" / "runtimes"


def vllm_python(cache: Path) -> Path:
    """The interpreter of vLLM's environment, installed when it is not there."""
    return ensure(cache, "vllm", make_vllm) / "bin" / "python"


def llamacpp_python(cache: Path) -> Path:
    """The interpreter of llama.cpp's environment, installed when it is not there."""
    return ensure(cache, "llamacpp", make_llamacpp) / "bin" / "python"


def converter(cache: Path) -> Path:
    """llama.cpp's `convert_hf_to_gguf.py` with its modules beside it, fetched when not there."""
    return ensure(cache, "converter", make_converter) / "convert_hf_to_gguf.py"


def steering_python(cache: Path) -> Path:
    """The interpreter of the steering packages' environment, installed when it is not there."""
    return ensure(cache, "steering", make_steering) / "bin" / "python"


PARTS = {
    "vllm": vllm_python,
    "llamacpp": llamacpp_python,
    "converter": converter,
    "steering": steering_python,
}


def ensure(cache: Path, name: str, make: Callable[[Path, Path], None]) -> Path:
    """The part's folder. Two processes that ask at once install it once."""
    requirements = HERE / f"{name}-requirements.txt"
    stamp = {
        "requirements": hashlib.sha256(requirements.read_bytes()).hexdigest(),
        "recipe": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "python": sys.version,
    }
    folder = cache / name
    with locked(cache / f"{name}.lock"):
        if stamp_of(folder) == stamp:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        make(folder, requirements)
        # subtle: the stamp comes last, so an interrupted installation has none and is made anew.
        (folder / STAMP).write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    return folder


def stamp_of(folder: Path) -> dict[str, str] | None:
    path = folder / STAMP
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file; the system lets go of it when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_vllm(folder: Path, requirements: Path) -> None:
    make_environment(folder, requirements)
    check = "import torch; assert '+cpu' in torch.__version__, torch.__version__; import vllm"
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1"}
    call([folder / "bin" / "python", "-I", "-c", check], env=environment)


def make_llamacpp(folder: Path, requirements: Path) -> None:
    make_environment(folder, requirements)
    call([folder / "bin" / "python", "-I", "-c", "import numpy, xllamacpp"])


def make_steering(folder: Path, requirements: Path) -> None:
    make_environment(folder, requirements)
    call([folder / "bin" / "python", "-I", "-c", "import dialz, pyreft, repeng, sae_lens"])


def make_environment(folder: Path, requirements: Path) -> None:
    """A virtual environment with exactly the packages of the file.

    The environment has no pip of its own: the pip that runs this serves it. The file names every
    package, so pip resolves nothing.
    """
    call([sys.executable, "-m", "venv", "--without-pip", folder])
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    call([*pip, "install", "--no-deps", "--only-binary", ":all:", "--requirement", requirements])


def make_converter(folder: Path, requirements: Path) -> None:
    """Download the source distribution, keep the converter's files.

    pip asks an archive's build backend for its metadata before it keeps the download, so a small
    build backend is fetched too. Nothing is compiled.
    """
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--no-deps", "--require-hashes", "--no-binary", "llama-cpp-python"]
        target = ["--dest", scratch, "--requirement", requirements]
        call([sys.executable, "-m", "pip", "download", *options, *target])
        (archive,) = Path(scratch).glob("*.tar.gz")
        extract(archive, folder)


def extract(archive: Path, folder: Path) -> None:
    """Write the CONVERTER_PARTS of the archive's vendor/llama.cpp into the folder."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            inside = path.parts[1:3] == ("vendor", "llama.cpp") and path.parts[3:4]
            if not member.isfile() or not inside or path.parts[3] not in CONVERTER_PARTS:
                continue
            if ".." in path.parts:
                raise SystemExit(f"{archive.name}: {member.name} leaves its folder")
            content = tar.extractfile(member)
            assert content is not None  # a regular file, tested above
            target = folder.joinpath(*path.parts[3:])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())


def call(command: list[str | Path], env: dict[str, str] | None = None) -> None:
    """Run the command with its output going to this process's stderr; stop when it fails."""
    words = [str(word) for word in command]
    print("+", *words, file=sys.stderr, flush=True)
    subprocess.run(words, env=env, check=True, stdout=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=default_cache(), help="default: %(default)s")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for name in chosen.parts or PARTS:
        start = time.monotonic()
        path = PARTS[name](chosen.cache.resolve())
        print(f"{name}: {path} ({time.monotonic() - start:.1f} s)")


if __name__ == "__main__":
    main()
