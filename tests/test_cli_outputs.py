"""``bake merge`` and exports of several carriers, from the command line."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import gguf_files
import numpy as np
import programs
import pytest
import tiny
from adapters import factors_of, rewritten
from click.testing import Result
from commands import RecipeFolder, run, write_recipe
from folders import files_of
from harness import base_at
from test_merge import trained

from bake.checkpoints import open_checkpoint
from bake.outputs.gguf.modelfile import MODELFILE
from bake.verify import store
from bake.verify.store import Store

NO_BIAS = {"attention_bias": False, "mlp_bias": False}
Checkpoints = Callable[..., Path]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def told(result: Result) -> str:
    """Return an error as it is shown, without the folding of its lines."""
    return " ".join(result.stderr.split())


class AdapterFolder(RecipeFolder):
    """A base, an adapter of it and a recipe for it, in one folder."""

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


@pytest.fixture
def work(tmp_path: Path, tiny_checkpoint: Checkpoints) -> AdapterFolder:
    base = tiny_checkpoint("llama", **NO_BIAS)
    trained(base_at(base), tmp_path / "adapter")
    return AdapterFolder(tmp_path, write_recipe(tmp_path, base), base)


# --- merge -------------------------------------------------------------------------------------


def test_merge_writes_a_checkpoint_that_verifies(work: AdapterFolder) -> None:
    result = run("merge", work.adapter, work.base, "--out", work.out)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "written" in result.stdout and "of which" in result.stdout
    record = json.loads((work.out / "bake.json").read_text())
    assert (work.out / record["adapter"]["path"]).resolve() == work.adapter.resolve()
    assert record["base"]["tensors"] == len(open_checkpoint(work.base).tensors)
    # A label for others, and not a place on this machine.
    assert record["base"]["model"] == work.base.name
    result = run("verify", work.out, "--generate", "2", "--no-plots", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["passed"] is True and report["plan_digest"] == record["plan"]["digest"]
    result = run("check", work.out, "--seal", "--base", work.base, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["kind"], found["verified"]) == (0, "merge", True)


def test_merge_as_json_and_quiet(work: AdapterFolder) -> None:
    result = run("merge", work.adapter, work.base, "--out", work.out, "--json")
    data = json.loads(result.stdout)
    assert (data["kind"], data["path"], result.stderr) == ("merge", str(work.out), "")
    assert set(data["files"]) >= {"bake.json", "config.json", "model.safetensors"}
    assert 0 < data["bytes_edited"] < data["bytes_written"]
    quiet = run("merge", work.adapter, work.base, "--out", work.folder / "quiet", "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_merge_into_another_base_than_the_adapter_names(work: AdapterFolder) -> None:
    """Shapes do not tell a base from its finetunes, so the merge says what the adapter names."""
    own = run("merge", work.adapter, work.base, "--out", work.out, "--json")
    assert json.loads(own.stdout)["notes"] == []
    factors = factors_of(work.adapter)
    named = {"base_model_name_or_path": "owner/name"}
    adapter = rewritten(work.adapter, work.folder / "named", factors, **named)
    result = run("merge", adapter, work.base, "--out", work.folder / "other")
    assert result.exit_code == 0
    assert "the adapter names owner/name as its base" in " ".join(result.stdout.split())


def wrong_rank(work: AdapterFolder) -> tuple[object, object]:
    changed = rewritten(work.adapter, work.folder / "wrong", factors_of(work.adapter), r=4)
    return changed, work.base


def dora(work: AdapterFolder) -> tuple[object, object]:
    factors = factors_of(work.adapter)
    return rewritten(work.adapter, work.folder / "wrong", factors, use_dora=True), work.base


def other_base(work: AdapterFolder) -> tuple[object, object]:
    other = work.folder / "other"
    tiny.write_checkpoint(tiny.make_model("llama", hidden_size=32, **NO_BIAS), other)
    return work.adapter, other


def pickled(work: AdapterFolder) -> tuple[object, object]:
    folder = work.folder / "wrong"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    return folder, work.base


WRONG: dict[str, tuple[Callable[[AdapterFolder], tuple[object, object]], int, str]] = {
    "no adapter": (lambda b: (b.base, b.base), 4, "this is no PEFT adapter"),
    "no folder": (
        lambda b: (b.folder / "none", b.base),
        4,
        "is neither a folder here nor a Hub id",
    ),
    "not fetched": (lambda b: ("owner/none", b.base), 5, "owner/none"),
    "a pickle": (pickled, 4, "adapter_model.bin is a pickle, which can run code"),
    "another rank": (wrong_rank, 4, "base and configuration make it"),
    "DoRA": (dora, 4, "and the file lacks it"),
    "another base": (other_base, 4, "the sizes of the base"),
    "no base": (lambda b: (b.adapter, b.folder / "none"), 4, "none"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("as_json", [False, True])
def test_merge_of_what_does_not_fit(case: str, as_json: bool, work: AdapterFolder) -> None:
    make, code, message = WRONG[case]
    adapter, base = make(work)
    before = work.listing()
    json_option = ["--json"] if as_json else []
    result = run("merge", adapter, base, "--out", work.folder / "deep" / "out", *json_option)
    assert result.exit_code == code
    assert work.listing() == before
    if as_json:
        error = json.loads(result.stdout)["error"]
        assert error["exit_code"] == code and result.stderr == ""
        assert message in " ".join(filter(None, (error["what"], error["why"], error["fix"])))
    else:
        assert "error: " in result.stderr and message in told(result)


def test_merge_of_an_adapter_on_the_hub(
    work: AdapterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its id, as the cache holds it; the record names the commit and no path of this machine."""
    commit, cache = "c0ffee" + "0" * 34, work.folder / "cache"
    place = cache / "models--owner--style"
    shutil.copytree(work.adapter, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    result = run("merge", "owner/style", work.base, "--out", work.out)
    assert (result.exit_code, result.stderr) == (0, "")
    told_of = json.loads((work.out / "bake.json").read_text())["adapter"]
    assert (told_of["name"], told_of["revision"]) == ("owner/style", commit)
    assert told_of["path"] is None and str(cache) not in json.dumps(told_of)
    assert run("verify", work.out, "--generate", "0", "--no-plots", "-q").exit_code == 0
    by_commit = run("merge", f"owner/style@{commit}", work.base, "--out", work.folder / "c", "-q")
    assert by_commit.exit_code == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(work.folder))
    result = run("verify", work.out, "--generate", "0", "--no-plots", "-q")
    assert result.exit_code == 5 and "owner/style" in told(result)


