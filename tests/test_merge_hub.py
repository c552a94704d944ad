"""Adapters on the Hub: in folders of a repository, with a tokenizer of their own beside them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adapters import NO_BIAS
from folders import files_of
from harness import Base, base_at
from hub_server import HubServer
from published import Worker, hub_with, worker_at
from test_merge import trained

STYLE, PLAIN = "alice/style", "alice/plain"


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Callable[..., Path]) -> Base:
    return base_at(tiny_checkpoint("llama", **NO_BIAS))


@pytest.fixture(scope="module")
def hub(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """Two states of a training in folders, and the last one with its template."""
    files: dict[str, bytes] = {"README.md": b"# two states"}
    for seed, folder in enumerate(("checkpoint-10", "last/one")):
        made = trained(base, tmp_path_factory.mktemp("made") / "adapter", r=2 + seed)
        files |= {f"{folder}/{name}": data for name, data in files_of(made).items()}
    files["last/one/chat_template.jinja"] = b"{{ messages }}"
    files["last/one/additional_chat_templates/tools.jinja"] = b"{{ tools }}"
    files["last/one/optimizer.bin"] = b"0" * 100
    with hub_with(base.path) as state:
        state.add_repo(STYLE, files, private=False)
        plain = {name.rpartition("/")[2]: files[name] for name in files if "last/one/ad" in name}
        state.add_repo(PLAIN, plain, private=False)
        yield state


@pytest.fixture(scope="module")
def worker(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with worker_at(hub, tmp_path_factory.mktemp("home")) as worker:
        yield worker


def test_a_folder_of_a_repository(
    worker: Worker, hub: HubServer, base: Base, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = worker.run("merge", f"{STYLE}/last/one@main", base.path, "--out", out)
    assert done.code == 0, done.out
    record = json.loads((out / "bake.json").read_text())["adapter"]
    commit = hub.repos[STYLE].branches["main"]
    assert (record["name"], record["revision"]) == (f"{STYLE}/last/one", commit)
    assert record["config"]["r"] == 3 and record["path"] is None
    # Its template differs from the base's, which has none: told, and left unless asked for.
    said = " ".join(done.out.split())
    assert "the adapter's own additional_chat_templates/tools.jinja, chat_template.jinja" in said
    assert not (out / "chat_template.jinja").exists()
    own = tmp_path / "own"
    options = ("--out", own, "--tokenizer", "adapter")
    assert worker.run("merge", f"{STYLE}/last/one", base.path, *options).code == 0
    assert (own / "chat_template.jinja").read_bytes() == b"{{ messages }}"
    # The verification fetches it by what the record says.
    done = worker.run("verify", out, "--generate", "0", "--no-plots", "-q")
    assert done.code == 0, done.out
    assert not any("optimizer.bin" in request.path for request in hub.log)


def test_it_is_compared_as_one_here_is(worker: Worker, hub: HubServer, base: Base) -> None:
    """``bake diff`` reads every adapter that a merge does, wherever it is."""
    names = ("q_proj", "down_proj")
    for source in (f"{STYLE}/last/one", f"hf://{STYLE}/last/one@main", PLAIN, f"hf://{PLAIN}"):
        done = worker.run("diff", base.path, source)
        assert done.code == 0, done.err
        assert done.data["adapter"] is True
        repo = PLAIN if PLAIN in source else STYLE
        place = source.removeprefix("hf://").partition("@")[0]
        assert done.data["out"] == f"{place}@{hub.repos[repo].branches['main']}"
        changed = {row["name"] for row in done.data["tensors"]["changed"]}
        assert len(changed) == 6 and all(name.split(".")[-2] in names for name in changed)
    # The base that a configuration names is a place of the machine that trained it, or none.
    assert worker.run("diff", f"{STYLE}/last").code == 4
    done = worker.run("diff", PLAIN, base.path)
    assert done.code == 2 and "name it as the second of the two" in " ".join(done.out.split())


def test_a_repository_whose_folders_hold_adapters(
    worker: Worker, base: Base, tmp_path: Path
) -> None:
    done = worker.run("merge", STYLE, base.path, "--out", tmp_path / "no")
    said = " ".join(done.out.split())
    assert done.code == 4 and f"{STYLE} holds no adapter_config.json" in said
    assert f"{STYLE}/checkpoint-10" in said
    done = worker.run("merge", f"{STYLE}/../one", base.path, "--out", tmp_path / "no")
    assert done.code == 4 and not (tmp_path / "no").exists()
