"""An artifact to publish, and a process of its own to publish it with the real client.

The client reads its settings when it is imported, so commands run in a worker process whose Hub is
the server on this machine. The worker stays, because importing everything again takes seconds.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import programs
import pytest
import tiny
import torch
from commands import error_of
from exporting import written
from harness import base_at, edit, plan_of, vector
from hub_server import HubServer, running_hub

from bake import edits as make
from bake.artifact.base import base_ref

TOKEN = "hf_" + "T" * 34
CLIENTS = ("newest", pytest.param("oldest", marks=pytest.mark.runtimes))
"""The generations of huggingface_hub that every case runs with; see ``client_of``."""
BASE = "meta/base"
LICENCE = "apache-2.0"
CARD = f"---\nlicense: {LICENCE}\nbase_model: {BASE}\n---\n# A baked model\n"


def sharded_base(path: Path) -> Path:
    """Write a float32 Llama in several shards, so that an edit leaves some of them untouched."""
    model = tiny.make_model("llama", dtype=torch.float32)
    tiny.write_checkpoint(model, path, max_shard_size="20KB")
    return path


def base_files(path: Path) -> dict[str, bytes]:
    """Return the files of the base as its repository has them."""
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    return {**files, "README.md": f"---\nlicense: {LICENCE}\n---\n# Base\n".encode()}


def commit_of(path: Path, model: str) -> str:
    """Return the commit that a base has on every server: it depends on its files alone."""
    return HubServer().add_repo(model, base_files(path), private=False)


def make_artifact(
    base_path: Path,
    out: Path,
    at: Sequence[str] = ("attn_out.0",),
    *,
    kind: str = "ablate",
    model: str = BASE,
) -> Path:
    """Export an edit of a base that is on the Hub, with a card and a verification that passed."""
    base = base_at(base_path)
    build = {"ablate": make.ablate, "offset": make.offset}[kind]
    plan = plan_of(base, [edit(base, kind, build(vector(base.layout.hidden)), at)])
    record = {
        "recipe": {"title": "Test", "file": "r.toml", "digest": "sha256:" + "1" * 64, "text": ""},
        "base": {
            **base_ref(base.checkpoint).to_json(),
            "model": model,
            "revision": commit_of(base_path, model),
            "card": {"license": LICENCE},
        },
        "directions": {
            "mood": {
                "file": "mood.npy",
                "concept": "mood",
                "format": "npy",
                "digest": "sha256:" + "2" * 64,
                "metadata": {},
                "tensors": [],
            }
        },
        "allow": [],
        "target": ["transformers"],
    }
    written("checkpoint", plan, base.checkpoint, out, record=record)
    (out / "README.md").write_text(CARD.replace(BASE, model), encoding="utf-8")
    write_verification(out)
    return out


def write_verification(out: Path, **changes: Any) -> None:
    """Write a verification of the artifact's plan."""
    record = json.loads((out / "bake.json").read_text(encoding="utf-8"))
    row = {"name": "baked − hooked", "value": 1e-12, "limit": 1e-9, "passed": True, "note": ""}
    content = {"plan_digest": record["plan"]["digest"], "passed": True, "rows": [row], **changes}
    (out / "verify.json").write_text(json.dumps(content), encoding="utf-8")


def copy_of(artifact: Path, to: Path) -> Path:
    """Return a copy of an artifact that a test may spoil."""
    shutil.copytree(artifact, to)
    return to


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    made = change(content)
    path.write_text(json.dumps(content if made is None else made), encoding="utf-8")


def record_again(out: Path) -> None:
    """Have the record list the files as they are, as an export of other weights would."""

    def change(found: dict[str, Any]) -> None:
        for name in found.get("files", {}):
            digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
            found["files"][name] = f"sha256:{digest}"

    rewrite(out / "bake.json", change)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def error(self) -> str:
        """What went wrong and where, in one line."""
        return error_of(self.data)


WORKER = """
import json, os, sys, time, traceback
from click.testing import CliRunner
from bake.checkpoints import open_checkpoint
from bake.cli import main
import bake.publish.push, huggingface_hub
from bake import process

sys.path.append(sys.argv[1])
import programs
own = process.wait
home = os.getcwd()
real = time.sleep
time.sleep = lambda seconds: real(min(seconds, 0.02))

def command(args):
    result = CliRunner().invoke(main, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        text = "".join(traceback.format_exception(result.exception))
        return {"code": -1, "out": result.stdout, "err": result.stderr + text}
    return {"code": result.exit_code, "out": result.stdout, "err": result.stderr}

for line in sys.stdin:
    order = json.loads(line)
    os.environ.update(order["env"])
    process.wait = programs.wait(own) if programs.DOORS in os.environ else own
    os.chdir(order.get("cwd", home))
    huggingface_hub.constants.HF_HUB_OFFLINE = order.get("offline", False)
    if "download" in order:
        path = huggingface_hub.snapshot_download(order["download"], revision=order["revision"])
        answer = {"code": 0, "out": path, "err": huggingface_hub.__version__}
    elif "version" in order:
        answer = {"code": 0, "out": huggingface_hub.__version__, "err": ""}
    elif "open" in order:
        found = open_checkpoint(order["open"], complete=True)
        answer = {"code": 0, "out": found.digest(), "err": str(found.path)}
    else:
        answer = command(order["args"])
    print("\\n" + json.dumps(answer), flush=True)
"""


