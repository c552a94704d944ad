"""``bake push REPORT owner/name --record``: a verification that is made after the push."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from published import (
    BASE,
    CLIENTS,
    Worker,
    base_files,
    client_of,
    copy_of,
    hub_with,
    make_artifact,
    record_again,
    rewrite,
    sharded_base,
    worker_at,
)

from bake.artifact.frontmatter import first_line_of

QUICKSTART = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that nobody has verified, and that has no card."""
    folder = tmp_path_factory.mktemp("record")
    out = make_artifact(sharded_base(folder / "base"), folder / "out")
    (out / "verify.json").unlink()
    (out / "README.md").unlink()
    return out


@pytest.fixture(scope="module", params=CLIENTS)
def hub(
    request: pytest.FixtureRequest, artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[HubServer, Worker]]:
    """A server and a process, with both generations of the Hub's client."""
    home, extra = tmp_path_factory.mktemp("home"), client_of(request.param)
    with hub_with(artifact.parent / "base") as hub, worker_at(hub, home, extra) as worker:
        yield hub, worker


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


def test_the_verification_comes_afterwards_and_the_card_says_it(
    hub: tuple[HubServer, Worker], artifact: Path, tmp_path: Path
) -> None:
    server, worker = hub
    repo = "alice/later"
    done = worker.push(copy_of(artifact, tmp_path / "later"), repo, "--unverified")
    assert done.code == 0, done.out
    before = server.repos[repo].files()
    first = first_line_of(before["README.md"].decode())
    assert re.search("not verified|unverified", first, re.IGNORECASE), first

    sent = server.uploaded()
    report = report_of(tmp_path, server, repo)
    added = worker.push(report, repo, "--record", "--verify-download", cwd=tmp_path)
    assert added.code == 0, added.out
    after = server.repos[repo].files()
    assert server.uploaded() - sent < 10_000  # no weight is sent again
    changed = {name for name in after if after[name] != before.get(name)}
    wanted = {"verify.json", "verify.md", "plots/logits.png", "README.md", "SHA256SUMS"}
    assert changed == wanted and set(before) <= set(after)
    assert not re.search(
        "not verified|unverified", first_line_of(after["README.md"].decode()), re.IGNORECASE
    )
    assert added.data["outcome"] == "published and verified" and added.data["unverified"] is None
    assert server.repos[repo].titles[-1].startswith("Add a verification of plan")
    assert len(server.repos[repo].tags) == 2

    there = worker.download(repo)
    checked = worker.run("check", there)
    assert checked.code == 0 and checked.data["verified"], checked.out
    again = worker.push(report, repo, "--record", cwd=tmp_path)
    assert again.code == 0 and again.data["unchanged"], again.out

    held = server.repos[repo]  # a card that was edited on the Hub's own pages is somebody's
    mine = after["README.md"] + b"\nMine.\n"
    edited = held.commits[held.branches["main"]]
    held.commit({**edited, "README.md": server.keep(held, "README.md", mine)}, "by hand")
    kept = worker.push(report_of(tmp_path, server, repo), repo, "--record", cwd=tmp_path)
    assert kept.code == 0 and held.files()["README.md"] == mine, kept.out
    assert (
        "README.md was edited and stays as it is: see whether it still holds" in kept.data["notes"]
    )