def test_a_repository_without_an_adapter(
    work: AdapterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work.folder / "none").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: work.folder / "none")
    result = run("merge", "owner/style", work.base, "--out", work.out)
    assert result.exit_code == 4
    assert "owner/style holds no adapter_config.json" in told(result)
    assert not work.out.exists()


def test_merge_into_what_is_there(work: AdapterFolder) -> None:
    work.out.mkdir()
    (work.out / "mine.txt").write_text("mine")
    result = run("merge", work.adapter, work.base, "--out", work.out)
    assert result.exit_code == 2 and "exists and is not empty" in told(result)
    result = run("merge", work.adapter, work.base, "--out", work.out, "--force")
    assert result.exit_code == 2 and "was not written by bake, so it is not replaced" in told(
        result
    )
    assert files_of(work.out) == {"mine.txt": b"mine"}
    (work.out / "mine.txt").unlink()
    assert run("merge", work.adapter, work.base, "--out", work.out, "-q").exit_code == 0
    first = files_of(work.out)
    assert run("merge", work.adapter, work.base, "--out", work.out, "-q").exit_code == 2
    result = run("merge", work.adapter, work.base, "--out", work.out, "-q", "--force")
    assert result.exit_code == 0 and files_of(work.out) == first
    inside = work.out / "adapter"
    shutil.copytree(work.adapter, inside)
    for place in (work.out, inside):
        result = run("merge", inside, work.base, "--out", place, "--force")
        assert result.exit_code == 2 and "holds the adapter" in told(result)
    result = run("merge", work.adapter, work.base, "--out", work.base / "out")
    assert result.exit_code == 2 and "overlap" in told(result)


