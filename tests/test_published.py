"""Commands on published artifacts, with the real client and a Hub on this machine.

Everything is done as a stranger would: the artifact and its base are on the Hub, and nothing else
is here. The cache of the client is read and never written to by bake.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import recipe_text, write_recipe
from folders import files_of
from hub_server import HubServer
from published import (
    BASE,
    CARD,
    Worker,
    base_files,
    hub_with,
    make_artifact,
    rewrite,
    sharded_base,
    worker_at,
)

from bake.seal.seal import seal

ROOT = Path(__file__).parent.parent
QUICK = ("--no-plots", "--generate", "0", "--tokens", "12")


@dataclass(frozen=True)
class Site:
    """A Hub with a base and an artifact on it, and a process that knows nothing but the Hub."""

    hub: HubServer
    worker: Worker
    folder: Path
    out: Path

    def publish(
        self, repo: str, change: Callable[[Path], object] | None = None, *, sealed: bool = True
    ) -> None:
        """Put a copy of the artifact on the Hub, changed."""
        copy = self.folder / repo.replace("/", "-")
        shutil.copytree(self.out, copy)
        if change is not None:
            for name in ("SHA256SUMS", "bake/provenance.json"):
                (copy / name).unlink()
            change(copy)
            if sealed:
                seal(copy)
        self.hub.add_repo(repo, files_of(copy), private=False)

    def verify(self, repo: str, report: Path, *args: object, **options: Any) -> Any:
        return self.worker.run("verify", repo, "--report", report, *QUICK, *args, **options)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    base = sharded_base(folder / "base")
    recipe = write_recipe(folder, BASE)
    with hub_with(base) as hub, worker_at(hub, folder / "home") as worker:
        out = folder / "out"
        made = worker.run("export", recipe, "--out", out)
        assert made.code == 0, made.out
        measured = worker.run("verify", out, *QUICK)
        assert measured.code == 0, measured.out
        (out / "README.md").write_text(CARD, encoding="utf-8")
        pushed = worker.push(out, "alice/mood")
        assert pushed.code == 0, pushed.out
        shutil.rmtree(base)  # what is on the Hub has to do
        (folder / "mood.npy").unlink()
        yield Site(hub, worker, folder, out)


@pytest.fixture(autouse=True)
def _clean(site: Site) -> Iterator[None]:
    site.hub.repos[BASE].gated = False
    yield
    unused = [fault for fault in site.hub.faults if fault.times]
    site.hub.faults.clear()
    assert not unused, "a fault was planned and never met"


# --- verify ------------------------------------------------------------------------------------


def test_a_published_model_is_verified_from_its_name_alone(site: Site, tmp_path: Path) -> None:
    commit = site.hub.repos["alice/mood"].branches["main"]
    done = site.verify("hf://alice/mood", tmp_path / "report", "--rebake")
    assert done.code == 0, done.out
    data, again = done.data, done.data["reproduction"]
    assert data["artifact"] == again["artifact"] == f"alice/mood@{commit}"
    assert data["passed"] is True
    assert again["plan"]["same"] is True and again["plan"]["differences"] == []
    assert again["rebaked"]["identical"] == again["rebaked"]["of"] > 5
    verification = again["verification"]
    assert verification["reproduced"] is True and again["notes"] == []
    pairs = {row["name"]: row for row in verification["rows"]}
    effect = pairs["effect: hooked − base"]
    assert effect["published"]["value"] == pytest.approx(effect["here"]["value"], abs=1e-9)
    assert effect["published"]["value"] > 0.01
    assert all(row["published"] and row["here"] for row in pairs.values())
    written = files_of(tmp_path / "report")
    assert set(written) == {"verify.json", "verify.md", "reproduction.json", "reproduction.md"}
    assert "| published | measured here |" in written["reproduction.md"].decode()
    for name, content in written.items():
        assert str(site.folder).encode() not in content and str(tmp_path).encode() not in content
        assert b"snapshots" not in content, name
    assert list(tmp_path.iterdir()) == [tmp_path / "report"]


def test_the_cache_is_read_and_never_written_to(site: Site, tmp_path: Path) -> None:
    """The report goes beside the caller, and the snapshot keeps what the Hub holds."""
    assert site.verify("alice/mood", tmp_path / "first").code == 0
    held = {
        n for n in site.hub.repos["alice/mood"].files() if not n.startswith(("plots", "README"))
    }
    cache = site.folder / "home" / "hub" / "models--alice--mood" / "snapshots"
    (snapshot,) = cache.iterdir()
    assert set(files_of(snapshot)) <= held
    before = {n: (snapshot / n).stat().st_mtime_ns for n in files_of(snapshot)}
    done = site.worker.run("verify", "alice/mood", *QUICK, cwd=tmp_path)
    assert done.code == 0, done.out
    assert (tmp_path / "verify-mood" / "reproduction.json").is_file()
    assert {n: (snapshot / n).stat().st_mtime_ns for n in files_of(snapshot)} == before


def test_a_commit_or_a_tag_names_one_state(site: Site, tmp_path: Path) -> None:
    held = site.hub.repos["alice/mood"]
    (tag,) = held.tags
    for word in (tag, held.branches["main"]):
        done = site.worker.run("plan", f"hf://alice/mood@{word}")
        assert done.code == 0 and done.data["again"]["artifact"].endswith(held.tags[tag])
    for word in ("nothing", "0" * 40):
        done = site.worker.run("plan", f"hf://alice/mood@{word}")
        assert done.code == 5 and f"alice/mood has no revision '{word}'" in done.error


def test_a_published_number_that_is_not_measured_here_is_told(site: Site, tmp_path: Path) -> None:
    def twice(out: Path) -> None:
        def change(found: dict[str, Any]) -> None:
            found["rows"][0]["value"] *= 2

        rewrite(out / "verify.json", change)

    site.publish("alice/boast", twice)
    done = site.verify("alice/boast", tmp_path / "report")
    assert done.code == 1
    assert "the published verification of alice/boast@" in done.error
    assert "effect: hooked − base: published as" in done.error
    assert done.data["passed"] is True  # the model is sound, its record is not
    told = (tmp_path / "report" / "reproduction.md").read_text()
    assert "**Not reproduced:**" in told


def test_other_prompts_or_no_numbers_are_said(site: Site, tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    site.publish("alice/silent", lambda out: (out / "verify.json").unlink())
    done = site.verify("alice/silent", tmp_path / "report")
    assert done.code == 0, done.out
    assert done.data["reproduction"]["verification"] is None
    assert "no verify.json was published" in done.data["reproduction"]["notes"][0]

    def other(out: Path) -> None:
        rewrite(out / "verify.json", lambda found: found["prompts"].update(digest="sha256:other"))

    site.publish("alice/prompts", other)
    done = site.verify("alice/prompts", tmp_path / "report2")
    assert done.code == 0, done.out
    assert "published on other prompts" in done.data["reproduction"]["notes"][0]


# --- plan and export ---------------------------------------------------------------------------


def test_the_plan_of_a_published_artifact(site: Site) -> None:
    start = len(site.hub.log)
    done = site.worker.run("plan", "alice/mood")
    assert done.code == 0, done.out
    data = done.data
    record = json.loads((site.out / "bake.json").read_text())
    assert data["plan"]["digest"] == data["again"]["recorded"] == record["plan"]["digest"]
    assert data["recipe"] == record["recipe"] and data["again"]["kind"] == "checkpoint"
    fresh = Worker(site.hub, site.folder / "fresh")
    start = len(site.hub.log)
    done = fresh.run("plan", "hf://alice/mood")
    fresh.stop()
    assert done.code == 0 and done.data["again"]["same"] is True
    asked = [request.path for request in site.hub.log[start:] if "/resolve/" in request.path]
    assert any(f"{BASE}/resolve" in path for path in asked)
    # neither the artifact's weights nor whole files of the base: headers come by range
    assert not any("alice/mood" in path and "model-" in path for path in asked)
    blobs = site.folder / "fresh" / "hub" / "models--meta--base" / "blobs"
    assert not any(path.stat().st_size > 8000 for path in blobs.iterdir())


def test_a_published_artifact_is_made_again_byte_for_byte(site: Site, tmp_path: Path) -> None:
    done = site.worker.run("export", "hf://alice/mood", "--out", tmp_path / "again")
    assert done.code == 0, done.out
    made = files_of(tmp_path / "again")
    held = site.hub.repos["alice/mood"].files()
    later = {"README.md", "SHA256SUMS", "bake/provenance.json", "verify.json", "verify.md"}
    assert made == {name: data for name, data in held.items() if name not in later}
    assert done.data["reproduced"]["identical"] == done.data["reproduced"]["of"] == len(made)
    refused = site.worker.run("export", "hf://alice/mood", "--out", tmp_path / "again")
    assert refused.code == 2 and "exists and is not empty" in refused.error


def test_files_that_are_not_those_of_the_record_are_named(site: Site, tmp_path: Path) -> None:
    """Weights that were changed before publishing, with a record and a seal that agree."""

    def spoil(out: Path) -> None:
        name = "model-00001-of-00003.safetensors"
        names = [n for n in files_of(out) if n.startswith("model-")]
        name = sorted(names)[0]
        data = bytearray((out / name).read_bytes())
        data[-3] ^= 64
        (out / name).write_bytes(bytes(data))
        digest = hashlib.sha256(data).hexdigest()
        rewrite(out / "bake.json", lambda found: found["files"].update({name: digest}))

    site.publish("alice/other", spoil)
    done = site.worker.run("export", "alice/other", "--out", tmp_path / "again")
    assert done.code == 1
    differing = [row["file"] for row in done.data["reproduced"]["differing"]]
    assert len(differing) == 2 and "bake.json" in differing
    assert "files identical, and these are not: " in done.error
    # and the measurement sees it, or the files that are written again
    done = site.verify("alice/other", tmp_path / "report", "--rebake")
    assert done.code in (1, 6) and done.data["reproduction"]["rebaked"]["identical"] > 0
    assert len(done.data["reproduction"]["rebaked"]["differing"]) == 2


def test_a_published_adapter_is_verified_in_peft(site: Site, tmp_path: Path) -> None:
    model = tiny.make_model("mistral", dtype=torch.float32, num_hidden_layers=1)
    tiny.write_checkpoint(model, tmp_path / "base")
    commit = site.hub.add_repo("meta/small", base_files(tmp_path / "base"), private=False)
    at, more = ("attn_out.*", "mlp_out.*"), '[export]\nto = ["lora"]\n'
    recipe = write_recipe(tmp_path, "meta/small", at=at, more=more)
    out, run = tmp_path / "out", site.worker.run
    assert run("export", recipe, "--out", out).code == 0
    assert run("verify", out, "--runtime", "peft").code == 0
    seal(out)
    site.hub.add_repo("alice/adapter", files_of(out), private=False)
    done = site.verify("alice/adapter", tmp_path / "report", "--rebake")
    assert done.code == 0, done.out
    again = done.data["reproduction"]
    assert again["verification"]["reproduced"] is True and again["rebaked"]["differing"] == []
    assert done.data["base"] == f"meta/small@{commit}"
    assert [record["status"] for record in done.data["runtimes"]] == ["passed"]


# --- what is on the Hub is not what was exported -----------------------------------------------


@pytest.mark.parametrize("name", ["weights", "edits", "record"])
def test_a_tampered_file_is_caught_before_anything_is_loaded(
    site: Site, tmp_path: Path, name: str
) -> None:
    repo = f"alice/tampered-{name}"
    site.publish(repo)
    held = site.hub.repos[repo]
    path = {
        "weights": next(n for n in held.files() if n.startswith("model-00001")),
        "edits": "bake/edits.safetensors",
        "record": "bake.json",
    }[name]
    data = held.files()[path]
    data = data.replace(b'"Mood"', b'"Moot"') if name == "record" else data[:-1] + b"\x7f"
    commit = {**held.commits[held.branches["main"]], path: site.hub.keep(held, path, data)}
    held.commit(commit, "a web edit")
    done = site.verify(repo, tmp_path / "report")
    assert done.code == 1
    listing = "SHA256SUMS" if name == "record" else "bake.json"
    assert f"{path} is not the file that {listing} lists" in done.error
    assert not (tmp_path / "report").exists()
    if name != "weights":  # which a plan does not fetch
        assert site.worker.run("plan", repo).code == 1


def test_a_card_that_was_edited_on_the_hub_is_no_obstacle(site: Site, tmp_path: Path) -> None:
    site.publish("alice/card")
    held = site.hub.repos["alice/card"]
    files_ = dict(held.commits[held.branches["main"]])
    verification = held.files()["verify.json"].replace(b'"timing"', b'"timed"')
    files_["verify.json"] = site.hub.keep(held, "verify.json", verification)
    files_["extra.py"] = site.hub.keep(held, "extra.py", b"raise SystemExit")
    held.commit(files_, "a web edit")
    done = site.verify("alice/card", tmp_path / "report")
    assert done.code == 0, done.out
    notes = done.data["reproduction"]["notes"]
    assert notes[0] == "verify.json has changed since the artifact was sealed"
    assert notes[1] == "not fetched, since the artifact does not list them: extra.py"
    cache = site.folder / "home" / "hub" / "models--alice--card"
    assert not list(cache.rglob("extra.py"))


@pytest.mark.parametrize("name", ["bake.json", "SHA256SUMS", "verify.json"])
def test_bytes_that_flip_on_the_way_are_caught(site: Site, tmp_path: Path, name: str) -> None:
    repo = f"alice/flip-{name.partition('.')[0]}"
    site.publish(repo)
    site.hub.fault("GET", f"{repo}/resolve/.*/{name}", "corrupt")
    done = site.verify(repo, tmp_path / "report")
    assert done.code == 5
    assert f"{name} of {repo} is not what the Hub states" in done.error
    assert "damaged on the way" in done.error


def test_an_artifact_that_was_never_sealed_says_so(site: Site, tmp_path: Path) -> None:
    site.publish("alice/plain", lambda out: None, sealed=False)
    done = site.worker.run("plan", "alice/plain")
    assert done.code == 0
    assert "there is no SHA256SUMS" in done.data["again"]["notes"][0]


# --- the base ----------------------------------------------------------------------------------


def test_a_base_that_is_a_folder_elsewhere_is_asked_for(site: Site, tmp_path: Path) -> None:
    def elsewhere(out: Path) -> None:
        rewrite(
            out / "bake.json",
            lambda found: found["base"].update(model="my/base", path="../../etc", revision=None),
        )

    site.publish("alice/local", elsewhere)
    for command in (("plan",), ("export", "--out", tmp_path / "x"), ("verify",)):
        done = site.worker.run(command[0], "alice/local", *command[1:], cwd=tmp_path)
        assert done.code == 4
        assert (
            "the base my/base is a folder of the machine that the model was made on" in done.error
        )
        assert "name it with --base" in done.error
    commit = site.hub.repos[BASE].branches["main"]
    done = site.worker.run("plan", "alice/local", "--base", f"{BASE}@{commit}")
    assert done.code == 0 and done.data["again"]["same"] is True
    assert not any(tmp_path.iterdir())

    def unpinned(out: Path) -> None:
        rewrite(out / "bake.json", lambda found: found["base"].update(revision="main"))

    site.publish("alice/unpinned", unpinned)
    done = site.worker.run("plan", "alice/unpinned")
    assert done.code == 4 and f"the record names no commit of the base {BASE}" in done.error


def test_a_base_that_cannot_be_read_is_one_clear_line(site: Site, tmp_path: Path) -> None:
    model = tiny.make_model("llama", dtype=torch.float32, num_hidden_layers=1)
    tiny.write_checkpoint(model, tmp_path / "base")
    out = make_artifact(tmp_path / "base", tmp_path / "out", model="meta/closed")
    seal(out)
    site.hub.add_repo("alice/closed", files_of(out), private=False)
    done = site.worker.run("plan", "alice/closed")
    assert (
        done.code == 5
        and "meta/closed is not on the Hub, or your token cannot see it" in done.error
    )
    site.hub.add_repo("meta/closed", base_files(tmp_path / "base"), private=False, gated="auto")
    done = site.worker.run("plan", "alice/closed")
    assert (
        done.code == 5 and "meta/closed is gated and this account is not on its list" in done.error
    )
    site.hub.repos["meta/closed"].gated = False
    done = site.worker.run("plan", "alice/closed")
    assert done.code == 0, done.out
    note = "the record has no text of a recipe: the plan is that of the edits alone"
    assert done.data["again"]["notes"] == [note]

    def lost(found: dict[str, Any]) -> None:
        found["base"]["revision"] = "1" * 40

    rewrite(out / "bake.json", lost)
    (out / "SHA256SUMS").unlink()
    (out / "bake" / "provenance.json").unlink()
    site.hub.add_repo("alice/lost", files_of(out), private=False)
    done = site.worker.run("plan", "alice/lost")
    assert done.code == 5 and f"meta/closed has no revision '{'1' * 40}'" in done.error


def test_a_folder_of_the_bases_name_is_not_taken_for_it(site: Site, tmp_path: Path) -> None:
    """A record names a base on the Hub; a folder here of that spelling is something else."""
    decoy = tmp_path / BASE
    decoy.mkdir(parents=True)
    (decoy / "config.json").write_text("{}")
    done = site.worker.run("plan", "alice/mood", cwd=tmp_path)
    assert done.code == 0 and done.data["again"]["same"] is True
    # but a folder that the user names wins over the Hub, as everywhere
    (tmp_path / "alice" / "mood").mkdir(parents=True)
    done = site.worker.run("plan", "alice/mood", cwd=tmp_path)
    assert done.code == 4 and "this is no artifact of bake: it is empty" in done.error
    assert site.worker.run("plan", "hf://alice/mood", cwd=tmp_path).code == 0


# --- no record, no network ---------------------------------------------------------------------


def test_a_model_without_a_record_is_called_what_it_is(site: Site, tmp_path: Path) -> None:
    site.hub.add_repo("meta/lora", {"adapter_config.json": b"{}"}, private=False)
    site.hub.add_repo("meta/gguf", {"x.gguf": b"GGUF"}, private=False)
    site.hub.add_repo("meta/empty", {}, private=False)
    for repo, what in (
        (BASE, "a checkpoint"),
        ("meta/lora", "a PEFT adapter"),
        ("meta/gguf", "a set of GGUF files"),
        ("meta/empty", "empty"),
    ):
        done = site.worker.run("plan", repo)
        assert done.code == 4
        assert f"{repo} holds no bake.json: it is {what}, and bake did not make it" in done.error
    for command in (("verify",), ("export", "--out", tmp_path / "x")):
        done = site.worker.run(command[0], f"hf://{BASE}", *command[1:], cwd=tmp_path)
        assert done.code == 4 and "holds no bake.json" in done.error
    assert not any(tmp_path.iterdir())
    for text in ("hf://", "hf://alice", "hf://alice/mood/x", "hf://../x", "hf://a/b@"):
        done = site.worker.run("plan", text)
        assert done.code == 4 and "is neither a folder here nor a Hub id" in done.error
    done = site.worker.run("plan", "alice/absent")
    assert done.code == 5 and "alice/absent is not on the Hub" in done.error


def test_offline_the_cache_has_to_do(site: Site, tmp_path: Path) -> None:
    assert site.verify("alice/mood", tmp_path / "online").code == 0
    start = len(site.hub.log)
    done = site.verify("alice/mood", tmp_path / "offline", "--rebake", offline=True)
    assert done.code == 0, done.out
    assert done.data["reproduction"]["verification"]["reproduced"] is True
    assert len(site.hub.log) == start
    site.publish("alice/never")
    done = site.worker.run("plan", "alice/never", offline=True)
    assert done.code == 5 and "is not in the cache and the Hub is switched off" in done.error
    assert site.worker.run("plan", "alice/never").code == 0
    done = site.verify("alice/never", tmp_path / "x", offline=True)  # its weights are not here
    assert done.code == 5 and "is not in the cache and the Hub is switched off" in done.error


def test_a_hub_that_fails_is_one_clear_line(site: Site) -> None:
    site.hub.fault("GET", "/api/models/alice/mood", 401)
    done = site.worker.run("plan", "alice/mood")
    assert done.code == 5 and "the Hub does not accept your token for alice/mood" in done.error
    site.hub.fault("GET", "/api/models/alice/mood/tree", 403)
    done = site.worker.run("plan", "alice/mood")
    assert done.code == 5 and "no right to read alice/mood" in done.error


# --- strangers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../escape", "/tmp/escape", "bake/../../escape", ".hidden", "a/b/c.json", "run.exe", "x\ny"],
)
def test_a_record_that_names_other_files_is_refused(site: Site, tmp_path: Path, name: str) -> None:
    repo = f"mallory/names-{hashlib.sha1(name.encode()).hexdigest()[:8]}"

    def add(out: Path) -> None:
        rewrite(out / "bake.json", lambda found: found["files"].update({name: "0" * 64}))

    site.publish(repo, add, sealed=False)
    for command in (("plan",), ("export", "--out", tmp_path / "x"), ("verify",)):
        done = site.worker.run(command[0], repo, *command[1:], cwd=tmp_path)
        assert done.code == 4 and "names the file" in done.error, done.out
    assert not any(tmp_path.iterdir())


def test_a_recipe_inside_reads_no_file(site: Site, tmp_path: Path) -> None:
    """Paths in the recipe of an artifact mean nothing here: none of them is opened."""
    canary = tmp_path / "canary.npy"
    os.mkfifo(canary)  # opening it would wait for ever
    text = recipe_text(tmp_path).replace("mood.npy", str(canary))

    def change(out: Path) -> None:
        def tell(found: dict[str, Any]) -> None:
            digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
            found["recipe"].update(text=text, digest=digest)
            found["directions"]["mood"]["file"] = str(canary)

        rewrite(out / "bake.json", tell)

    site.publish("mallory/paths", change)
    done = site.worker.run("plan", "mallory/paths")
    assert done.code == 0 and done.data["again"]["same"] is True, done.out
    done = site.worker.run("export", "mallory/paths", "--out", tmp_path / "made")
    # the record was written by other means, and differs in nothing but its spaces
    assert [row["file"] for row in done.data["reproduced"]["differing"]] == ["bake.json"]
    assert "what the record says differs at its layout" in done.error


def test_no_code_of_an_artifact_runs(site: Site, tmp_path: Path) -> None:
    """A config that asks for code, with a record that lists it: loaded, it would leave a mark."""
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w').close()\n".encode()

    def change(out: Path) -> None:
        auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "auto_map": auto}))
        (out / "evil.py").write_bytes(code)

        def tell(found: dict[str, Any]) -> None:
            for name in ("config.json", "evil.py"):
                found["files"][name] = hashlib.sha256((out / name).read_bytes()).hexdigest()

        rewrite(out / "bake.json", tell)

    site.publish("mallory/code", change)
    site.verify("mallory/code", tmp_path / "report")
    assert not mark.exists()
    config = {"model_type": "evil-model"}

    def unknown(out: Path) -> None:
        change(out)
        found = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**found, **config}))
        digest = hashlib.sha256((out / "config.json").read_bytes()).hexdigest()
        rewrite(out / "bake.json", lambda r: r["files"].update({"config.json": digest}))

    site.publish("mallory/unknown", unknown)
    done = site.verify("mallory/unknown", tmp_path / "other")
    assert done.code == 4 and "transformers does not load this checkpoint" in done.error
    assert not mark.exists()
    exec(code)  # the mark would be seen
    assert mark.exists()


# --- the quickstart ----------------------------------------------------------------------------


def test_the_quickstart_is_published_and_reproduced(site: Site, tmp_path: Path) -> None:
    source = ROOT / "recipes" / "quickstart" / "model"
    site.hub.add_repo("lab/storyteller", base_files(source), private=False)
    recipe = ROOT / "recipes" / "quickstart.toml"
    out = tmp_path / "cheerful"
    run = site.worker.run
    assert run("export", recipe, "--model", "lab/storyteller", "--out", out).code == 0
    assert run("verify", out, *QUICK).code == 0
    card = CARD.replace(BASE, "lab/storyteller")
    (out / "README.md").write_text(card, encoding="utf-8")
    assert not any(str(tmp_path).encode() in data for data in files_of(out).values())
    dry = run("push", out, "alice/cheerful", "--dry-run", offline=True)
    assert dry.code == 0, dry.out
    assert site.worker.push(out, "alice/cheerful").code == 0
    done = site.verify("hf://alice/cheerful", tmp_path / "report")
    assert done.code == 0, done.out
    verification = done.data["reproduction"]["verification"]
    assert verification["reproduced"] is True
    effect = verification["rows"][0]
    assert effect["here"]["value"] == pytest.approx(effect["published"]["value"], abs=1e-9)
    assert effect["here"]["value"] > 1
    done = run("export", "alice/cheerful", "--out", tmp_path / "again")
    assert done.code == 0 and done.data["reproduced"]["differing"] == []
