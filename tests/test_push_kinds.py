"""Every kind of artifact: published, downloaded, the same bytes, and loaded as a user loads it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import pytest
import tiny
import torch
from adapters import NO_BIAS, peft_model
from commands import write_recipe
from folders import files_of
from hub_server import HubServer
from published import BASE, CARD, Worker, hub_with, worker_at


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kinds") / "base"
    model = tiny.make_model("llama", dtype=torch.float32, tie_word_embeddings=False, **NO_BIAS)
    tiny.write_checkpoint(model, path)
    return path


@pytest.fixture(scope="module")
def hub(base: Path) -> Iterator[HubServer]:
    with hub_with(base) as state:
        yield state


@pytest.fixture(scope="module")
def worker(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker_at(hub, tmp_path_factory.mktemp("home")) as worker:
        yield worker


def files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if name != ".gitattributes"}


def exported(worker: Worker, folder: Path, carrier: str, *args: object, **edit: Any) -> Path:
    edit = {"at": ("attn_out.0", "mlp_out.1"), **edit}
    more = "coefficient = 0.5\n" if edit.get("kind") == "offset" else ""
    recipe = write_recipe(folder, BASE, more=f'{more}[export]\nto = ["{carrier}"]\n', **edit)
    out = folder / carrier
    made = worker.run("export", recipe, "--out", out, *args)
    assert made.code == 0, made.out
    return out


def load_model(there: Path, base: Path) -> None:
    edited, plain = tiny.tensors_of(there), tiny.tensors_of(base)
    assert tiny.load(there, torch.float32).config.model_type == "llama"
    assert any(not torch.equal(edited[name], plain[name]) for name in plain)  # the effect


def load_peft(there: Path, base: Path) -> None:
    adapter = peft_model(base, there, torch.float32)
    assert any("lora_B" in name and bool(p.any()) for name, p in adapter.named_parameters())


def load_gguf(there: Path, base: Path) -> None:
    (file,) = there.glob("*.gguf")
    assert len(gguf.GGUFReader(file).tensors) > 0


MAKE: dict[str, tuple[Callable[[Worker, Path, Path], Path], Callable[[Path, Path], None]]] = {
    "checkpoint": (lambda worker, folder, base: exported(worker, folder, "checkpoint"), load_model),
    "lora": (lambda worker, folder, base: exported(worker, folder, "lora"), load_peft),
    "gguf-lora": (lambda worker, folder, base: exported(worker, folder, "gguf-lora"), load_gguf),
    "control-vector": (
        lambda worker, folder, base: exported(
            worker, folder, "control-vector", kind="offset", at=("resid_post.1",)
        ),
        load_gguf,
    ),
    "gguf": (
        lambda worker, folder, base: exported(
            worker, folder, "gguf", "--gguf", gguf_files.write(folder / "base.gguf", base)
        ),
        load_gguf,
    ),
    "merge": (lambda worker, folder, base: merged(worker, folder), load_model),
}


VERIFY = {"checkpoint": (), "lora": ("--runtime", "peft")}


def merged(worker: Worker, folder: Path) -> Path:
    adapter = exported(worker, folder, "lora")
    made = worker.run("merge", adapter, BASE, "--out", folder / "merge")
    assert made.code == 0, made.out
    return folder / "merge"


@pytest.mark.parametrize("kind", MAKE)
def test_a_round_trip_of_each_kind(
    kind: str, worker: Worker, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    make, load = MAKE[kind]
    out = make(worker, tmp_path, base)
    repo = f"alice/{kind}"
    verified = None
    if kind in VERIFY:  # the others are verified in llama.cpp: tests/runtimes
        verified = worker.run("verify", out, "--no-plots", *VERIFY[kind])
        assert verified.code == 0, verified.out
    if kind == "merge":
        (out / "README.md").write_text(CARD.replace("# A", "> Not verified.\n\n# A"))
    given = () if verified is not None else ("--unverified",)
    done = worker.push(out, repo, "--verify-download", *given)
    assert done.code == 0, done.out
    assert done.data["outcome"] == "published and verified"
    assert hub.repos[repo].files() == files(out)
    there = worker.download(repo)
    assert files(there) == files(out)
    checked = worker.run("check", there)
    assert checked.code == 0 and checked.data["kind"] == kind, checked.out
    assert checked.data["digest"] == done.data["digest"]
    assert checked.data["verified"] == (verified is not None)
    load(there, base)
    if verified is not None:
        place = tmp_path / "report"
        again = worker.run("verify", there, "--no-plots", "--report", place, *VERIFY[kind])
        assert again.code == 0, again.out
        assert worker.push(out, repo).data["unchanged"]
