"""With its base at hand a baked checkpoint goes back to it, bit for bit."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import programs
import pytest
import tiny
import torch
from cards import EXAMPLES
from click.testing import CliRunner
from exporting import written
from folders import files_of, flip
from harness import base_at, edit, plan_of, vector
from published import Worker, base_files, hub_with, make_artifact, rewrite, worker_at
from reverting import bake_local, refused, revert, reverted
from safetensors.torch import save_file

from bake import edits as make
from bake import families
from bake.checkpoints import open_checkpoint
from bake.checkpoints.checkpoint import Checkpoint
from bake.cli import main
from bake.edits import Edit
from bake.merge.merge import merge_adapter
from bake.revert import proof

Tiny = Callable[..., Path]
SITES = ("attn_out.0", "mlp_out.1")


def some_edits(base: Path, kind: str = "ablate", at: object = SITES) -> list[Edit]:
    opened = base_at(base)
    map_ = {"ablate": make.ablate, "offset": make.offset}[kind](vector(opened.layout.hidden))
    return [edit(opened, kind, map_, at)]  # type: ignore[arg-type]


def folder_of(family: str, path: Path, *, shards: str | None = None, **options: object) -> Path:
    """Write a base with side files of every sort."""
    model = tiny.make_model(family, dtype=torch.float32, **options)  # type: ignore[arg-type]
    tiny.write_checkpoint(model, path, max_shard_size=shards)
    (path / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (path / "LICENSE").write_text("the base's licence\n")
    (path / "README.md").write_text("# The base\n")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}\n")
    return path


CASES = {
    "one file": ("llama", None, {}, "ablate", SITES, ()),
    "shards": ("llama", "20KB", {}, "ablate", SITES, ()),
    "untied head, one file": ("llama", None, {"tied": True}, "ablate", "resid", ()),
    "untied head, shards": ("llama", "20KB", {"tied": True}, "ablate", "resid", ()),
    "new biases": ("llama", "20KB", {"mlp_bias": False}, "offset", "resid_post.1", ()),
    "recast": ("mistral", None, {}, "offset", "resid_post.1", ("recast",)),
    "transposed": ("gpt2", None, {}, "ablate", "resid", ()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_base_comes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    family, shards, options, kind, at, allow = CASES[case]
    base = folder_of(family, tmp_path / "base", shards=shards, **options)
    baked = bake_local(base, some_edits(base, kind, at), tmp_path / "out", allow=allow)
    (baked / "README.md").write_text("# The card\n")
    (baked / "NOTICE").write_text("added later\n")
    before = {name: data for name, data in files_of(base).items() if name != "README.md"}
    assert {n: files_of(baked).get(n) for n in before} != before  # the effect: it was edited

    said = reverted(baked, tmp_path / "back")

    back = files_of(tmp_path / "back")
    assert back == before
    assert said["bit_for_bit"] and sorted(said["compared"]) == sorted(back)
    assert {"README.md", "NOTICE", "bake.json", "bake/"} <= set(said["left"])
    assert said["absent"] == ["README.md"]
    assert said["notes"] == []
    opened = open_checkpoint(base)
    assert said["bytes_from_base"] == sum(opened.tensors[n].nbytes for n in said["edited"])
    record = json.loads((baked / "bake.json").read_text())["plan"]
    created = [r["name"] for r in record["biases"] if r["created"]]
    created += [r["name"] for r in record["tensors"] if r["source"] != r["name"]]
    assert said["removed"] == sorted(created)
    assert bool(created) == (case not in ("one file", "shards"))


def test_only_edited_tensors_are_read_of_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = folder_of("llama", tmp_path / "base")
    baked = bake_local(base, some_edits(base), tmp_path / "out")
    plan = json.loads((baked / "bake.json").read_text())["plan"]
    edited = {row["name"] for row in (*plan["tensors"], *plan["biases"])}
    opened = open_checkpoint(base)
    allowed = [(opened.tensors[name].start, opened.tensors[name].stop) for name in edited]
    end_of_header = min(info.start for info in opened.tensors.values())
    seen = []
    original = type(opened.files).read_into

    def watched(self: object, file: str, start: int, buffer: memoryview) -> None:
        if str(base) in str(self):
            seen.append((start, start + len(buffer)))
        original(self, file, start, buffer)  # type: ignore[arg-type]

    monkeypatch.setattr(type(opened.files), "read_into", watched)
    reverted(baked, tmp_path / "back")
    assert seen
    for start, stop in seen:
        assert stop <= end_of_header or any(a <= start and stop <= b for a, b in allowed)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("llama", tmp_path_factory.mktemp("module") / "base", shards="20KB")


@pytest.fixture(scope="module")
def baked(base: Path) -> Path:
    return bake_local(base, some_edits(base), base.parent / "out")


def copied(path: Path, to: Path) -> Path:
    shutil.copytree(path, to)
    return to


def without_hashes(record: dict[str, object]) -> None:
    """Make a record one of an earlier version, which has no hash of the base's tensors."""
    record.pop("base_tensors")


