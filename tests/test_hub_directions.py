"""Directions on the Hub: a folder comes with every file of its format, against a loopback Hub."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from published import Worker, hub_with, worker_at

REPO = "alice/refusal"
METADATA = {"pos": -2, "layer": 3}


def saved(vector: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(vector, buffer)
    return buffer.getvalue()


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
    assert error["why"].endswith("a folder with direction.pt and direction_metadata.json")


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
