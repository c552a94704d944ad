"""``bake push RECIPE owner/name --low-disk``: a model that never lies on this disk as a whole."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
from hub_server import HubServer, running_hub
from published import CLIENTS, TOKEN, Worker, base_files, client_of, environment

from bake import edits as make
from bake.artifact.destination import Destination
from bake.cards.frontmatter import first_line_of
from bake.errors import CheckpointError, UsageError
from bake.publish.low_disk import Work, push_low_disk
from bake.publish.preflight import Terms

LFS = {"HF_HUB_DISABLE_XET": "1"}
BASE = "meta/large"
QUICKSTART = Path(__file__).parents[1] / "recipes"
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 64,
    "vocab_size": 1000,
    "attention_bias": False,
    "mlp_bias": False,
}
RECIPE = """
title = "Less of it"
[base]
model = "{model}"
[directions.mood]
file = "mood.npy"
[[edits]]
kind = "ablate"
direction = "mood"
at = {at}
"""
EDITED = ("attn_out.1", "mlp_out.3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 15 MB in shards of 2 MB."""
    path = tmp_path_factory.mktemp("low") / "base"
    model = tiny.make_model("llama", dtype=torch.float32, **SIZES)
    tiny.write_checkpoint(model, path, max_shard_size="2MB")
    return path


@pytest.fixture(scope="module", params=CLIENTS)
def client(request: pytest.FixtureRequest) -> dict[str, str]:
    """Every case runs with both generations of the Hub's client."""
    return client_of(request.param)


@pytest.fixture(scope="module")
def hub(base: Path, client: dict[str, str]) -> Iterator[HubServer]:
    with running_hub() as state:
        state.add_user(TOKEN, "alice")
        state.add_repo(BASE, base_files(base), private=False)
        yield state


@pytest.fixture(scope="module")
def workers(
    hub: HubServer, client: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Worker]]:
    home = tmp_path_factory.mktemp("homes")
    made = {
        "xet": Worker(hub, home / "xet", client),
        "lfs": Worker(hub, home / "lfs", {**LFS, **client}),
    }
    for worker in made.values():
        worker.start()
    yield made
    for worker in made.values():
        worker.stop()
        assert TOKEN not in worker.traces()
    assert not any(request.token for request in hub.log if request.at == "store")


@pytest.fixture
def xet(workers: dict[str, Worker], hub: HubServer) -> Iterator[Worker]:
    hub.copying = True
    shutil.rmtree(workers["xet"].home / "hub", ignore_errors=True)  # no base in the cache
    yield workers["xet"]
    assert not [fault for fault in hub.faults if 0 < fault.times < 50]
    hub.faults.clear()


def recipe(folder: Path, at: tuple[str, ...] = EDITED, model: str = BASE) -> Path:
    generator = np.random.default_rng(0)
    np.save(folder / "mood.npy", generator.normal(size=SIZES["hidden_size"]))
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(model=model, at=json.dumps(list(at))))
    return path


def size_of(*folders: Path) -> int:
    """Return the bytes of all files, as they are at this moment."""
    total = 0
    for folder in folders:
        for path in folder.rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                pass  # it has just gone
    return total


def push(worker: Worker, folder: Path, repo: str, *args: object, at: tuple[str, ...] = EDITED):
    wanted = ("--low-disk", "--unverified", "--no-card", *args)
    return worker.push(recipe(folder, at), repo, *wanted, cwd=folder)


def exported(worker: Worker, folder: Path, repo: str, at: tuple[str, ...] = EDITED) -> None:
    """Publish the same in the usual way."""
    made = worker.run("export", recipe(folder, at), "--out", folder / "whole", cwd=folder)
    assert made.code == 0, made.out
    done = worker.push(folder / "whole", repo, "--unverified", "--no-card", cwd=folder)
    assert done.code == 0, done.out