@pytest.fixture(scope="module")
def earlier(base: Path, baked: Path) -> Path:
    made = copied(baked, base.parent / "earlier")
    rewrite(made / "bake.json", without_hashes)
    return made


@pytest.mark.parametrize("hashes", [True, False])
@pytest.mark.parametrize("edited", [True, False])
def test_a_base_with_one_changed_bit_is_refused(
    base: Path, baked: Path, earlier: Path, tmp_path: Path, edited: bool, hashes: bool
) -> None:
    baked = baked if hashes else earlier
    other = copied(base, tmp_path / "other")
    opened = open_checkpoint(other)
    # The lowest bit of the first value of a tensor: the smallest change that float32 knows.
    name = "model.layers.0.self_attn.o_proj.weight" if edited else "model.embed_tokens.weight"
    info = opened.tensors[name]
    flip(other / info.shard, info.start)
    said = refused(baked, tmp_path / "back", "--base", other)
    if edited and hashes:
        assert f"this is not the base that the artifact was made of: {name} is another" in said
    elif edited:
        assert f"does not give the artifact: {name} differs in" in said
    else:
        assert f"{info.shard}: {name} differs, which the plan leaves alone" in said
    # The control: the same base without that bit.
    flip(other / info.shard, info.start)
    assert reverted(baked, tmp_path / "back", "--base", other)["bit_for_bit"]


@pytest.mark.parametrize("steps", [1, 2])
def test_sums_in_another_order_are_noted(
    base: Path, earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """As in a large float32 tensor on another machine; more than a rounding step is no rounding."""
    monkeypatch.setattr(proof, "_FACTOR", 1e9)
    spoiled = copied(earlier, base.parent / f"another-machine-{steps}")
    info = open_checkpoint(spoiled).tensors["model.layers.0.self_attn.o_proj.weight"]
    data = bytearray((spoiled / info.shard).read_bytes())
    value = torch.frombuffer(data, dtype=torch.float32, count=1, offset=info.start)
    for _ in range(steps):
        value.copy_(torch.nextafter(value, torch.tensor(torch.inf)))
    (spoiled / info.shard).write_bytes(data)
    if steps == 1:
        said = reverted(spoiled, tmp_path / "back")
        assert said["bit_for_bit"]  # it is the named base, whoever made the artifact
        assert "1 values of the edit come out one rounding step apart" in said["notes"][0]
    else:
        assert "does not give the artifact" in refused(spoiled, tmp_path / "back")


@pytest.mark.parametrize("what", ["config", "index", "header", "shape"])
def test_another_base_is_refused(base: Path, baked: Path, tmp_path: Path, what: str) -> None:
    other = tmp_path / "other"
    if what == "shape":
        folder_of("llama", other, shards="20KB", num_hidden_layers=2)
    else:
        copied(base, other)
        if what == "config":
            rewrite(other / "config.json", lambda c: {**c, "rope_theta": 1.5})
        elif what == "index":
            index = other / "model.safetensors.index.json"
            index.write_text(index.read_text() + "\n")
        else:
            shard = next(other.glob("*.safetensors"))
            flip(shard, shard.read_bytes().index(b'"format":"pt"') + 10)
    said = refused(baked, tmp_path / "back", "--base", other)
    assert "this is not the base that the artifact was made of" in said
    assert str(base) in said


@pytest.mark.parametrize("where", ["edited", "edited, hashed", "untouched", "header", "side file"])
def test_a_spoiled_artifact(
    base: Path, baked: Path, earlier: Path, tmp_path: Path, where: str
) -> None:
    origin = earlier if where == "edited" else baked
    spoiled = copied(origin, base.parent / f"spoiled-{where}")
    opened = open_checkpoint(spoiled)
    edited = opened.tensors["model.layers.0.self_attn.o_proj.weight"]
    untouched = opened.tensors["model.norm.weight"]
    if where == "edited":
        flip(spoiled / edited.shard, edited.start)
        said = refused(spoiled, tmp_path / "back")
        assert "the artifact's were changed since" in said
    elif where == "edited, hashed":
        # The base is known by the record's hashes, and what the artifact made of it is not needed.
        flip(spoiled / edited.shard, edited.start)
        assert reverted(spoiled, tmp_path / "back")["bit_for_bit"]
        assert files_of(tmp_path / "back")[edited.shard] == files_of(base)[edited.shard]
    elif where == "untouched":
        flip(spoiled / untouched.shard, untouched.start)
        said = refused(spoiled, tmp_path / "back")
        assert "files would not be the base's" in said and "model.norm.weight differs" in said
    elif where == "header":
        shard = spoiled / edited.shard
        flip(shard, shard.read_bytes().index(b'"format":"pt"') + 10)
        assert "is not that of the base's" in refused(spoiled, tmp_path / "back")
    else:
        # What the artifact has otherwise is taken from the base, which has the right one.
        (spoiled / "tokenizer.json").write_text("{}")
        (spoiled / "LICENSE").unlink()
        assert reverted(spoiled, tmp_path / "back")["bit_for_bit"]
        assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"version": "1.0"}\n'