KILLED = """
import os, sys
from bake.artifact.staged import Stage
from bake.cli import main
real, count = Stage.record, 0

def record(*args):
    global count
    real(*args)
    count += 1
    if count == {after}:
        print("ready", flush=True)
        sys.stdin.read()

Stage.record = record
main({args!r})
"""


def kill(after: int, *args: object) -> None:
    """Run a command in a process that is killed once it has written some shards."""
    code = KILLED.format(after=after, args=[str(arg) for arg in args])
    child = programs.start(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    while (line := child.stdout.readline()) != "ready\n":
        assert line, child.wait()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()


def finished(partial: Path) -> dict[str, int]:
    """Return the shards that a killed run has noted as finished, and when they were written."""
    lines = [json.loads(line) for line in (partial / "journal").read_text().splitlines()]
    names = [line["file"] for line in lines if "file" in line]
    return {name: (partial / "files" / name).stat().st_mtime_ns for name in names}


def test_a_killed_merge_is_taken_up(work: AdapterFolder) -> None:
    sharded = work.folder / "sharded"
    model = tiny.make_model("llama", **NO_BIAS)
    tiny.write_checkpoint(model, sharded, max_shard_size="30KB")
    kill(2, "merge", work.adapter, sharded, "--out", work.out, "-q")
    partial = work.folder / ".out.bake-partial"
    stamps = finished(partial)
    assert not work.out.exists() and len(stamps) == 2
    time.sleep(0.01)
    assert run("merge", work.adapter, sharded, "--out", work.out, "-q").exit_code == 0
    assert not partial.exists()
    for name, stamp in stamps.items():
        assert (work.out / name).stat().st_mtime_ns == stamp
    whole = work.folder / "new"
    assert run("merge", work.adapter, sharded, "--out", whole, "-q").exit_code == 0
    one, other = files_of(work.out), files_of(whole)
    assert one == other


# --- several carriers --------------------------------------------------------------------------

BOTH = ("--to", "lora", "--to", "checkpoint")


def test_export_of_several_carriers(work: AdapterFolder) -> None:
    result = run("export", work.recipe, "--out", work.out, *BOTH)
    assert (result.exit_code, result.stderr) == (0, "")
    for carrier in ("checkpoint", "lora"):
        alone = work.folder / "one" / carrier
        assert run("export", work.recipe, "--out", alone, "--to", carrier, "-q").exit_code == 0
        assert files_of(work.out / carrier) == files_of(alone)
        assert str(work.out / carrier) in result.stdout.replace("\n", "")
    assert {path.name for path in work.out.iterdir()} == {"checkpoint", "lora"}
    verified = run("verify", work.out / "checkpoint", "--generate", "0", "--no-plots", "-q")
    assert verified.exit_code == 0


def test_several_carriers_from_the_recipe_as_json(work: AdapterFolder) -> None:
    text = work.recipe.read_text() + '[export]\nto = ["checkpoint", "lora", "gguf-lora"]\n'
    work.recipe.write_text(text)
    result = run("export", work.recipe, "--out", work.out, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    made = json.loads(result.stdout)["artifacts"]
    assert [artifact["kind"] for artifact in made] == ["checkpoint", "lora", "gguf-lora"]
    for artifact in made:
        path = Path(artifact["path"])
        assert path == work.out / artifact["kind"]
        assert set(artifact["files"]) == set(files_of(path))
    assert len({artifact["plan_digest"] for artifact in made}) == 1
    quiet = run("export", work.recipe, "--out", work.folder / "quiet", "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_a_dry_run_tries_everything_but_writing(work: AdapterFolder) -> None:
    before = work.listing()
    result = run("export", work.recipe, "--out", work.out, *BOTH, "--dry-run", "--json")
    data = json.loads(result.stdout)
    assert (data["dry_run"], data["carriers"]) == (True, ["lora", "checkpoint"])
    result = run("export", work.recipe, "--out", work.out, "--to", "lora", "--dry-run")
    assert "would hold lora" in result.stdout and "bytes of weights" not in result.stdout
    wrong = work.folder / "mood.npy"
    to = ("--to", "checkpoint", "--to", "gguf")
    result = run("export", work.recipe, "--out", work.out, *to, "--gguf", wrong, "--dry-run")
    assert result.exit_code == 4 and "mood.npy" in told(result)
    assert work.listing() == before


REFUSED: dict[str, tuple[tuple[str, ...], int, str]] = {
    "a carrier that does not fit": (
        ("--to", "checkpoint", "--to", "control-vector"),
        3,
        "as control-vector: impossible",
    ),
    "an option that is missing": (
        ("--to", "checkpoint", "--to", "gguf"),
        2,
        "a GGUF is made from one of two things",
    ),
    "a converter that is missing": (
        ("--to", "checkpoint", "--to", "gguf", "--llama-cpp", "nowhere"),
        4,
        "there is no converter at nowhere",
    ),
    "a GGUF that is missing": (
        ("--to", "lora", "--to", "gguf-lora", "--gguf", "nowhere.gguf"),
        4,
        "nowhere.gguf",
    ),
    "no such carrier": (("--to", "checkpoint", "--to", "onnx"), 2, "onnx"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_carrier_that_refuses_leaves_none(case: str, work: AdapterFolder) -> None:
    options, code, message = REFUSED[case]
    before = work.listing()
    result = run("export", work.recipe, "--out", work.folder / "deep" / "out", *options, "-q")
    assert result.exit_code == code
    assert message in told(result)
    assert work.listing() == before


def test_several_into_what_is_there(work: AdapterFolder) -> None:
    (work.out / "lora").mkdir(parents=True)
    (work.out / "lora" / "mine.txt").write_text("mine")
    result = run("export", work.recipe, "--out", work.out, *BOTH)
    assert result.exit_code == 2 and "exists and is not empty" in told(result)
    result = run("export", work.recipe, "--out", work.out, *BOTH, "--force")
    assert result.exit_code == 2 and "holds lora, which bake did not write" in told(result)
    assert files_of(work.out) == {"lora/mine.txt": b"mine"}
    place = work.folder / "new"
    assert run("export", work.recipe, "--out", place, *BOTH, "-q").exit_code == 0
    first = files_of(place)
    assert run("export", work.recipe, "--out", place, *BOTH, "-q", "--force").exit_code == 0
    assert files_of(place) == first
    to = ("--to", "lora", "--to", "gguf-lora")
    assert run("export", work.recipe, "--out", place, *to, "-q", "--force").exit_code == 0
    assert {path.name for path in place.iterdir()} == {"lora", "gguf-lora"}


@pytest.mark.parametrize("to", ["lora", "gguf-lora", "control-vector", "gguf"])
def test_a_base_is_not_replaced_by_what_is_made_from_it(to: str, work: AdapterFolder) -> None:
    """A base that bake wrote itself has a record, which is what --force looks for."""
    base, gguf = work.folder / "baked", work.folder / "base.gguf"
    assert run("merge", work.adapter, work.base, "--out", base, "-q").exit_code == 0
    gguf_files.write(gguf, base)
    if to == "control-vector":
        text = work.recipe.read_text().replace('"ablate"', '"offset"')
        work.recipe.write_text(text.replace('"resid"', '"resid_post.1"'))
    before = files_of(base)
    options = ("--model", base, "--to", to, "-q", "--force")
    options = (*options, "--gguf", gguf) if to == "gguf" else options
    for out in (base, base / "out", work.folder):
        result = run("export", work.recipe, "--out", out, *options)
        assert result.exit_code == 2
        assert "overlap" in told(result) or "was not written by bake" in told(result)
    assert files_of(base) == before
    assert run("export", work.recipe, "--out", work.out, *options).exit_code == 0


def test_a_killed_export_of_several_is_taken_up(work: AdapterFolder) -> None:
    sharded = work.folder / "sharded"
    model = tiny.make_model("llama", **NO_BIAS)
    tiny.write_checkpoint(model, sharded, max_shard_size="30KB")
    args = ("export", work.recipe, "--out", work.out, *BOTH, "--model", sharded, "-q")
    kill(2, *args)
    stamps = finished(work.folder / ".out.bake-partial")
    assert not work.out.exists() and len(stamps) == 2
    time.sleep(0.01)
    result = run(*args)
    assert (result.exit_code, result.stderr) == (0, "")
    assert not (work.folder / ".out.bake-partial").exists()
    for name, stamp in stamps.items():
        assert (work.out / name).stat().st_mtime_ns == stamp
    whole = work.folder / "new"
    again = ("export", work.recipe, "--out", whole, *BOTH, "--model", sharded, "-q")
    assert run(*again).exit_code == 0
    assert files_of(work.out) == files_of(whole)


def test_an_interrupt_says_what_is_kept(
    work: AdapterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupting(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bake.outputs.lora.close_artifact", interrupting)
    result = run("export", work.recipe, "--out", work.out, *BOTH, "-q")
    assert result.exit_code == 130
    assert str(work.folder / ".out.bake-partial") in result.stderr
    assert "the same command takes them up" in result.stderr
    monkeypatch.undo()
    assert run("export", work.recipe, "--out", work.out, *BOTH, "-q").exit_code == 0


def test_an_interrupted_verification_leaves_the_artifact_as_it_was(
    work: AdapterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("export", work.recipe, "--out", work.out, *BOTH, "-q").exit_code == 0
    out = work.out / "checkpoint"
    commands = (("check", out), ("diff", work.base, out))
    assert run("check", out, "--seal").exit_code == 0
    before = [files_of(out), *(run(*words, "--json").stdout for words in commands)]
    save = Store.save

    def interrupting(*args: object, **options: object) -> None:
        save(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "WORTH_KEEPING", 0.0)
    monkeypatch.setattr(Store, "save", interrupting)
    result = run("verify", out, "--no-plots")
    assert result.exit_code == 130
    kept = work.out / ".checkpoint.bake-verify-partial"
    assert str(kept) in result.stderr and list(kept.glob("*.safetensors"))
    assert [files_of(out), *(run(*words, "--json").stdout for words in commands)] == before
    # The control: there it would be minded.
    shutil.copytree(kept, out / ".bake-verify-partial")
    assert run(*commands[0], "--json").stdout != before[1]
    shutil.rmtree(out / ".bake-verify-partial")
    monkeypatch.undo()
    # What is left is bake's own, and is in nobody's way.
    assert run("export", work.recipe, "--out", work.out, *BOTH, "-q", "--force").exit_code == 0
    assert not kept.exists()


def test_the_record_finds_the_base_from_behind_a_link(work: AdapterFolder) -> None:
    """The system walks ".." in the folder that a link leads to, and not where the link stands."""
    far = work.folder / "far" / "away"
    far.mkdir(parents=True)
    (work.folder / "link").symlink_to(far)
    (work.folder / "base").symlink_to(work.base)
    out = work.folder / "link" / "out"
    result = run("export", work.recipe, "--model", work.folder / "base", "--out", out)
    assert (result.exit_code, result.stderr) == (0, "")
    path = json.loads((out / "bake.json").read_text())["base"]["path"]
    assert (out / path).resolve() == work.base.resolve()
    assert run("verify", out, "--generate", "2", "--no-plots").exit_code == 0


# --- what an export says of itself ---------------------------------------------------------------


def shown(result: Result) -> str:
    """Return what an export prints behind its plan."""
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.partition("\nwritten ")[2]


def test_only_a_checkpoint_says_what_it_copied(work: AdapterFolder) -> None:
    text = shown(run("export", work.recipe, "--out", work.out, "-v"))
    sizes = {n: t.nbytes for n, t in open_checkpoint(work.base).tensors.items()}
    copied = int(re.search(r"copied +([\d,]+) bytes", text)[1].replace(",", ""))
    edited = int(re.search(r"edited +([\d,]+) bytes", text)[1].replace(",", ""))
    assert 0 < edited < copied and copied + edited == sum(sizes.values())
    text = shown(run("export", work.recipe, "--to", "lora", "--out", work.folder / "lora", "-v"))
    assert re.match(r"[^\n]+\ncarrier +lora\nsize +[\d,]+ bytes in 4 files\n$", text)


def test_a_gguf_says_what_rounding_left(work: AdapterFolder, tmp_path: Path) -> None:
    """One row of the worst for each type; with -vv every tensor, as the record has it."""
    file = tmp_path / "base.gguf"
    gguf_files.write(file, work.base, kind="F16")
    out = work.folder / "rounded"
    text = shown(run("export", work.recipe, "--to", "gguf", "--gguf", file, "--out", out, "-v"))
    record = json.loads((out / "bake.json").read_text())["gguf"]["tensors"]
    worst = max(tensor["leak"] for tensor in record)
    assert len(record) == 7 and worst > 0
    title, columns, _, row = text[text.index("Rounding") :].splitlines()
    assert title == "Rounding of the edited tensors (of each type the worst)"
    assert columns.split() == ["tensors", "type", "rounding", "edit", "kept", "leak", "error"]
    assert row.split()[:4] == ["7", "F16", "feedback", "100.0%"]
    assert row.split()[4] == f"{worst:.1e}"
    args = ("--to", "gguf", "--gguf", file, "--rounding", "nearest", "-vv", "--force")
    text = shown(run("export", work.recipe, *args, "--out", out))
    record = json.loads((out / "bake.json").read_text())["gguf"]["tensors"]
    for tensor in record:
        pattern = rf"\n{re.escape(tensor['name'])} +F16 +nearest +[\d.]+% +{tensor['leak']:.1e} "
        assert re.search(pattern, text), text
    assert max(tensor["leak"] for tensor in record) > 10 * worst


def test_a_plan_shows_what_storing_costs(tmp_path: Path, tiny_checkpoint: Checkpoints) -> None:
    """The type that the table calls taken is the one that an export then takes."""
    base = tiny_checkpoint("llama", hidden_size=64, intermediate_size=96, head_dim=16, **NO_BIAS)
    recipe, file, out = write_recipe(tmp_path, base), tmp_path / "base.gguf", tmp_path / "out"
    np.save(tmp_path / "mood.npy", np.random.default_rng(0).standard_normal(64))
    plan = ("plan", recipe, "--gguf", file)
    gguf_files.write(file, base, kind="Q5_0")
    assert "Storage in base.gguf (may lose 5% of the KL)" in run(*plan).stdout
    choices = json.loads(run(*plan, "--json").stdout)["storage"]["choices"]
    rows = {
        word: row
        for word in ("keep", "Q8_0", "F16")
        for row in choices
        if set(row["types"].values()) == {word}
    }
    assert rows["keep"]["bytes"] < rows["Q8_0"]["bytes"] < rows["F16"]["bytes"]
    assert rows["keep"]["lost"] > 10 * rows["Q8_0"]["lost"] > 100 * rows["F16"]["lost"]
    told = shown(run("export", recipe, "--to", "gguf", "--gguf", file, "--out", out))
    (taken,) = (row for row in choices if row["taken"])
    assert json.loads((out / "bake.json").read_text())["export"]["gguf_type"] == taken["types"]
    assert "of the edit's KL is lost to rounding" in " ".join(told.split())
    # Nothing to choose: in F16 every tensor stays what it is.
    gguf_files.write(file, base, kind="F16")
    (row,) = json.loads(run(*plan, "--json").stdout)["storage"]["choices"]
    assert row["types"] == {} and row["lost"] == 0.0
    assert "as they are: none is in blocks" in run(*plan).stdout


# --- Modelfiles --------------------------------------------------------------------------------


def commands_of(text: str, folder: Path) -> dict[str, Path]:
    """Parse a Modelfile as Ollama does, and allow nothing that an edit has no business with.

    See ollama parser/parser.go: ParseFile and expandPath. Of FROM and ADAPTER one each; their
    paths are relative to the Modelfile and lead to files.
    """
    found: dict[str, Path] = {}
    assert text.endswith("\n") and not text.startswith("\ufeff")
    for line in text.splitlines():
        instruction, space, value = line.partition(" ")
        assert space and instruction in ("FROM", "ADAPTER") and instruction not in found, line
        assert value == value.strip() and '"' not in value and value.isprintable()
        assert value.startswith(("./", "../"))  # else it could be the name of a model
        found[instruction] = (folder / value).resolve(strict=True)
        assert found[instruction].read_bytes()[:4] == b"GGUF"
    assert "FROM" in found
    return found


def test_modelfiles(work: AdapterFolder, tiny_checkpoint: Checkpoints) -> None:
    models = work.folder / "my models"
    models.mkdir()
    gguf = models / "base f32.gguf"
    gguf_files.write(gguf, work.base)
    to = ("--to", "gguf", "--to", "gguf-lora")
    result = run("export", work.recipe, "--out", work.out, *to, "--gguf", gguf, "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    edited, adapter = work.out / "gguf", work.out / "gguf-lora"
    found = commands_of((edited / MODELFILE).read_text(), edited)
    assert found == {"FROM": (edited / "base f32.gguf").resolve()}
    found = commands_of((adapter / MODELFILE).read_text(), adapter)
    assert found == {"FROM": gguf.resolve(), "ADAPTER": (adapter / "lora.gguf").resolve()}
    record = json.loads((adapter / "bake.json").read_text())
    assert MODELFILE in record["files"]
    # Alone it is the same, and without a GGUF there is none.
    alone = work.folder / "one" / "gguf-lora"
    options = ("--to", "gguf-lora", "-q")
    assert run("export", work.recipe, "--out", alone, *options, "--gguf", gguf).exit_code == 0
    assert files_of(alone) == files_of(adapter)
    unknown = work.folder / "unknown"
    assert run("export", work.recipe, "--out", unknown, *options).exit_code == 0
    assert not (unknown / MODELFILE).exists()
    # The control: what the parser here is strict about.
    for text in ("FROM base.gguf\n", "FROM ./none.gguf\n", "ADAPTER ./lora.gguf\n", "TEMPLATE x\n"):
        with pytest.raises((AssertionError, FileNotFoundError)):
            commands_of(text, adapter)


@pytest.mark.parametrize("to", [("gguf-lora",), ("gguf",), ("checkpoint", "gguf-lora")])
def test_a_name_that_a_modelfile_cannot_hold(to: tuple[str, ...], work: AdapterFolder) -> None:
    """It is refused before the first byte, and not once a large file is written."""
    gguf = work.folder / 'a"b.gguf'
    gguf_files.write(gguf, work.base)
    carriers = [word for carrier in to for word in ("--to", carrier)]
    options = (*carriers, "--gguf", gguf, "-q")
    result = run("export", work.recipe, "--out", work.out, *options, "--dry-run")
    assert result.exit_code == 2 and "cannot be named in a Modelfile" in told(result)
    result = run("export", work.recipe, "--out", work.out, *options)
    assert result.exit_code == 2 and "cannot be named in a Modelfile" in told(result)
    names = {path.name for path in work.folder.iterdir()}
    assert names == {'a"b.gguf', "mood.npy", "recipe.toml", "adapter"}


def test_a_control_vector_has_no_modelfile(work: AdapterFolder) -> None:
    text = (
        work.recipe.read_text().replace('"ablate"', '"offset"').replace('"resid"', '"resid_post.1"')
    )
    work.recipe.write_text(text)
    result = run("export", work.recipe, "--out", work.out, "--to", "control-vector", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    assert set(files_of(work.out)) == {
        "control-vector.gguf",
        "bake.json",
        "bake/edits.safetensors",
    }