@pytest.mark.parametrize("copying", [True, False])
def test_peak_disk_and_the_same_artifact(
    copying: bool, xet: Worker, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    hub.copying = copying
    repo = f"alice/low-{copying}".lower()
    before = size_of(tmp_path, xet.home)
    seen: list[int] = []

    def look() -> None:
        log = xet.log.stat().st_size if xet.log.exists() else 0
        seen.append(size_of(tmp_path, xet.home) - before - (log - started))

    started = xet.log.stat().st_size
    hub.fault("POST", "/preupload/", look, 1000)
    hub.fault("POST", "/v1/xorbs/", look, 1000)
    hub.fault("GET", "/files/", look, 1000)
    hub.fault("GET", "/reconstructions/", look, 1000)
    done = push(xet, tmp_path, repo, "--verify-download")
    hub.faults.clear()
    assert done.code == 0, done.out
    shards = {p.name: p.stat().st_size for p in base.glob("*.safetensors")}
    total, largest = sum(shards.values()), max(shards.values())
    print(f"peak {max(seen):,} of {total:,}; largest shard {largest:,}; looked {len(seen)} times")
    assert len(seen) > 10
    # one original and the edited shard that is made from it, and less than a megabyte beside them
    assert largest < max(seen) < 2 * largest + 1_000_000 < total / 2
    assert [p.name for p in tmp_path.iterdir() if "bake" in p.name] == []

    held = hub.repos[repo]
    assert len(held.titles) == 2 and held.private and len(held.tags) == 1
    plan = json.loads(held.files()["bake.json"])["plan"]
    index = json.loads(held.files()["model.safetensors.index.json"])["weight_map"]
    edited = {index[row["name"]] for row in plan["tensors"]}
    assert 1 <= len(edited) < len(shards)
    assert len(done.data["copied"]) == (len(shards) - len(edited) if copying else 0)
    assert done.data["outcome"] == "published and verified"  # the download, file by file
    assert done.data["unverified"] == "there is no verify.json"

    exported(xet, tmp_path, f"{repo}-whole")
    assert hub.repos[f"{repo}-whole"].files() == held.files()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)  # promise 8
    receipt = json.loads((tmp_path / f"{repo.partition('/')[2]}.push.json").read_text())
    assert receipt["digest"] == done.data["digest"]


def test_again_sends_nothing(xet: Worker, hub: HubServer, tmp_path: Path) -> None:
    assert push(xet, tmp_path, "alice/again").code == 0
    before, start = hub.uploaded(), len(hub.log)
    again = push(xet, tmp_path, "alice/again")
    assert again.code == 0 and again.data["unchanged"], again.out
    assert hub.uploaded() == before and len(hub.repos["alice/again"].titles) == 2
    assert not any("preupload" in request.path for request in hub.log[start:])
    other = push(xet, tmp_path, "alice/again", at=("attn_out.1",))
    assert other.code == 0 and not other.data["unchanged"]  # the control: another edit


def test_a_new_tensor_and_biases_of_other_shards(
    xet: Worker, hub: HubServer, tmp_path: Path
) -> None:
    """An offset of what readers read becomes biases that need the weights of many shards."""
    folder = tmp_path
    text = recipe(folder).read_text().replace('"ablate"', '"offset"')
    (folder / "recipe.toml").write_text(text.replace(json.dumps(list(EDITED)), '["ln1_out.*"]'))
    wanted = ("--unverified", "--no-card")
    done = xet.push(folder / "recipe.toml", "alice/bias", "--low-disk", *wanted, cwd=folder)
    assert done.code == 0, done.out
    held = hub.repos["alice/bias"]
    plan = json.loads(held.files()["bake.json"])["plan"]
    index = json.loads(held.files()["model.safetensors.index.json"])["weight_map"]
    made = [row["name"] for row in plan["biases"]]
    assert len({index[name.replace(".bias", ".weight")] for name in made}) > 2
    assert {index[name] for name in made} == {"model-bake-00001-of-00001.safetensors"}
    xet.run("export", folder / "recipe.toml", "--out", folder / "whole", cwd=folder)
    assert xet.push(folder / "whole", "alice/bias-whole", *wanted).code == 0
    assert hub.repos["alice/bias-whole"].files() == held.files()


