"""``bake diff`` on repositories, with the real client, against a Hub on this machine."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from folders import files_of
from hub_server import HubServer
from published import BASE, Worker, copy_of, hub_with, make_artifact, rewrite, worker_at
from safetensors.torch import load_file, save_file

OUT = "alice/out"
EDITED = ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.bias")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many shards, each longer than the stretch that is read for a header."""
    path = tmp_path_factory.mktemp("diffhub") / "base"
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 400}
    model = tiny.make_model("llama", dtype=torch.float32, **sizes)
    tiny.write_checkpoint(model, path, max_shard_size="300KB")
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    return path


@pytest.fixture(scope="module")
def artifact(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(base, tmp_path_factory.mktemp("made") / "out")


@pytest.fixture(scope="module")
def hub(base: Path, artifact: Path) -> Iterator[HubServer]:
    with hub_with(base) as state:
        state.add_repo(OUT, files_of(artifact), private=False)
        yield state


@pytest.fixture(scope="module")
def worker(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A process whose cache never holds weights: they are read by range."""
    with worker_at(hub, tmp_path_factory.mktemp("home") / "home") as worker:
        yield worker
        assert not list(worker.home.rglob("model*.safetensors"))


def weights_sent(hub: HubServer, since: int) -> int:
    """Return the bytes of large files that the storage has sent."""
    return sum(request.sent for request in hub.log[since:] if request.at == "store")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_a_published_pair_is_proven_without_downloading_equal_shards(
    hub: HubServer, worker: Worker, base: Path, artifact: Path
) -> None:
    start = len(hub.log)
    done = worker.run("diff", BASE, OUT)
    assert done.code == 0, done.err
    data = done.data
    assert data["as_recorded"] is True
    assert {row["name"] for row in data["tensors"]["changed"]} == set(EDITED)
    assert data["base"].startswith(f"{BASE}@") and data["out"].startswith(f"{OUT}@")
    # The shard with the edited tensors is the only one whose hash differs.
    index = json.loads((artifact / "model.safetensors.index.json").read_text())["weight_map"]
    (shard,) = {index[name] for name in EDITED}
    inside = [name for name, file in index.items() if file == shard]
    assert set(data["tensors"]["same_by_bytes"]) == set(inside) - set(EDITED)
    assert len(data["tensors"]["same_by_hash"]) == data["tensors"]["total"] - len(inside)
    # Every byte of it came once from each side, though changed tensors are read many times.
    length = (artifact / shard).stat().st_size
    heads = 2 * len(set(index.values())) * (1 << 16)
    assert data["bytes_fetched"] <= 2 * length + heads
    assert weights_sent(hub, start) <= 2 * length + 2 * heads
    assert 2 * length < size_of(base) / 2  # effect: that is far less than both models
    assert {file["name"] for file in data["files"]} == {
        *("README.md", "bake.json", "bake/", "verify.json")
    }


def test_without_equal_hashes_everything_is_read(
    hub: HubServer, worker: Worker, base: Path, tmp_path: Path
) -> None:
    """Control: the same tensors in one file, whose hash says nothing."""
    tensors = tiny.tensors_of(base)
    other = tmp_path / "other"
    other.mkdir()
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, other / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", other)
    shutil.copy(base / "tokenizer.json", other)
    hub.add_repo("alice/one-file", files_of(other), private=False)
    data = worker.run("diff", BASE, "alice/one-file").data
    assert data["identical"] is True and data["tensors"]["same_by_hash"] == []
    total = sum(tensor.numel() * 4 for tensor in tensors.values())
    assert data["bytes_fetched"] >= 2 * total


def test_a_folder_and_a_repository(hub: HubServer, worker: Worker, base: Path) -> None:
    start = len(hub.log)
    data = worker.run("diff", base, OUT).data
    assert data["as_recorded"] is True and data["tensors"]["same_by_hash"]
    assert weights_sent(hub, start) < size_of(base) / 2
    back = worker.run("diff", f"hf://{OUT}", base).data
    assert back["as_recorded"] is None  # the base has no record of its own
    assert {row["name"] for row in back["tensors"]["changed"]} == set(EDITED)


def test_the_base_is_found_on_the_hub(worker: Worker) -> None:
    done = worker.run("diff", OUT)
    assert done.code == 0, done.err
    assert done.data["as_recorded"] is True and done.data["base"].startswith(f"{BASE}@")


def test_a_lie_on_the_hub_is_found(
    hub: HubServer, worker: Worker, artifact: Path, tmp_path: Path
) -> None:
    copy = copy_of(artifact, tmp_path / "copy")
    name = "model.layers.2.mlp.up_proj.weight"
    index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    path = copy / index[name]
    tensors = load_file(path)
    tensors[name][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    rewrite(copy / "tokenizer.json", lambda found: {**found, "added_tokens": []})
    hub.add_repo("alice/liar", files_of(copy), private=False)
    done = worker.run("diff", BASE, "alice/liar")
    assert done.code == 1
    assert done.data["violations"] == [
        f"{name} differs in 1 value, and the plan does not edit it",
        "the file tokenizer.json differs, and the plan leaves it alone",
    ]


def test_what_the_cache_holds_is_compared_offline(hub: HubServer, tmp_path: Path) -> None:
    with worker_at(hub, tmp_path / "home") as worker:
        for repo in (BASE, OUT):
            worker.download(repo)
        done = worker.run("diff", BASE, OUT, offline=True)
    assert done.code == 0, done.err
    assert done.data["as_recorded"] is True and done.data["bytes_fetched"] == 0


@pytest.mark.parametrize(
    ("models", "code", "told"),
    [
        ((BASE, "alice/nowhere"), 5, "alice/nowhere"),
        ((BASE, f"{OUT}@no-such-branch"), 5, "no-such-branch"),
        (("alice/nowhere",), 5, "alice/nowhere"),
        ((BASE,), 2, "does not say what it was made from"),
        ((BASE, "hf://alice"), 2, "names no repository"),
    ],
)
def test_what_the_hub_has_not_is_one_line(
    worker: Worker, models: tuple[Any, ...], code: int, told: str
) -> None:
    done = worker.run("diff", *models)
    assert done.code == code
    assert told in done.error
