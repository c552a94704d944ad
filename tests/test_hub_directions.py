"""Directions on the Hub: a folder comes with every file of its format, against a loopback Hub."""

import io
import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer
from published import Worker, hub_with, worker_at
from systems import pyvene_folder

REPO = "alice/refusal"
METADATA = {"pos": -2, "layer": 3}


def saved(vector: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(vector, buffer)
    return buffer.getvalue()


def array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@cache
def pyvene_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        state = {"source_representation": torch.arange(1.0, 9.0)}
        made = pyvene_folder(Path(folder) / "x", "AdditionIntervention", "block_output", state)
        return {path.name: path.read_bytes() for path in made.iterdir()}


PYVENE = pyvene_files()
(INTKEY,) = (name for name in PYVENE if name.startswith("intkey_"))


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    vector = saved(torch.arange(1.0, 9.0, dtype=torch.float64))
    metadata = json.dumps(METADATA).encode()
    files = {
        "deep/run/direction.pt": vector,
        "deep/run/direction_metadata.json": metadata,
        "deep/run/completions.json": b"[]",
        "plain/direction.pt": vector,
        "half/direction_metadata.json": metadata,
        **{f"caa[1]/vec_layer_{n}_Llama.pt": saved(torch.ones(8) + n) for n in (3, 4)},
        "caa[1]/README.md": b"# vectors",
        "iti/tiny_head_wise.npy": array(np.random.default_rng(0).normal(size=(6, 2, 8))),
        "iti/tiny_labels.npy": array(np.array([0, 1, 0, 1, 0, 1])),
        "act/model.layers.1.mlp.statedict": saved({"auroc": torch.rand(8)}),
        "reft/config.json": PYVENE["config.json"],
        f"reft/{INTKEY}": PYVENE[INTKEY],
    }
    with hub_with() as state:
        state.add_repo(REPO, files, private=False)
        yield state


@pytest.fixture(scope="module")
def worker(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker_at(hub, tmp_path_factory.mktemp("home") / "home") as worker:
        yield worker


@pytest.mark.parametrize("at", ["deep/run", "deep/run/", "deep/run@main", "deep/run/direction.pt"])
def test_an_arditi_folder_keeps_its_metadata(worker: Worker, at: str) -> None:
    done = worker.run("directions", f"hf://{REPO}/{at}")
    assert done.code == 0, done.err
    assert done.data["format"] == "arditi"
    assert done.data["metadata"] == {name: str(value) for name, value in METADATA.items()}
    assert [row["site"] for row in done.data["rows"]] == ["resid_pre.3"]
    assert not list(worker.home.rglob("completions.json")), "only what the format needs comes"
    # Without a network the cache has both files, and remembers what the Hub has not.
    again = worker.run("directions", f"hf://{REPO}/{at}", offline=True)
    assert (again.code, again.data) == (0, done.data)


@pytest.mark.parametrize(
    ("at", "format_", "rows", "options"),
    [
        ("caa[1]", "caa", 2, []),
        ("act", "mlact", 1, []),
        ("reft", "pyvene", 1, []),
        ("iti/tiny_head_wise.npy", "iti", 4, ["--heads", "2"]),
    ],
)
def test_a_folder_without_fixed_names_comes_whole(
    worker: Worker, at: str, format_: str, rows: int, options: list[str]
) -> None:
    done = worker.run("directions", f"hf://{REPO}/{at}", *options)
    assert done.code == 0, done.err
    assert (done.data["format"], len(done.data["rows"])) == (format_, rows)
    assert not list(worker.home.rglob("README.md")), "only what the format needs comes"
    again = worker.run("directions", f"hf://{REPO}/{at}", *options, offline=True)
    assert (again.code, again.data) == (0, done.data)


def test_a_lone_file_is_what_it_was(worker: Worker) -> None:
    done = worker.run("directions", f"hf://{REPO}/plain/direction.pt")
    assert (done.code, done.data["format"], done.data["metadata"]) == (0, "pt", {})
    assert [row["site"] for row in done.data["rows"]] == [None]
    again = worker.run("directions", f"hf://{REPO}/plain/direction.pt", offline=True)
    assert again.data == done.data


@pytest.mark.parametrize("at", ["half", "plain", "absent", "deep"])
def test_a_folder_of_no_format(worker: Worker, at: str) -> None:
    done = worker.run("directions", f"hf://{REPO}/{at}")
    assert done.code == 5
    error = done.data["error"]
    assert error["what"] == f"hf://{REPO}/{at} is not on the Hub"
    assert "a folder with direction.pt and direction_metadata.json" in error["why"]
    assert "vec_layer_*.pt" in error["why"]


def test_metadata_that_cannot_be_fetched_is_no_lone_file(hub: HubServer, tmp_path: Path) -> None:
    """A direction without its metadata would be another artifact: no site, another digest."""
    with worker_at(hub, tmp_path / "home") as fresh:
        hub.fault("GET", "direction_metadata.json", 500, times=20)
        hub.fault("HEAD", "direction_metadata.json", 500, times=20)
        try:
            done = fresh.run("directions", f"hf://{REPO}/deep/run/direction.pt")
        finally:
            hub.faults.clear()
    assert done.code == 5
    assert "cannot be fetched" in done.data["error"]["what"]