def test_a_record_that_hides_an_edited_tensor(base: Path, baked: Path, tmp_path: Path) -> None:
    spoiled = copied(baked, base.parent / "hidden")

    hidden = []

    def hide(record: dict[str, Any]) -> None:
        hidden.append(record["plan"]["tensors"].pop()["name"])

    rewrite(spoiled / "bake.json", hide)
    said = refused(spoiled, tmp_path / "back")
    assert f"base_tensors and the plan disagree on {hidden[0]}" in said
    rewrite(spoiled / "bake.json", lambda record: record["base_tensors"].pop(hidden[0]) and None)
    said = refused(spoiled, tmp_path / "back")
    assert "files would not be the base's" in said and "which the plan leaves alone" in said


@pytest.mark.parametrize("found", [[], {"x": "sha256:abc"}, {"x": 1}])
def test_malformed_hashes_of_the_base(
    base: Path, baked: Path, tmp_path: Path, found: object
) -> None:
    spoiled = copied(baked, base.parent / f"malformed-{len(str(found))}")
    rewrite(spoiled / "bake.json", lambda record: {**record, "base_tensors": found})
    said = refused(spoiled, tmp_path / "back")
    assert "the record is malformed" in said and "base_tensors" in said


def test_the_record_has_the_hashes_of_the_edited_tensors(base: Path, baked: Path) -> None:
    record = json.loads((baked / "bake.json").read_text())
    opened = open_checkpoint(base)
    edited = {row["name"] for key in ("tensors", "biases") for row in record["plan"][key]}
    assert record["base_tensors"].keys() == edited != set()
    for name, digest in record["base_tensors"].items():
        with (base / opened.tensors[name].shard).open("rb") as file:
            file.seek(opened.tensors[name].start)
            assert digest == "sha256:" + sha256(file.read(opened.tensors[name].nbytes)).hexdigest()