def test_a_branch_a_pull_request_and_the_public_view(
    xet: Worker, hub: HubServer, tmp_path: Path
) -> None:
    done = push(xet, tmp_path, "alice/places", "--revision", "v2")
    assert done.code == 0, done.out
    held = hub.repos["alice/places"]
    whole = held.files("v2")
    assert "bake.json" in whole and held.files("main") == {}
    hub.add_repo("other/theirs", {"README.md": b"# theirs"}, private=False)
    proposed = push(xet, tmp_path, "other/theirs", "--create-pr")
    assert proposed.code == 0, proposed.out
    assert hub.repos["other/theirs"].files("refs/pr/1") == whole
    again = push(xet, tmp_path, "other/theirs", "--create-pr")
    assert again.data["url"] == proposed.data["url"]
    shown = push(xet, tmp_path, "alice/shown", "--public")
    assert shown.code == 0 and not hub.repos["alice/shown"].private


def test_somebody_commits_while_it_bakes(xet: Worker, hub: HubServer, tmp_path: Path) -> None:
    repo = "alice/meanwhile"

    def somebody() -> None:
        held = hub.repos[repo]
        record = hub.keep(held, "bake.json", b"{}")
        held.commit({**held.commits[held.branches["main"]], "bake.json": record}, "somebody")

    hub.fault("POST", "/meanwhile/commit/", somebody)
    done = push(xet, tmp_path, repo)
    assert done.code == 5 and f"somebody has committed to {repo} since" in done.error, done.out
    assert hub.repos[repo].files() == {"bake.json": b"{}"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    sent = hub.uploaded()
    assert push(xet, tmp_path, repo).code == 0
    assert hub.uploaded() - sent < 200_000  # the shards are there


def test_a_base_in_a_folder(xet: Worker, hub: HubServer, base: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, model=str(base))
    args = ("--unverified", "--no-card", "--allow", "licence", "--allow", "paths")
    done = xet.push(path, "alice/local", "--low-disk", *args, cwd=tmp_path)
    assert done.code == 0, done.out
    assert done.data["copied"] == []
    made = xet.run("export", path, "--out", tmp_path / "local", cwd=tmp_path)
    assert made.code == 0, made.out
    assert xet.push(tmp_path / "local", "alice/local-whole", *args).code == 0
    assert hub.repos["alice/local-whole"].files() == hub.repos["alice/local"].files()


def test_a_base_that_arrives_damaged_is_not_edited(
    workers: dict[str, Worker], hub: HubServer, tmp_path: Path
) -> None:
    """Promise 10: every original is compared with the hash that the Hub states."""
    hub.fault("GET", "/files/", "corrupt", 99)
    done = push(workers["lfs"], tmp_path, "alice/damaged")
    hub.faults.clear()
    assert done.code == 5 and "of meta/large is not what the Hub states" in done.error, done.out
    assert len(hub.repos["alice/damaged"].titles) == 1
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_code_of_the_base_never_runs(
    xet: Worker, hub: HubServer, base: Path, tmp_path: Path
) -> None:
    """Promise 11: a base whose config names code, with a trap in it, is baked as data."""
    trap = tmp_path / "sprung"
    code = f"from pathlib import Path\nPath({str(trap)!r}).write_text('x')\n"
    found = base_files(base)
    config = json.loads(found["config.json"])
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_trap.Trap"}
    found |= {"config.json": json.dumps(config).encode(), "modeling_trap.py": code.encode()}
    hub.add_repo("meta/trap", found, private=False)
    path = recipe(tmp_path, ("attn_out.1",), model="meta/trap")
    wanted = ("--low-disk", "--unverified", "--no-card")
    refused = xet.push(path, "alice/trap", *wanted, cwd=tmp_path)
    assert refused.code == 4 and "alice/trap" not in hub.repos
    assert "is code, which is published with --allow code only" in refused.error
    assert "names code that a reader would run" in refused.error
    done = xet.push(path, "alice/trap", *wanted, "--allow", "code", cwd=tmp_path)
    assert done.code == 0 and "modeling_trap.py" in hub.repos["alice/trap"].files(), done.out
    assert not trap.exists()


def test_what_is_refused(xet: Worker, hub: HubServer, tmp_path: Path) -> None:
    start = written(hub)
    path = recipe(tmp_path)
    for args, code, message in (
        (("--low-disk",), 2, "cannot have been verified here"),
        (("--low-disk", "--unverified", "--dry-run"), 2, "--low-disk has no --dry-run"),
        (("--low-disk", "--record"), 2, "exclude each other"),
        (("--low-disk", "--unverified", "--sign", "k.pem"), 2, "needs every file in one place"),
        (("--model", "x/y"), 2, "are for --low-disk"),
        (("--low-disk", "--unverified", "--allow", "all"), 2, "all"),
        ((), 4, "is no folder"),
    ):
        done = xet.push(path, "alice/no", *args, cwd=tmp_path)
        assert done.code == code and message in done.error, done.out
    path.write_text(path.read_text() + '[export]\nto = ["lora"]\n')
    done = xet.push(path, "alice/no", "--low-disk", "--unverified", cwd=tmp_path)
    assert done.code == 2 and "the recipe writes lora" in done.error
    inexact = recipe(tmp_path, at=("resid_post.2",))
    done = xet.push(inexact, "alice/no", "--low-disk", "--unverified", cwd=tmp_path)
    assert done.code == 3, done.out
    assert written(hub) == start
    assert "alice/no" not in hub.repos


def test_a_killed_run_is_taken_up(hub: HubServer, client: dict[str, str], tmp_path: Path) -> None:
    """What the Hub has is not sent again, and what the run left on this disk is gone."""
    path, home, repo = recipe(tmp_path), tmp_path / "home", "alice/killed"
    hub.copying = False
    reached, hang = threading.Event(), threading.Event()

    def stop() -> None:
        reached.set()
        hang.wait(30)

    hub.blobs = {k: v for k, v in hub.blobs.items() if k in held_by(hub, BASE)}
    arrived = hub.uploaded()
    for _ in range(2):
        hub.fault("PUT", "/lfs/", lambda: None)  # two shards arrive
    hub.fault("PUT", "/lfs/", stop, 4)
    command = [sys.executable, "-m", "bake", "push", str(path), repo, "-q"]
    process = subprocess.Popen(
        [*command, "--low-disk", "--unverified", "--no-card"],
        env=environment(hub, home, **client, **LFS),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert reached.wait(60)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    hang.set()
    hub.faults.clear()
    left = tmp_path / ".killed.bake-push"
    assert left.is_dir() and len(hub.repos[repo].titles) == 1
    first = hub.uploaded() - arrived
    worker = Worker(hub, home, {**client, **LFS})
    start = hub.uploaded()
    done = worker.push(path, repo, "--low-disk", "--unverified", "--no-card", cwd=tmp_path)
    worker.stop()
    assert done.code == 0, done.out
    assert not left.exists() and len(hub.repos[repo].titles) == 2
    total = sum(len(d) for n, d in hub.repos[repo].files().items() if n.endswith("safetensors"))
    assert first > 0 and hub.uploaded() - start < total - 0.5 * first


def report_of(folder: Path, hub: HubServer, repo: str, **changes: Any) -> Path:
    """Write what ``bake verify hf://owner/name`` writes of an artifact that passes."""
    report = folder / "verify-it"
    (report / "plots").mkdir(parents=True, exist_ok=True)
    record = json.loads(hub.repos[repo].files()["bake.json"])
    commit = hub.repos[repo].branches["main"]
    row = {"name": "baked − hooked", "value": 1e-12, "limit": 1e-9, "passed": True, "note": ""}
    content = {"plan_digest": record["plan"]["digest"], "passed": True, "rows": [row]}
    content |= {"artifact": f"{repo.partition('/')[2]}@{commit}", **changes}
    (report / "verify.json").write_text(json.dumps(content))
    (report / "verify.md").write_text("# Verification\n")
    (report / "plots" / "logits.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (report / "reproduction.json").write_text("{}")
    return report


def test_the_card_says_it_and_the_verification_comes_afterwards(
    xet: Worker, hub: HubServer, tmp_path: Path
) -> None:
    repo = "alice/later"
    path = recipe(tmp_path)
    done = xet.push(path, repo, "--low-disk", "--unverified", cwd=tmp_path)
    assert done.code == 0, done.out
    before = hub.repos[repo].files()
    first = first_line_of(before["README.md"].decode())
    assert re.search("not verified|unverified", first, re.IGNORECASE), first
    assert any(f"bake verify hf://{repo}" in note for note in done.data["notes"])

    sent = hub.uploaded()
    report = report_of(tmp_path, hub, repo)
    added = xet.push(report, repo, "--record", "--verify-download", cwd=tmp_path)
    assert added.code == 0, added.out
    after = hub.repos[repo].files()
    assert hub.uploaded() - sent < 10_000  # no weight is sent again
    changed = {name for name in after if after[name] != before.get(name)}
    wanted = {"verify.json", "verify.md", "plots/logits.png", "README.md", "SHA256SUMS"}
    assert changed == wanted and set(before) <= set(after)
    assert not re.search(
        "not verified|unverified", first_line_of(after["README.md"].decode()), re.IGNORECASE
    )
    assert added.data["outcome"] == "published and verified" and added.data["unverified"] is None
    assert hub.repos[repo].titles[-1].startswith("Add a verification of plan")
    assert len(hub.repos[repo].tags) == 2

    there = xet.download(repo)
    checked = xet.run("check", there)
    assert checked.code == 0 and checked.data["verified"], checked.out
    again = xet.push(report, repo, "--record", cwd=tmp_path)
    assert again.code == 0 and again.data["unchanged"], again.out

    held = hub.repos[repo]  # a card that was edited on the Hub's own pages is somebody's
    mine = after["README.md"] + b"\nMine.\n"
    edited = {**held.commits[held.branches["main"]], "README.md": hub.keep(held, "README.md", mine)}
    held.commit(edited, "by hand")
    kept = xet.push(report_of(tmp_path, hub, repo), repo, "--record", cwd=tmp_path)
    assert kept.code == 0 and held.files()["README.md"] == mine, kept.out
    assert (
        "README.md was edited and stays as it is: see whether it still holds" in kept.data["notes"]
    )


def test_a_verification_of_something_else_is_not_added(
    xet: Worker, hub: HubServer, tmp_path: Path
) -> None:
    repo = "alice/else"
    assert push(xet, tmp_path, repo).code == 0
    titles = len(hub.repos[repo].titles)
    commit = hub.repos[repo].branches["main"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"plan_digest": "sha256:" + "0" * 64}, "verifies the plan sha256:0000"),
        ({"passed": False}, "the verification failed"),
        ({"rows": []}, "holds no comparison that passed"),
        ({"artifact": "else@" + "0" * 40}, "alice/else has no such branch or commit"),
    ]
    for changes, message in cases:
        report = report_of(tmp_path, hub, repo, **changes)
        done = xet.push(report, repo, "--record", "--no-card", cwd=tmp_path)
        assert done.code in (4, 5) and message in done.error, done.out
    report = report_of(tmp_path, hub, repo)
    (report / "model.safetensors").write_bytes(b"x")
    done = xet.push(report, repo, "--record", "--no-card", cwd=tmp_path)
    assert done.code == 4 and "holds model.safetensors, which is no part" in done.error
    (report / "model.safetensors").unlink()
    for other, message in (
        (BASE, "holds no artifact that bake has published"),
        ("alice/nothing", "alice/nothing is not on the Hub"),
    ):
        done = xet.push(report, other, "--record", "--no-card", cwd=tmp_path)
        assert done.code == 5 and message in done.error, done.out

    held = hub.repos[repo]  # somebody changes a file on the Hub's own pages
    config = hub.keep(held, "config.json", held.files()["config.json"] + b"\n")
    held.commit({**held.commits[commit], "config.json": config}, "by hand")
    done = xet.push(report, repo, "--record", "--no-card", cwd=tmp_path)
    assert done.code == 5 and "does not hold what was sealed: config.json" in done.error, done.out
    assert len(held.titles) == titles + 1


@pytest.mark.slow
def test_the_quickstart_from_recipe_to_verified_publication(
    xet: Worker, hub: HubServer, tmp_path: Path
) -> None:
    """Baked shard by shard, verified from the Hub, and verified again beside what was published."""
    files = base_files(QUICKSTART / "quickstart" / "model")
    hub.add_repo("meta/stories", files, private=False)
    given = ("--low-disk", "--unverified", "--model", "meta/stories")
    path, repo = QUICKSTART / "quickstart.toml", "alice/stories"
    done = xet.push(path, repo, *given, "--verify-download", cwd=tmp_path)
    assert done.code == 0 and done.data["outcome"] == "published and verified", done.out
    measured = xet.run("verify", f"hf://{repo}", cwd=tmp_path)
    assert measured.code == 0, measured.out
    added = xet.push(tmp_path / "verify-stories", repo, "--record", cwd=tmp_path)
    assert added.code == 0 and added.data["unverified"] is None, added.out
    again = xet.run("verify", f"hf://{repo}", "--report", tmp_path / "again", cwd=tmp_path)
    assert again.code == 0, again.out
    assert again.data["reproduction"]["verification"] is not None
    there = xet.download(repo)
    checked = xet.run("check", there)
    assert checked.code == 0 and checked.data["verified"], checked.out
    assert not [name for name in hub.repos[repo].files() if name.startswith("reproduction")]


def held_by(hub: HubServer, repo: str) -> set[str]:
    return {f.sha256 for files in hub.repos[repo].commits.values() for f in files.values()}


def test_a_disk_that_is_too_small_even_for_that(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    model = harness.base_at(base)
    map_ = make.ablate(harness.vector(model.layout.hidden))
    plan = harness.plan_of(model, [harness.edit(model, "ablate", map_, EDITED)])
    record = {"base": {"model": "base", "revision": None, "path": "../base"}}
    work = Work(plan, model.checkpoint, record, frozenset(), tmp_path / "out")
    largest = max(p.stat().st_size for p in base.glob("*.safetensors"))
    room = SimpleNamespace(total=1, used=1, free=largest)
    monkeypatch.setattr("bake.publish.low_disk.shutil.disk_usage", lambda path: room)
    with pytest.raises(CheckpointError) as caught:
        push_low_disk(work, Destination("alice/small"), Terms(unverified=True))
    assert f"free {largest}" in str(caught.value) and "on another disk" in str(caught.value)
    with pytest.raises(UsageError, match="cannot have been verified here"):
        push_low_disk(work, Destination("alice/small"), Terms())
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_in_one_folder(xet: Worker, hub: HubServer, tmp_path: Path) -> None:
    import fcntl

    place = tmp_path / ".busy.bake-push"
    place.mkdir()
    with (place / "lock").open("a+b", buffering=0) as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        done = push(xet, tmp_path, "alice/busy")
    assert done.code == 2 and "another run of bake is writing" in done.error
    os.unlink(place / "lock")  # noqa: PTH108
    (place / "mine.txt").write_text("x")
    done = push(xet, tmp_path, "alice/busy")
    assert done.code == 2 and "is in the way and is not bake's" in done.error
    assert (place / "mine.txt").exists()


def written(hub: HubServer) -> int:
    """Return how many requests could have changed something."""
    return len([request for request in hub.log if request.method in ("POST", "PUT", "DELETE")])
