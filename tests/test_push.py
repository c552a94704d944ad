"""Publishing, with the real client, to a Hub on this machine that speaks LFS and Xet and fails."""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import programs
import pytest
import tiny
import torch
from folders import files_of
from hub_server import HubServer
from published import (
    BASE,
    CARD,
    CLIENTS,
    TOKEN,
    Worker,
    base_files,
    client_of,
    copy_of,
    environment,
    hub_with,
    make_artifact,
    record_again,
    rewrite,
    sharded_base,
    write_verification,
)
from safetensors.torch import load_file, save_file

from bake.artifact.frontmatter import first_line_of
from bake.checkpoints import open_checkpoint

STRANGER = "hf_" + "S" * 34
READER = "hf_" + "R" * 34
LFS = {"HF_HUB_DISABLE_XET": "1"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded_base(tmp_path_factory.mktemp("push") / "base")


@pytest.fixture(scope="module")
def artifact(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(base, tmp_path_factory.mktemp("made") / "out")


@pytest.fixture(scope="module", params=CLIENTS)
def client(request: pytest.FixtureRequest) -> dict[str, str]:
    """Every case runs with both generations of the Hub's client."""
    return client_of(request.param)


@pytest.fixture(scope="module")
def hub(base: Path, client: dict[str, str]) -> Iterator[HubServer]:
    with hub_with(base) as state:
        state.add_user(TOKEN, "alice", orgs=("lab",))
        state.add_user(READER, "reader", role="read")
        state.add_user(STRANGER, "stranger")
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
    assert made["lfs"].version().startswith("1.31." if client else "2.")
    yield made
    for worker in made.values():
        worker.stop()
    for worker in made.values():
        # Promise 8 and 9, over everything that happened in this file, with debug logging on.
        assert "Send: curl" in worker.log.read_text(errors="replace") or len(worker.said) < 2
        for token in (TOKEN, STRANGER, READER):
            assert token not in worker.traces()
    assert not any(request.token for request in hub.log if request.at == "store")
    assert any(request.token for request in hub.log if request.at == "hub")


@pytest.fixture
def xet(workers: dict[str, Worker], hub: HubServer) -> Iterator[Worker]:
    yield from clean(workers["xet"], hub)


@pytest.fixture
def lfs(workers: dict[str, Worker], hub: HubServer) -> Iterator[Worker]:
    yield from clean(workers["lfs"], hub)


def clean(worker: Worker, hub: HubServer) -> Iterator[Worker]:
    hub.copying = True
    hub.repos[BASE].private, hub.repos[BASE].gated = False, False
    start = len(hub.log)
    yield worker
    unused = [fault for fault in hub.faults if 0 < fault.times < 50]
    hub.faults.clear()
    assert not unused, "a fault was planned and never met"
    assert len(hub.log) >= start


@pytest.fixture
def out(artifact: Path, tmp_path: Path) -> Path:
    return copy_of(artifact, tmp_path / "out")


def commits(hub: HubServer, repo: str) -> int:
    """Return how many commits a repository has beside its first one."""
    return len(hub.repos[repo].titles) - 1


# --- it arrives --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["xet", "lfs"])
def test_round_trip(
    way: str, workers: dict[str, Worker], hub: HubServer, out: Path, request: pytest.FixtureRequest
) -> None:
    worker: Worker = request.getfixturevalue(way)
    repo = f"alice/round-{way}"
    start = len(hub.log)
    done = worker.push(out, repo)
    assert done.code == 0, done.out
    told, held = done.data, hub.repos[repo]

    assert held.files() == files_of(out)  # byte for byte, and nothing else
    assert held.private and not told["public"] and commits(hub, repo) == 1
    assert held.tags == {told["tag"]: told["commit"]} and told["tag"].startswith("bake-")
    assert told["tag"].removeprefix("bake-") == told["digest"][:12]
    shards = [name for name in files_of(out) if name.startswith("model-")]
    assert len(told["copied"]) == len(shards) - 1  # one shard was edited
    assert set(told["uploaded"]) | set(told["copied"]) == set(files_of(out))
    order = [
        r.path.partition("?")[0].split("/")[-2 if "/commit/" in r.path else -1]
        for r in hub.log[start:]
        if r.method in ("POST", "PUT") and r.at == "hub"
    ]
    assert order.index("create") < order.index("commit") < len(order) - 1
    assert "settings" not in order and order.count("commit") == 1
    receipt = json.loads((out.parent / "out.push.json").read_text())
    assert (receipt["commit"], receipt["digest"]) == (told["commit"], told["digest"])
    assert receipt["versions"]["huggingface_hub"]

    start = len(hub.log)
    again = worker.push(out, repo)
    assert again.code == 0 and again.data["unchanged"] and commits(hub, repo) == 1
    assert again.data["commit"] == told["commit"]
    assert not any("preupload" in r.path or r.at == "store" for r in hub.log[start:])

    there = worker.download(repo)
    assert {n: d for n, d in files_of(there).items() if n != ".gitattributes"} == files_of(out)
    checked = worker.run("check", there)
    assert checked.code == 0 and checked.data["digest"] == told["digest"], checked.out
    assert tiny.load(there, torch.float32).config.model_type == "llama"
    # and bake takes it as a base, although 2.x keeps what came in chunks outside of the repository
    opened = worker.order(open=repo, env={"HF_TOKEN": TOKEN})
    assert opened.out == open_checkpoint(out).digest()


def test_a_change_is_a_second_commit_of_what_changed(
    xet: Worker, hub: HubServer, out: Path
) -> None:
    assert xet.push(out, "lab/change").code == 0
    (out / "notes.md").write_text("More.")
    (out / "README.md").write_text(CARD + "\nMore.\n")
    second = xet.push(out, "lab/change")
    changed = ["README.md", "SHA256SUMS", "bake/provenance.json", "notes.md"]
    assert sorted(second.data["uploaded"]) == changed
    (out / "notes.md").unlink()
    (out / "SHA256SUMS").unlink()
    third = xet.push(out, "lab/change")
    assert third.data["deleted"] == ["notes.md"]
    assert commits(hub, "lab/change") == 3 and len(hub.repos["lab/change"].tags) == 3
    assert hub.repos["lab/change"].files() == files_of(out)


def test_what_others_put_there_stays(xet: Worker, hub: HubServer, out: Path) -> None:
    repo = "lab/others"
    assert xet.push(out, repo).code == 0
    held = hub.repos[repo]

    def by_hand(**texts: str) -> None:
        mine = {name: hub.keep(held, name, text.encode()) for name, text in texts.items()}
        held.commit({**held.commits[held.branches["main"]], **mine}, "by hand")

    by_hand(**{"about.md": "Mine."})
    (out / "notes.md").write_text("More.")
    second = xet.push(out, repo)
    assert second.code == 0 and second.data["deleted"] == [], second.out
    assert "kept, since bake did not put it there: about.md" in second.data["notes"]
    assert hub.repos[repo].files() == {**files_of(out), "about.md": b"Mine."}
    # What is published and what somebody put there have one name.
    (out / "about.md").write_text("Not mine.")
    (out / "SHA256SUMS").unlink()
    taken = xet.push(out, repo)
    assert taken.code == 5 and "about.md is on the Hub already" in taken.error
    (out / "about.md").unlink()
    (out / "SHA256SUMS").unlink()
    # A card that somebody edited is replaced when that is said.
    by_hand(**{"README.md": CARD + "\nMine.\n"})
    for options in ((), ("--dry-run",)):
        refused = xet.push(out, repo, *options)
        assert refused.code == 5 and "README.md was edited on the Hub" in refused.error
    assert hub.repos[repo].files()["README.md"].endswith(b"Mine.\n")
    assert xet.push(out, repo, "--force-card").code == 0
    assert hub.repos[repo].files() == {**files_of(out), "about.md": b"Mine."}


def test_public_comes_last_and_when_asked(xet: Worker, hub: HubServer, out: Path) -> None:
    seen: list[tuple[bool, int, int]] = []
    repo = "alice/public"

    def look() -> None:
        held = hub.repos[repo]
        seen.append((held.private, len(held.tags), commits(hub, repo)))

    hub.fault("PUT", "/settings", look)
    done = xet.push(out, repo, "--public")
    assert done.code == 0 and done.data["public"]
    assert seen == [(True, 1, 1)] and not hub.repos[repo].private

    (out / "README.md").write_text(CARD + "\nMore.\n")
    refused = xet.push(out, repo)
    assert refused.code == 5 and "is public: everybody would see this at once" in refused.error
    assert commits(hub, repo) == 1
    assert xet.push(out, repo, "--public").code == 0 and commits(hub, repo) == 2


def test_a_branch_and_a_pull_request(xet: Worker, hub: HubServer, out: Path) -> None:
    repo = "alice/branches"
    assert xet.push(out, repo, "--revision", "v2").code == 0
    assert hub.repos[repo].files("v2") == files_of(out) and hub.repos[repo].files("main") == {}
    assert xet.push(out, repo, "--revision", "v2").data["unchanged"]

    hub.add_repo("other/theirs", {"README.md": b"# theirs", "x.txt": b"x"}, private=False)
    before = hub.repos["other/theirs"].branches["main"]
    proposed = xet.push(out, "other/theirs", "--create-pr")
    assert proposed.code == 0, proposed.out
    assert proposed.data["url"].endswith("/other/theirs/discussions/1")
    theirs = hub.repos["other/theirs"]
    assert theirs.branches["main"] == before and theirs.tags == {}
    # Whoever owns the repository decides; what a pull request does not replace, it leaves there.
    assert theirs.files("refs/pr/1") == {**files_of(out), "x.txt": b"x"}
    again = xet.push(out, "other/theirs", "--create-pr")
    assert again.data["url"] == proposed.data["url"] and len(theirs.pulls) == 1

    (out / "README.md").write_text(CARD + "\nMore.\n")
    hub.fault("POST", "theirs/commit/", "lost")
    second = xet.push(out, "other/theirs", "--create-pr")
    assert second.data["url"].endswith("/discussions/2") and len(theirs.pulls) == 2
    missing = xet.push(out, "other/nowhere", "--create-pr")
    assert missing.code == 5 and "other/nowhere is not on the Hub" in missing.error


def test_a_dry_run_writes_nothing(xet: Worker, hub: HubServer, artifact: Path) -> None:
    before, start = files_of(artifact), len(hub.log)
    done = xet.push(artifact, "alice/dry", "--dry-run")
    assert done.code == 0 and done.data["dry_run"] and done.data["commit"] == ""
    assert "alice/dry would be created, private" in done.data["notes"]
    assert len(done.data["copied"]) == 4 and "SHA256SUMS" in done.data["uploaded"]
    assert {r.method for r in hub.log[start:]} == {"GET"}
    assert "alice/dry" not in hub.repos and files_of(artifact) == before
    assert not (artifact.parent / "out.push.json").exists()
    start = len(hub.log)
    stranger = xet.push(artifact, "alice/dry", "--dry-run", HF_TOKEN="")
    assert stranger.code == 0 and "there is no token of it" in " ".join(stranger.data["notes"])
    offline = xet.push(artifact, "alice/dry", "--dry-run", offline=True)
    assert offline.code == 0 and len(hub.log) == start
    assert offline.data["digest"] == done.data["digest"]


# --- somebody else -----------------------------------------------------------------------------


def test_of_two_at_once_one_wins(
    workers: dict[str, Worker], hub: HubServer, out: Path, tmp_path: Path
) -> None:
    repo = "lab/race"
    assert workers["xet"].push(out, repo).code == 0
    other = copy_of(out, tmp_path / "other")
    (out / "README.md").write_text(CARD + "\nOne.\n")
    (other / "README.md").write_text(CARD + "\nTwo.\n")
    both = threading.Barrier(2)
    hub.fault("POST", "race/commit/", lambda: both.wait(30), times=2)
    ended: dict[str, Any] = {}
    pairs = {"xet": out, "lfs": other}

    def run(way: str) -> None:
        ended[way] = workers[way].push(pairs[way], repo)

    threads = [threading.Thread(target=run, args=(way,)) for way in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = {way: outcome.code for way, outcome in ended.items()}
    assert sorted(codes.values()) == [0, 5]
    winner, loser = sorted(codes, key=lambda way: codes[way])
    assert "somebody has committed to lab/race since; nothing was changed" in ended[loser].error
    assert hub.repos[repo].files() == files_of(pairs[winner]) and commits(hub, repo) == 2
    assert workers[loser].push(pairs[loser], repo).code == 0  # and run again, it works


def test_the_same_artifact_at_once_is_a_success(xet: Worker, hub: HubServer, out: Path) -> None:
    repo = "alice/twins"

    def somebody_pushes_the_same() -> None:
        held = hub.repos[repo]
        stored = {name: hub.keep(held, name, data) for name, data in files_of(out).items()}
        held.commit({**held.commits[held.branches["main"]], **stored}, "the same")

    hub.fault("POST", "twins/commit/", somebody_pushes_the_same)
    assert xet.push(out, repo).code == 0 and commits(hub, repo) == 1


def test_what_is_not_ours_is_not_overwritten(xet: Worker, hub: HubServer, out: Path) -> None:
    hub.add_repo("alice/mine", {"model.safetensors": b"years of work"})
    refused = xet.push(out, "alice/mine")
    assert refused.code == 5
    assert "alice/mine exists and holds something that bake did not make" in refused.error
    assert "--create-pr" in refused.error and commits(hub, "alice/mine") == 1


# --- downloaded again --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["xet", "lfs"])
def test_the_download_is_compared_before_the_tag_and_the_public_view(
    way: str, workers: dict[str, Worker], hub: HubServer, out: Path, request: pytest.FixtureRequest
) -> None:
    worker: Worker = request.getfixturevalue(way)
    repo, start = f"alice/verified-{way}", len(hub.log)
    done = worker.push(out, repo, "--verify-download", "--public")
    assert done.code == 0 and done.data["outcome"] == "published and verified", done.out
    receipt = json.loads((out.parent / "out.push.json").read_text())
    assert receipt["outcome"] == "published and verified" and receipt["unverified"] is None
    paths = [r.path for r in hub.log[start:]]
    downloads = [n for n, path in enumerate(paths) if "/resolve/" in path or "/files/" in path]
    (tag,) = (n for n, path in enumerate(paths) if "/tag/" in path)
    (show,) = (n for n, path in enumerate(paths) if "/settings" in path)
    assert downloads and max(downloads) < tag < show
    assert sorted(p.name for p in out.parent.iterdir()) == ["out", "out.push.json"]
    plain = worker.push(out, repo, "--public")
    assert plain.data["outcome"] == "published but unverified" and plain.data["unchanged"]


def test_bytes_that_come_back_changed_are_told(lfs: Worker, hub: HubServer, out: Path) -> None:
    repo = "alice/changed"
    lfs.push(out, repo)
    lfs.download(repo)  # what is in the cache already proves nothing of the Hub
    held = hub.repos[repo]
    held.tags.clear()
    hub.fault("GET", "/files/", "corrupt")
    done = lfs.push(out, repo, "--verify-download", "--public")
    assert done.code == 5, done.out
    assert "alice/changed is published but unverified: 1 files came back" in done.error
    (name,) = (n for n in files_of(out) if f"other bytes, {n} |" in done.error)
    assert name.endswith(".safetensors") and held.private and held.tags == {}
    receipt = json.loads((out.parent / "out.push.json").read_text())
    assert receipt["outcome"] == "published but unverified"
    again = lfs.push(out, repo, "--verify-download", "--public")
    assert again.code == 0 and not held.private and len(held.tags) == 1  # the way on


def test_a_download_that_fails_is_no_verification(lfs: Worker, hub: HubServer, out: Path) -> None:
    assert lfs.push(out, "alice/away").code == 0
    hub.fault("GET", "/files/", 403, 100)
    done = lfs.push(out, "alice/away", "--verify-download")
    assert done.code == 5 and "may not read" in done.error, done.out
    assert "while downloading bake/edits.safetensors" in done.error


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
    np.save(tmp_path / "mood.npy", np.arange(1.0, 1 + config["hidden_size"]))
    (tmp_path / "recipe.toml").write_text(
        'title = "Less"\n[base]\nmodel = "meta/trap"\n[directions.mood]\nfile = "mood.npy"\n'
        '[[edits]]\nkind = "ablate"\ndirection = "mood"\nat = ["attn_out.0"]\n'
    )
    made = xet.run("export", tmp_path / "recipe.toml", "--out", tmp_path / "out", cwd=tmp_path)
    assert made.code == 0, made.out
    wanted = (tmp_path / "out", "alice/trap", "--unverified", "--no-card")
    refused = xet.push(*wanted)
    assert refused.code == 4 and "alice/trap" not in hub.repos
    assert "is code, which is published with --allow code only" in refused.error
    assert "names code that a reader would run" in refused.error
    done = xet.push(*wanted, "--allow", "code")
    assert done.code == 0 and "modeling_trap.py" in hub.repos["alice/trap"].files(), done.out
    assert not trap.exists()


# --- the card ----------------------------------------------------------------------------------


def test_a_card_is_generated_where_there_is_none(xet: Worker, hub: HubServer, out: Path) -> None:
    (out / "README.md").unlink()
    before = files_of(out)
    dry = xet.push(out, "alice/carded", "--dry-run")
    assert dry.code == 0 and "README.md" in dry.data["uploaded"], dry.out
    assert files_of(out) == before
    done = xet.push(out, "alice/carded")
    assert done.code == 0, done.out
    assert done.data["digest"] == dry.data["digest"]
    held = hub.repos["alice/carded"].files()
    assert held == files_of(out) and b"alice/carded" in held["README.md"]
    assert not admits(held["README.md"])
    assert xet.push(out, "alice/carded").data["unchanged"]

    # what bake wrote, it writes again when the records change; what somebody wrote, it leaves
    (out / "verify.json").unlink()
    refused = xet.push(out, "alice/carded")
    assert refused.code == 4 and "there is no verify.json" in refused.error
    assert (out / "README.md").read_bytes() == held["README.md"]  # nothing was touched
    bare = xet.push(out, "alice/carded", "--unverified")
    assert bare.code == 0 and bare.data["unverified"] == "there is no verify.json", bare.out
    assert admits(hub.repos["alice/carded"].files()["README.md"])
    (out / "README.md").write_text(CARD)
    silent = xet.push(out, "alice/carded", "--unverified")
    assert silent.code == 4 and "does not say in its first line" in silent.error
    (out / "README.md").write_text(CARD.replace("# A", "> Not verified.\n\n# A"))
    assert xet.push(out, "alice/carded", "--unverified").code == 0


def test_a_signature_is_made_last_and_never_out_of_date(
    xet: Worker, hub: HubServer, out: Path, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from test_sign import write_key

    key = write_key(tmp_path / "key.pem", ec.generate_private_key(ec.SECP256R1()))
    done = xet.push(out, "alice/signed", "--sign", key)
    assert done.code == 0, done.out
    assert "model.sig" in done.data["uploaded"]
    held = hub.repos["alice/signed"].files()
    assert held == files_of(out) and key.read_bytes() not in held.values()
    there = xet.download("alice/signed")
    checked = xet.run("check", there, "--key", key.with_suffix(".pub"))
    assert checked.code == 0 and checked.data["signature"]["status"] == "valid", checked.out
    again = xet.push(out, "alice/signed", "--sign", key)
    assert again.data["unchanged"] and xet.push(out, "alice/signed").data["unchanged"]

    write_verification(out, note="another run")
    stale = xet.push(out, "alice/signed")
    assert stale.code == 4 and "verify.json is not what was signed" in stale.error, stale.out
    assert commits(hub, "alice/signed") == 1
    assert xet.push(out, "alice/signed", "--sign", key).code == 0
    nokey = xet.push(out, "alice/signed", "--sign", tmp_path / "none.pem")
    assert nokey.code == 4 and "none.pem" in nokey.error
    report = tmp_path / "report"
    report.mkdir()
    (report / "verify.json").write_bytes((out / "verify.json").read_bytes())
    added = xet.push(report, "alice/signed", "--record", cwd=tmp_path)
    assert added.code == 2 and "alice/signed is signed" in added.error, added.out


def admits(card: bytes) -> bool:
    """Tell whether the first line of a card says that nothing was verified."""
    return re.search("unverified|not verified", first_line_of(card.decode()), re.I) is not None


def test_the_token_is_in_nothing_that_is_written(xet: Worker, hub: HubServer, out: Path) -> None:
    """Promise 8, over the card, the receipt, the seal and the log, with debug logging on."""
    (out / "README.md").unlink()
    done = xet.push(out, "alice/written", "--verify-download")
    assert done.code == 0, done.out
    written = files_of(out.parent)
    assert {"out.push.json", "out/README.md", "out/SHA256SUMS"} <= set(written)
    assert not any(TOKEN.encode() in data for data in written.values())
    assert "Send: curl" in xet.log.read_text(errors="replace")  # the control: it does log
    assert TOKEN not in xet.traces()
    assert not any(TOKEN.encode() in data for data in hub.repos["alice/written"].files().values())


# --- the network -------------------------------------------------------------------------------

PASSING: dict[str, tuple[str, str, Any, int]] = {
    "the commit's reply is lost": ("POST", "/commit/", "lost", 1),
    "the commit never arrives": ("POST", "/commit/", "drop", 2),
    "503 on the commit": ("POST", "/commit/", 503, 2),
    "429 on the commit": ("POST", "/commit/", 429, 1),
    "503 on the upload": ("PUT", "/lfs/", 503, 2),
    "a socket drops in the upload": ("PUT", "/lfs/", "drop", 1),
    "503 while creating": ("POST", "/repos/create", 503, 1),
    "the creation's reply is lost": ("POST", "/repos/create", "lost", 1),
    "429 on whoami": ("GET", "whoami", 429, 1),
    "a socket drops on preupload": ("POST", "preupload", "drop", 1),
    "500 on the tag": ("POST", "/tag/", 500, 1),
    "the tag's reply is lost": ("POST", "/tag/", "lost", 1),
    "503 on the tree": ("GET", "/tree/", 503, 2),
    "503 on copying": ("POST", "/duplicate", 503, 1),
    "503 on batch": ("POST", "/objects/batch", 503, 1),
}


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_is_waited_out_without_a_second_commit(
    case: str, lfs: Worker, hub: HubServer, out: Path
) -> None:
    method, path, action, times = PASSING[case]
    repo = "alice/" + case.replace(" ", "-").replace("'", "")
    forget(hub)
    hub.fault(method, path, action, times, Retry_After="1")
    done = lfs.push(out, repo)
    assert done.code == 0, done.out
    assert commits(hub, repo) == 1 and hub.repos[repo].files() == files_of(out)
    assert len(hub.repos[repo].tags) == 1


def forget(hub: HubServer) -> None:
    """Have the storage lose what earlier tests have sent, so that it is sent again."""
    kept = {file.sha256 for files in hub.repos[BASE].commits.values() for file in files.values()}
    hub.blobs = {oid: data for oid, data in hub.blobs.items() if oid in kept}


@pytest.mark.parametrize("path", ["/v1/xorbs/", "/v2/shards", "xet-write-token"])
def test_xet_uploads_are_tried_again(
    path: str, xet: Worker, hub: HubServer, out: Path, tmp_path: Path
) -> None:
    repo = "alice/xet" + path.strip("/").replace("/", "-")
    (out / "plots").mkdir()
    (out / "plots" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(70_000))  # new chunks
    hub.fault("GET" if "token" in path else "POST", path, 503)
    done = xet.push(out, repo)
    assert done.code == 0, done.out
    assert commits(hub, repo) == 1 and hub.repos[repo].files() == files_of(out)


def test_a_xet_upload_that_lasts_is_one_clear_line(xet: Worker, hub: HubServer, out: Path) -> None:
    """Chunks fail with errors of Python's own, which say nothing of the Hub."""
    (out / "plots").mkdir()
    (out / "plots" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(70_000))
    hub.fault("POST", "/v1/xorbs/", 500, 100)
    done = xet.push(out, "alice/lasting")
    hub.faults.clear()
    assert done.code == 5, done.out
    content = done.data["error"]
    assert content["what"].startswith("the transfer with alice/lasting broke off: "), content
    assert "\n" not in content["what"] and "HF_HUB_DISABLE_XET=1" in content["fix"]
    assert commits(hub, "alice/lasting") == 0
    assert xet.push(out, "alice/lasting").code == 0


FAILING: dict[str, tuple[str, str, Any, str]] = {
    "429": ("GET", "whoami", 429, "the Hub limits the rate of your requests; it asks for 7 s"),
    "503": ("POST", "/commit/", 503, "the Hub answered 503 for alice/f-503"),
    "412": ("POST", "/commit/", 412, "somebody has committed to alice/f-412 since; nothing was"),
    "401": ("GET", "whoami", 401, "the Hub does not accept your token"),
    "403": ("POST", "/commit/", 403, "alice may not write to alice/f-403"),
    "drop": ("GET", "whoami", "drop", "cannot reach http://127.0.0.1:"),
    "upload": ("PUT", "/lfs/", 403, "alice may not write to alice/f-upload"),
    "stall": ("GET", "whoami", "stall", "did not answer in time"),
    "echo": ("POST", "/commit/", "echo", "no: <token>"),
    "gone": ("POST", "/commit/", 404, "alice/f-gone is not on the Hub"),
    "busy": ("POST", "/tag/", 409, ""),
    "drip": ("GET", "whoami", "drip", "bytes of an answer in 0.5 s"),
    "form": ("GET", "/tree/", "form", "is none that huggingface_hub reads: TypeError"),
    "day": ("POST", "/preupload", 429, "asks to wait 86,400 s before the next request"),
}


@pytest.mark.parametrize("case", FAILING)
def test_what_lasts_is_one_clear_line(case: str, lfs: Worker, hub: HubServer, out: Path) -> None:
    method, path, action, message = FAILING[case]
    repo = f"alice/f-{case}"
    forget(hub)
    hub.fault(method, path, action, 100, Retry_After="86400" if case == "day" else "7")
    done = lfs.push(out, repo, "--timeout", "0.5")
    if case == "busy":  # the tag is there already: as good as made
        assert done.code == 0
        return
    assert done.code == 5, done.out
    content = done.data["error"]
    assert content["type"] == "HubError" and message in content["what"], content
    assert "\n" not in content["what"] and content["fix"]
    assert repo not in hub.repos or commits(hub, repo) == 0
    hub.faults.clear()
    assert lfs.push(out, repo).code == 0  # the control, and the way on
    assert commits(hub, repo) == 1


def test_nobody_at_the_address_and_the_hub_switched_off(
    xet: Worker, hub: HubServer, out: Path
) -> None:
    start = len(hub.log)
    done = xet.push(out, "alice/off", offline=True)
    assert done.code == 5 and "publishing needs the Hub, which is switched off" in done.error
    assert len(hub.log) == start and not (out / "SHA256SUMS").exists()


def test_rights(xet: Worker, hub: HubServer, out: Path) -> None:
    reader = xet.push(out, "reader/x", HF_TOKEN=READER)
    assert reader.code == 5 and "reader may not write to reader/x" in reader.error
    elsewhere = xet.push(out, "other/x")
    assert elsewhere.code == 5 and "a namespace of yours (alice, lab)" in elsewhere.error
    wrong = xet.push(out, "alice/x", HF_TOKEN="hf_" + "W" * 34)
    assert wrong.code == 5 and "the Hub does not accept your token" in wrong.error
    none = xet.push(out, "alice/x", HF_TOKEN="")
    assert none.code == 5 and "there is no token of the Hub on this machine" in none.error
    assert not any(name in hub.repos for name in ("reader/x", "other/x", "alice/x"))
    for text in (reader, elsewhere, wrong, none):
        assert "hf_" not in text.out + text.err


def test_usage(xet: Worker, hub: HubServer, out: Path) -> None:
    start = len(hub.log)
    for args, message in (
        (("x",), "is no repository"),
        (("a/b@main",), "is no repository"),
        (("a/b", "--revision", "a" * 40), "is no branch"),
        (("a/b", "--public", "--create-pr"), "does not make a repository public"),
        (("a/b", "--allow", "all"), "'all' cannot be allowed"),
    ):
        done = xet.push(out, *args)
        assert done.code in (2, 4) and message in done.error, done.out
    assert len(hub.log) == start


# --- the base ----------------------------------------------------------------------------------


def test_untouched_tensors_are_compared_with_a_base_at_hand(
    xet: Worker, hub: HubServer, base: Path, out: Path
) -> None:
    """Promise 5: the record and the sums are made to agree, so that only the base can tell."""
    record = json.loads((out / "bake.json").read_text())
    changed = {row["name"] for row in record["plan"]["tensors"]}
    for shard in sorted(out.glob("model-*.safetensors")):
        tensors = load_file(shard)
        if not changed & tensors.keys():
            break
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    record_again(out)
    away = xet.push(out, "alice/tampered", "--dry-run")
    assert away.code == 0 and any("not on this machine" in note for note in away.data["notes"])
    xet.order(open=BASE, env={"HF_TOKEN": TOKEN})  # the base comes into the cache
    done = xet.push(out, "alice/tampered")
    shutil.rmtree(xet.home / "hub")
    assert done.code == 4 and "alice/tampered" not in hub.repos, done.out
    assert f"{shard.name} {name} differs from the base, and the plan leaves it" in done.error

    def local(found: dict[str, Any]) -> None:
        found["base"].update(model="a folder", revision=None, path=os.path.relpath(base, out))

    rewrite(out / "bake.json", local)
    again = xet.push(out, "alice/tampered", "--allow", "licence", "--dry-run")
    assert again.code == 4 and "differs from the base" in again.error, again.out


def test_a_base_that_cannot_be_copied_from(xet: Worker, hub: HubServer, out: Path) -> None:
    hub.copying = False
    done = xet.push(out, "alice/refused")
    assert done.code == 0 and done.data["copied"] == []
    assert hub.repos["alice/refused"].files() == files_of(out)
    assert commits(hub, "alice/refused") == 1


def test_a_gated_base(xet: Worker, hub: HubServer, out: Path) -> None:
    hub.repos[BASE].gated = "manual"
    done = xet.push(out, "alice/gated", "--public")
    assert done.code == 0 and done.data["copied"] == []  # its files cannot be read
    assert "the base is gated (manual): keep to its terms" in done.data["notes"]
    held = hub.repos["alice/gated"]
    assert not held.private and held.gated == "manual" and held.files() == files_of(out)


def test_a_base_that_is_not_there(xet: Worker, hub: HubServer, out: Path) -> None:
    hub.repos[BASE].private = True
    done = xet.push(out, "alice/nobase")
    assert done.code == 5 and f"{BASE} is not on the Hub, or your token" in done.error
    assert "alice/nobase" not in hub.repos


def test_the_bases_licence_decides(xet: Worker, hub: HubServer, out: Path) -> None:
    (out / "README.md").write_text(CARD.replace("apache-2.0", "mit0"))
    done = xet.push(out, "alice/licence")
    assert done.code == 4 and "states mit0 where the base has apache-2.0" in done.error
    assert "alice/licence" not in hub.repos
    assert xet.push(out, "alice/licence", "--allow", "licence").code == 0
    (out / "README.md").write_text(CARD.replace("apache-2.0", "gemma"))
    held = hub.repos[BASE]
    commit = json.loads((out / "bake.json").read_text())["base"]["revision"]
    before = held.commits[commit]
    held.commits[commit] = {
        **before,
        "README.md": hub.keep(held, "README.md", b"---\nlicense: gemma\n---\n"),
    }
    told = xet.push(out, "alice/gemma", "--allow", "licence", "--dry-run").data["notes"]
    held.commits[commit] = before
    assert any("Prohibited Use Policy" in note for note in told)


def test_the_hub_reads_the_card_before_anything_is_sent(
    xet: Worker, hub: HubServer, out: Path
) -> None:
    (out / "README.md").write_text(CARD + "\nbogus\n")
    start = len(hub.log)
    done = xet.push(out, "alice/card")
    assert done.code == 5 and "the Hub refuses the card" in done.error, done.out
    assert "license is bogus" in done.error
    assert not any("preupload" in r.path or r.at == "store" for r in hub.log[start:])


# --- what is there is what was sent ------------------------------------------------------------


def test_other_bytes_on_the_hub_are_neither_tagged_nor_shown(
    lfs: Worker, hub: HubServer, out: Path
) -> None:
    shard = (out / "model-00001-of-00005.safetensors").read_bytes()
    import hashlib

    oid = hashlib.sha256(shard).hexdigest()
    hub.fault("POST", "/commit/", lambda: hub.blobs.update({oid: shard[:-1] + b"\0"}))
    done = lfs.push(out, "alice/spoiled", "--public")
    hub.blobs[oid] = shard
    assert done.code == 5
    assert "does not hold what was sent: model-00001-of-00005.safetensors has other" in done.error
    held = hub.repos["alice/spoiled"]
    assert held.private and held.tags == {}
    again = lfs.push(out, "alice/spoiled", "--public")
    assert again.code == 0 and held.files() == files_of(out) and not held.private


def test_a_body_that_is_corrupted_on_the_way_down_is_found(
    lfs: Worker, hub: HubServer, out: Path
) -> None:
    assert lfs.push(out, "alice/down").code == 0
    hub.fault("GET", "/files/", "corrupt")
    there = lfs.download("alice/down")
    checked = lfs.run("check", there)
    assert checked.code == 4 and "is not what SHA256SUMS lists" in checked.error


def test_a_file_that_changes_meanwhile_stops_the_commit(
    xet: Worker, hub: HubServer, out: Path
) -> None:
    big, small = out / "model-00001-of-00005.safetensors", out / "verify.json"
    for number, path in enumerate((big, small)):
        kept = path.read_bytes()

        def change(path: Path = path, kept: bytes = kept) -> None:
            path.write_bytes(kept[:-1] + b" ")

        repo = f"alice/moving-{number}"
        hub.fault("POST", "/preupload/", change)
        done = xet.push(out, repo)
        path.write_bytes(kept)
        assert done.code == 4 and "changed while it was being published" in done.error, done.out
        assert commits(hub, repo) == 0
        assert xet.push(out, repo).code == 0


@pytest.mark.parametrize("way", ["xet", "lfs"])
def test_a_killed_upload_is_taken_up(
    way: str, hub: HubServer, client: dict[str, str], out: Path, tmp_path: Path
) -> None:
    (out / "plots").mkdir()
    for number in range(3):
        noise = b"\x89PNG\r\n\x1a\n" + os.urandom(300_000)
        (out / "plots" / f"{number}.png").write_bytes(noise)
    repo, reached = f"alice/killed-{way}", threading.Event()
    method, path = ("PUT", "/lfs/") if way == "lfs" else ("POST", "/v1/xorbs/")
    hang = threading.Event()

    def stop() -> None:
        reached.set()
        hang.wait(30)

    if way == "lfs":
        hub.fault(method, path, lambda: None)  # one file arrives
    hub.fault(method, path, stop, 4)
    process = programs.start(
        "from bake.cli import main; main()", "push", str(out), repo, "-q",
        env=environment(hub, tmp_path / "home", **client, **(LFS if way == "lfs" else {})),
        kind=None if client else programs.COMMAND,
    )  # fmt: skip
    assert reached.wait(60)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    hang.set()
    hub.faults.clear()
    assert commits(hub, repo) == 0 and hub.repos[repo].private
    second = Worker(hub, tmp_path / "home", {**client, **(LFS if way == "lfs" else {})})
    start = len(hub.log)
    done = second.push(out, repo)
    second.stop()
    assert done.code == 0, done.out
    assert commits(hub, repo) == 1 and hub.repos[repo].files() == files_of(out)
    if way == "lfs":  # what arrived is not sent again
        assert len([r for r in hub.log[start:] if r.method == "PUT"]) < 4
    assert [p for p in out.parent.iterdir() if p.name.startswith(".out")] == []


# --- how much is sent --------------------------------------------------------------------------

LARGE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def large(
    hub: HubServer, workers: dict[str, Worker], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A base of about 23 MB whose chunks the storage has, because they were sent from here."""
    path = tmp_path_factory.mktemp("large") / "base"
    model = tiny.make_model("llama", dtype=torch.float32, **LARGE)
    tiny.write_checkpoint(model, path)
    hub.add_repo("meta/large", base_files(path), private=False)
    whole = make_artifact(path, path.parent / "whole", ("mlp_out.1",), model="meta/large")
    for shard in path.glob("*.safetensors"):
        (whole / shard.name).write_bytes(shard.read_bytes())
    record_again(whole)
    hub.copying = False
    assert workers["xet"].push(whole, "alice/whole").code == 0
    return path


@pytest.mark.parametrize(
    "kind, at, edited, limit",
    [
        ("ablate", ("mlp_out.*", "attn_out.0"), (0.28, 0.32), 0.35),
        ("offset", ("attn_out.0",), (0.00005, 0.0002), 0.01),
    ],
)
def test_bytes_sent_for_a_partial_edit_over_xet(
    kind: str,
    at: tuple[str, ...],
    edited: tuple[float, float],
    limit: float,
    xet: Worker,
    hub: HubServer,
    large: Path,
    tmp_path: Path,
) -> None:
    """All is in one file and nothing is copied: what is saved, the chunks save."""
    hub.copying = False
    out = make_artifact(large, tmp_path / "part", at, kind=kind, model="meta/large")
    total = sum(p.stat().st_size for p in large.glob("*.safetensors"))
    plan = json.loads((out / "bake.json").read_text())["plan"]
    size = sum(row["bytes"] for row in plan["tensors"]) + 4 * sum(b["size"] for b in plan["biases"])
    assert edited[0] < size / total < edited[1]  # the effect: as much as the case says
    before = hub.uploaded()
    done = xet.push(out, f"alice/part-{kind}")
    assert done.code == 0 and done.data["copied"] == [], done.out
    sent = hub.uploaded() - before
    print(f"{kind}: edited {size / total:.4%}, sent {sent / total:.4%} of {total:,} bytes")
    assert size * 0.5 < sent < limit * total, (sent / total, size / total)
    assert hub.repos[f"alice/part-{kind}"].files() == files_of(out)