def test_a_family_of_the_users_own(tmp_path: Path) -> None:
    """The record holds the table, without which the edits could not be folded again."""
    base = folder_of("llama", tmp_path / "base")
    rewrite(base / "config.json", lambda c: {**c, "architectures": ["OwnForCausalLM"]})
    own = tmp_path / "own.toml"
    text = (Path(families.__file__).parent / "llama.toml").read_text()
    own.write_text(text.replace('"LlamaForCausalLM"', '"OwnForCausalLM"'))
    save_file({"d": vector(24)}, tmp_path / "d.safetensors")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[base]\nmodel = "base"\n[directions.d]\nfile = "d.safetensors"\n'
        '[[edits]]\nkind = "ablate"\ndirection = "d"\nat = "attn_out.0"\nstrength = 0.5\n'
    )
    args = ["export", str(recipe), "--family", str(own), "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    assert reverted(tmp_path / "out", tmp_path / "back")["bit_for_bit"]


def test_a_merge_goes_back_too(base: Path, tmp_path: Path) -> None:
    opened = base_at(base)
    plan = plan_of(opened, [edit(opened, "ablate", make.ablate(vector(32)), "z.*")])
    written("lora", plan, opened.checkpoint, tmp_path / "lora", record={"base": {"model": "x"}})
    merge_adapter(tmp_path / "lora", opened.checkpoint, tmp_path / "out")
    said = reverted(tmp_path / "out", tmp_path / "back")
    assert said["bit_for_bit"] and len(said["edited"]) == 3
    assert said["notes"] == []
    rewrite(tmp_path / "out" / "bake.json", without_hashes)
    said = reverted(tmp_path / "out", tmp_path / "unproven")
    assert "a merge keeps no copy of its adapter" in said["notes"][0]


def test_a_base_that_has_gone(base: Path, baked: Path, tmp_path: Path) -> None:
    moved = copied(baked, tmp_path / "elsewhere" / "deep" / "out")
    said = refused(moved, tmp_path / "back")
    assert "the base that the record names is not at hand" in said
    assert "name it with --base MODEL" in said
    assert reverted(moved, tmp_path / "back", "--base", base)["bit_for_bit"]


def test_wrong_options(baked: Path, tmp_path: Path) -> None:
    said = refused(baked, tmp_path / "back", "--revision", "main", code=2)
    assert "--revision is of --base" in said


def test_places_that_may_not_be_written(base: Path, baked: Path, tmp_path: Path) -> None:
    kept = files_of(base), files_of(baked)
    for out in (base / "back", baked / "back"):
        assert revert(baked, out).exit_code == 2
        assert not out.exists()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    assert revert(baked, taken).exit_code == 2
    assert revert(baked, taken, "--force").exit_code == 2  # no checkpoint
    assert files_of(taken) == {"mine.txt": b"mine"}
    assert (files_of(base), files_of(baked)) == kept


def test_force_replaces_an_artifact_and_a_dry_run_writes_nothing(
    baked: Path, tmp_path: Path
) -> None:
    back = tmp_path / "back"
    said = reverted(baked, back, "--dry-run")
    assert said["dry_run"] and not back.exists()
    made = reverted(baked, back)
    assert said["bytes_from_base"] == made["bytes_from_base"] > 0
    assert revert(baked, back).exit_code == 2
    assert revert(baked, back, "--force").exit_code == 2  # a base is no artifact of bake
    shutil.rmtree(back)
    copied(baked, back)
    assert revert(baked, back).exit_code == 2
    assert reverted(baked, back, "--force")["files"] == made["files"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("lora", "there is nothing to revert: a lora leaves its base as it is"),
        ("gguf-lora", "without --lora"),
        ("control-vector", "without --control-vector"),
    ],
)
def test_an_adapter_has_nothing_to_revert(tmp_path: Path, kind: str, said: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    example = json.loads((EXAMPLES / "adapter" / "bake.json").read_text())
    (folder / "bake.json").write_text(json.dumps({**example, "kind": kind}))
    assert said in refused(folder, tmp_path / "back", code=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "this is no artifact of bake"),
        ("{", "this is no artifact of bake"),
        ('{"kind": "other"}', "the kind 'other' is unknown"),
        ('{"kind": "merge"}', "the record is malformed: base is missing"),
        ('{"kind": "merge", "base": {"model": "x"}}', "the record is malformed: plan is missing"),
        ('{"kind": "checkpoint"}', "the record is malformed"),
        ('{"kind": "checkpoint", "plan": [], "base": 1}', "the record is malformed"),
    ],
)
def test_records_that_are_none(tmp_path: Path, text: str | None, said: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    if text is not None:
        (folder / "bake.json").write_text(text)
    assert said in refused(folder, tmp_path / "back")
    assert "no such folder" in refused(tmp_path / "nowhere", tmp_path / "back")


KILLED = """
import os, signal, sys
from bake.artifact.staged import Stage
real = Stage.record
def last(*args):
    real(*args)
    os.kill(os.getpid(), signal.SIGKILL)
Stage.record = last
from bake.cli import main
main(sys.argv[1:])
"""


def test_a_killed_run_is_taken_up(base: Path, baked: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    args = ["revert", str(baked), "--out", str(back)]
    done = programs.run(KILLED, *args)
    assert done.returncode == -signal.SIGKILL
    left = tmp_path / ".back.bake-partial"
    assert not back.exists() and left.exists()
    finished = (left / "journal").read_text().count('"file"')
    assert finished > 0
    stamps = {p.name: p.stat().st_mtime_ns for p in (left / "files").iterdir()}
    assert reverted(baked, back)["bit_for_bit"]
    kept = [p for p in back.iterdir() if stamps.get(p.name) == p.stat().st_mtime_ns]
    assert len(kept) >= finished and not left.exists()


# --- a base on the Hub ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Worker, Path, Path]]:
    """A base on a Hub whose embedding is far larger than its header; an artifact of it."""
    home = tmp_path_factory.mktemp("remote")
    model = tiny.make_model("llama", dtype=torch.float32, vocab_size=4000, hidden_size=64)
    tiny.write_checkpoint(model, home / "base")
    (home / "base" / "tokenizer.json").write_text('{"version": "1.0"}\n')
    artifact = make_artifact(home / "base", home / "out")
    with hub_with(home / "base") as state, worker_at(state, home / "home") as worker:
        yield worker, home / "base", artifact


def test_a_base_on_the_hub_is_read_by_range(
    remote: tuple[Worker, Path, Path], tmp_path: Path
) -> None:
    worker, base, artifact = remote
    start = len(worker.hub.log)
    done = worker.run("revert", artifact, "--out", tmp_path / "back")
    assert done.code == 0, done.out
    said = done.data
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert set(said["compared"]) == set(said["files"]) == names and said["bit_for_bit"]
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (base / name).read_bytes()
    whole = (base / "model.safetensors").stat().st_size
    assert said["bytes_from_base"] < whole / 50
    sent = sum(request.sent for request in worker.hub.log[start:])
    # Beside the edited tensors: the first 64 KiB with the header, the config, the list of files.
    assert said["bytes_from_base"] < sent < said["bytes_from_base"] + 2 * (1 << 16) < whole / 5


def test_a_published_artifact_goes_back_to_its_base(
    remote: tuple[Worker, Path, Path], tmp_path: Path
) -> None:
    worker, base, artifact = remote
    assert worker.push(artifact, "alice/baked").code == 0
    done = worker.run("revert", "hf://alice/baked", "--out", tmp_path / "back")
    assert done.code == 0 and done.data["bit_for_bit"], done.out
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        base / "model.safetensors"
    ).read_bytes()
    # The cache's snapshot, which is a folder of links.
    snapshot = worker.download("alice/baked")
    done = worker.run("revert", snapshot, "--out", tmp_path / "again")
    assert done.code == 0 and done.data["bit_for_bit"], done.out
    assert not (tmp_path / "again" / "model.safetensors").is_symlink()
    # A folder that a stranger's record names is not looked for on this machine.
    local = copied(artifact, tmp_path / "local")
    rewrite(local / "bake.json", lambda r: {**r, "base": {**r["base"], "path": "../base"}})
    record = (local / "bake.json").read_bytes()
    files = {n: d for n, d in worker.hub.repos["alice/baked"].files().items() if "SUMS" not in n}
    worker.hub.add_repo("alice/local", {**files, "bake.json": record}, private=False)
    done = worker.run("revert", "hf://alice/local", "--out", tmp_path / "third")
    assert done.code == 4 and "is a folder of the machine" in done.error


def test_another_commit_of_the_base_is_refused(
    remote: tuple[Worker, Path, Path], tmp_path: Path
) -> None:
    worker, base, artifact = remote
    opened: Checkpoint = open_checkpoint(base)
    name = "model.layers.0.self_attn.o_proj.weight"
    for number, tensor in enumerate((name, "model.norm.weight")):
        files = base_files(base)
        data = bytearray(files["model.safetensors"])
        data[opened.tensors[tensor].start] ^= 1
        repo = f"meta/other{number}"
        worker.hub.add_repo(repo, {**files, "model.safetensors": bytes(data)}, private=False)
        done = worker.run("revert", artifact, "--out", tmp_path / "back", "--base", repo)
        assert done.code == 4, done.out
        expected = f"{name} is another" if tensor == name else "would not be the base's"
        assert expected in done.error
        assert not (tmp_path / "back").exists()


def test_a_hub_that_does_not_answer(remote: tuple[Worker, Path, Path], tmp_path: Path) -> None:
    worker, _, artifact = remote
    done = worker.run("revert", artifact, "--out", tmp_path / "back", "--base", "meta/none")
    assert done.code == 5 and "meta/none is not on the Hub" in done.error
    spoiled = copied(artifact, tmp_path / "out")
    rewrite(spoiled / "bake.json", lambda r: {**r, "base": {**r["base"], "model": "meta/gone"}})
    done = worker.run("revert", spoiled, "--out", tmp_path / "back")
    assert done.code == 5 and "--base MODEL" in done.error
    assert not (tmp_path / "back").exists()