def client_of(name: str) -> dict[str, str]:
    """Return the environment of a process with one generation of the Hub's client.

    The oldest that is supported is 1.31, whose HTTP client is another library. It is installed in a
    folder of its own when it is not there.
    """
    if name == "newest":
        return {}
    root = Path(__file__).parents[1]
    cache = Path(os.environ.get("BAKE_TEST_CACHE") or root / ".cache/runtimes")
    site = cache / "huggingface-hub-1.31"
    if not (site / "huggingface_hub").is_dir():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--target", str(site),
             "huggingface_hub==1.31.0"],
            check=True,
        )  # fmt: skip
    return {"PYTHONPATH": f"{site}{os.pathsep}{root}"}


def environment(hub: HubServer, home: Path, **extra: str) -> dict[str, str]:
    """Return the environment of a process whose Hub is the server."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSF"))}
    return {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        **clean,
        "HF_ENDPOINT": hub.hub,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_DEBUG": "1",
        "HF_HUB_VERBOSITY": "debug",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
        "HF_XET_CLIENT_RETRY_BASE_DELAY": "20ms",
        "HF_XET_CLIENT_RETRY_MAX_DURATION": "3s",
        "RUST_LOG": "debug",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": programs.RESOURCES,
        **extra,
    }


@dataclass
class Worker:
    """A process that runs bake's commands against one server."""

    hub: HubServer
    home: Path
    extra: dict[str, str] = field(default_factory=dict)
    process: programs.Running | None = None
    said: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.home / "stderr.log"

    def start(self) -> None:
        """Start the process; its imports run while the caller does something else."""
        self.home.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self.process = programs.start(
                WORKER,
                str(programs.HERE.parent),
                env=environment(self.hub, self.home, **self.extra),
                kind=None if "PYTHONPATH" in self.extra else programs.COMMAND,  # another client
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def stop(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait(30)

    def order(self, **order: Any) -> Outcome:
        if self.process is None:
            self.start()
        assert self.process is not None
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        while (line := self.process.stdout.readline()) == "\n" or line[:1] not in ("{", ""):
            pass
        assert line, self.log.read_text()[-2000:]
        self.said.append(line)
        return Outcome(**json.loads(line))

    def run(
        self, *args: object, offline: bool = False, cwd: Path | None = None, **env: str
    ) -> Outcome:
        """Run a command of bake, with ``--json``."""
        env = {"HF_TOKEN": TOKEN, **env}
        if "--runtime" in args:
            env[programs.DOORS] = programs.door(programs.MODEL)
        place = {} if cwd is None else {"cwd": str(cwd)}
        done = self.order(args=[*map(str, args), "--json"], env=env, offline=offline, **place)
        assert done.code >= 0, done.err
        return done

    def push(self, out: Path, repo: str, *args: object, **options: Any) -> Outcome:
        """Run ``bake push``."""
        return self.run("push", out, repo, *args, **options)

    def download(self, repo: str, revision: str = "main") -> Path:
        """Download a repository as anybody would."""
        return Path(self.order(download=repo, revision=revision, env={"HF_TOKEN": TOKEN}).out)

    def version(self) -> str:
        """Return the version of the client, once it has been asked for something."""
        done = self.order(version=True, env={})
        return done.out

    def traces(self) -> str:
        """Return everything that the process has written, anywhere but to the server."""
        files = [path for path in self.home.rglob("*") if path.is_file()]
        texts = [path.read_bytes().decode("latin-1") for path in files]
        return "\n".join([*texts, *self.said])


@contextmanager
def hub_with(base: Path | None = None) -> Iterator[HubServer]:
    """Run a Hub with one user and, where it is given, a base in its public repository."""
    with running_hub() as hub:
        hub.add_user(TOKEN, "alice")
        if base is not None:
            hub.add_repo(BASE, base_files(base), private=False)
        yield hub


@contextmanager
def worker_at(hub: HubServer, home: Path, extra: dict[str, str] | None = None) -> Iterator[Worker]:
    """Run a worker until the end of the block, by when it has not let its token out."""
    worker = Worker(hub, home, extra or {})
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()
    assert TOKEN not in worker.traces()
    assert not any(request.token for request in hub.log if request.at == "store")