def test_a_verification_of_something_else_is_not_added(
    hub: tuple[HubServer, Worker], artifact: Path, tmp_path: Path
) -> None:
    server, worker = hub
    repo = "alice/else"
    out = copy_of(artifact, tmp_path / "else")
    assert worker.push(out, repo, "--unverified", "--no-card").code == 0
    titles = len(server.repos[repo].titles)
    commit = server.repos[repo].branches["main"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"plan_digest": "sha256:" + "0" * 64}, "verifies the plan sha256:0000"),
        ({"passed": False}, "the verification failed"),
        ({"rows": []}, "holds no comparison that passed"),
        ({"artifact": "else@" + "0" * 40}, "alice/else has no such branch or commit"),
    ]
    for changes, message in cases:
        report = report_of(tmp_path, server, repo, **changes)
        done = worker.push(report, repo, "--record", "--no-card", cwd=tmp_path)
        assert done.code in (4, 5) and message in done.error, done.out
    report = report_of(tmp_path, server, repo)
    (report / "model.safetensors").write_bytes(b"x")
    done = worker.push(report, repo, "--record", "--no-card", cwd=tmp_path)
    assert done.code == 4 and "holds model.safetensors, which is no part" in done.error
    (report / "model.safetensors").unlink()
    for other, message in (
        (BASE, "holds no artifact that bake has published"),
        ("alice/nothing", "alice/nothing is not on the Hub"),
    ):
        done = worker.push(report, other, "--record", "--no-card", cwd=tmp_path)
        assert done.code == 5 and message in done.error, done.out
    for option, message in (
        ("--dry-run", "--record has no --dry-run"),
        ("--sign", "needs every file in one place"),
        ("--create-pr", "opens no pull request"),
    ):
        more = ["k.pem"] if option == "--sign" else []
        done = worker.push(report, repo, "--record", option, *more, cwd=tmp_path)
        assert done.code == 2 and message in done.error, done.out

    held = server.repos[repo]  # somebody changes a file on the Hub's own pages
    config = server.keep(held, "config.json", held.files()["config.json"] + b"\n")
    held.commit({**held.commits[commit], "config.json": config}, "by hand")
    done = worker.push(report, repo, "--record", "--no-card", cwd=tmp_path)
    assert done.code == 5 and "does not hold what was sealed: config.json" in done.error, done.out
    assert len(held.titles) == titles + 1


def test_a_verification_of_files_that_have_changed_since_is_not_added(
    hub: tuple[HubServer, Worker], artifact: Path, tmp_path: Path
) -> None:
    """What the repository holds is sealed and of the same plan; only the commit tells."""
    server, worker = hub
    repo, out = "alice/since", copy_of(artifact, tmp_path / "since")
    assert worker.push(out, repo, "--unverified").code == 0
    report = report_of(tmp_path, server, repo)
    rewrite(out / "config.json", lambda found: {**found, "bos_token_id": 0})
    record_again(out)
    (out / "SHA256SUMS").unlink()  # sealed anew
    assert worker.push(out, repo, "--unverified").code == 0
    held = len(server.repos[repo].titles)
    done = worker.push(report, repo, "--record", cwd=tmp_path)
    assert done.code == 4 and "bake.json has changed since" in done.error, done.out
    assert len(server.repos[repo].titles) == held
    again = worker.push(report_of(tmp_path, server, repo), repo, "--record", cwd=tmp_path)
    assert again.code == 0, again.out  # the control: of these files


@pytest.mark.slow
def test_the_quickstart_from_recipe_to_verified_publication(
    hub: tuple[HubServer, Worker], tmp_path: Path
) -> None:
    """Baked from the Hub, verified from the Hub, and again beside what was published."""
    server, worker = hub
    files = base_files(QUICKSTART / "quickstart" / "model")
    server.add_repo("meta/stories", files, private=False)
    shutil.copytree(QUICKSTART, tmp_path / "recipes")
    made = ("--model", "meta/stories", "--out", tmp_path / "stories")
    done = worker.run("export", tmp_path / "recipes" / "quickstart.toml", *made, cwd=tmp_path)
    assert done.code == 0, done.out
    repo = "alice/stories"
    done = worker.push(tmp_path / "stories", repo, "--unverified", "--verify-download")
    assert done.code == 0 and done.data["outcome"] == "published and verified", done.out
    measured = worker.run("verify", f"hf://{repo}", cwd=tmp_path)
    assert measured.code == 0, measured.out
    added = worker.push(tmp_path / "verify-stories", repo, "--record", cwd=tmp_path)
    assert added.code == 0 and added.data["unverified"] is None, added.out
    place = ("--report", tmp_path / "again", "--no-plots")
    again = worker.run("verify", f"hf://{repo}", *place, cwd=tmp_path)
    assert again.code == 0, again.out
    assert again.data["reproduction"]["verification"] is not None
    there = worker.download(repo)
    checked = worker.run("check", there)
    assert checked.code == 0 and checked.data["verified"], checked.out
    assert not [name for name in server.repos[repo].files() if name.startswith("reproduction")]
