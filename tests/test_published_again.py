"""An artifact is made again from its own record: the same plan, and every file with its digest."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import torch
from commands import RecipeFolder, data_of, recipe_text, run, write_recipe
from folders import files_of, flip
from harness import base_at, plan_of, vector
from harness import edit as edit_at
from hub_server import sha256
from published import rewrite
from safetensors.torch import load_file, save_file

from bake import edits as make
from bake.edits import Edit, EditKind
from bake.errors import InputError, UsageError
from bake.families.fit import layout_of
from bake.plan import Plan
from bake.plan.sketch import differing, sketch
from bake.recipe import disagreement, parse_recipe
from bake.sites import expand
from bake.verify.agreement import agreement, markdown
from bake.verify.artifact import is_inside, open_baked
from bake.verify.files import without_paths
from bake.verify.inputs import open_base
from bake.verify.report import Report
from bake.verify.rows import Row

FAMILIES = Path(__file__).parent.parent / "bake" / "families"

Folders = Callable[..., RecipeFolder]


@pytest.fixture
def folder_of(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Folders:
    def made(
        family: str = "llama",
        *,
        kind: str = "ablate",
        at: str | Sequence[str] = "resid",
        **options: Any,
    ) -> RecipeFolder:
        base = tmp_path / "base"
        shutil.copytree(tiny_checkpoint(family, **options), base)
        recipe = write_recipe(tmp_path, "base", kind=kind, at=at, family=family)
        return RecipeFolder(tmp_path, recipe, base)

    return made


# --- every kind, byte for byte -----------------------------------------------------------------

EVERYWHERE = ("attn_out.*", "mlp_out.*")
KINDS = {
    "checkpoint": ("ablate", "resid", {}),
    "lora": ("ablate", EVERYWHERE, {"family": "mistral"}),  # an adapter holds no biases
    "gguf-lora": ("ablate", EVERYWHERE, {"family": "mistral"}),
    "control-vector": ("offset", "resid_post.1", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_is_made_again_byte_for_byte(folder_of: Folders, kind: str) -> None:
    edit, at, options = KINDS[kind]
    made = folder_of(kind=edit, at=at, **options)
    out = made.export("out", "--to", kind)
    made.recipe.unlink()
    (made.folder / "mood.npy").unlink()  # what is inside has to do
    again = made.folder / "elsewhere" / "again"
    data = data_of("export", out, "--out", again)
    assert files_of(again) == files_of(out)
    count = len(files_of(out))
    assert data["reproduced"] == {
        "identical": count,
        "of": count,
        "record_differs_at": [],
        "differing": [],
    }
    assert data["kind"] == kind and data["again"]["same"] is True
    shutil.rmtree(again)
    told = run("export", out, "--out", again).stdout
    assert f"{count} of {count} files identical" in told


def test_an_edited_gguf_is_made_again_from_the_same_gguf(folder_of: Folders) -> None:
    made = folder_of(at=EVERYWHERE)
    model = made.folder / "model.gguf"
    gguf_files.write(model, made.base)
    out = made.export("out", "--to", "gguf", "--gguf", model, "--rounding", "nearest")
    record = json.loads((out / "bake.json").read_text())
    stated = {"name": "model.gguf", "sha256": sha256(model.read_bytes())}
    assert record["export"] == {"gguf": [stated], "rounding": "nearest"}
    again = made.folder / "again"
    asked = data_of("export", out, "--out", again, code=2)
    assert "was made with the base's GGUF, which the artifact does not hold" in str(asked["error"])
    assert asked["error"]["fix"] == "name it with --gguf"
    other = made.folder / "other"
    other.mkdir()
    shutil.copy(model, other / "model.gguf")
    flip(other / "model.gguf")
    wrong = data_of("export", out, "--out", again, "--gguf", other / "model.gguf", code=4)
    assert "is not the GGUF that" in wrong["error"]["what"] and not again.exists()
    data = data_of("export", out, "--out", again, "--gguf", model)
    assert files_of(again) == files_of(out) and data["reproduced"]["differing"] == []
    # and the option decided something
    feedback = made.export("feedback", "--to", "gguf", "--gguf", model)
    assert files_of(feedback)["bake.json"] != files_of(out)["bake.json"]


def test_an_adapter_for_a_gguf_is_made_again_from_it(folder_of: Folders) -> None:
    made = folder_of("mistral", at=EVERYWHERE)
    model = made.folder / "model.gguf"
    gguf_files.write(model, made.base)
    out = made.export("out", "--to", "gguf-lora", "--gguf", model)
    again = made.folder / "again"
    assert run("export", out, "--out", again).exit_code == 2
    data_of("export", out, "--out", again, "--gguf", model)
    assert files_of(again) == files_of(out)
    plain = made.export("plain", "--to", "gguf-lora")
    refused = data_of("export", plain, "--out", made.folder / "x", "--gguf", model, code=2)
    assert "was not made with --gguf" in refused["error"]["what"]


def test_several_carriers_record_their_own_options(folder_of: Folders) -> None:
    made = folder_of(at=EVERYWHERE)
    model = made.folder / "model.gguf"
    gguf_files.write(model, made.base)
    out = made.export("out", "--to", "checkpoint", "--to", "gguf", "--gguf", model)
    records = {
        kind: json.loads((out / kind / "bake.json").read_text()) for kind in ("checkpoint", "gguf")
    }
    assert "export" not in records["checkpoint"] and "gguf" in records["gguf"]["export"]
    for kind, more in (("checkpoint", ()), ("gguf", ("--gguf", model))):
        again = made.folder / kind
        data_of("export", out / kind, "--out", again, *more)
        assert files_of(again) == files_of(out / kind)


# --- the controls: what is not the same is said ------------------------------------------------


def test_another_base_is_told_by_its_digest(folder_of: Folders) -> None:
    made = folder_of()
    out = made.export()
    again = made.folder / "again"
    weights = load_file(made.base / "model.safetensors")
    metadata = {"format": "pt"}
    changed = {
        **weights,
        "model.layers.0.mlp.down_proj.weight": -weights["model.layers.0.mlp.down_proj.weight"],
    }
    save_file(changed, made.base / "model.safetensors", metadata=metadata)
    data = data_of("export", out, "--out", again, code=1)
    assert [row["file"] for row in data["reproduced"]["differing"]] == [
        "model.safetensors",
        "bake.json",
    ]
    assert (
        "files identical, and these are not: model.safetensors, bake.json" in data["error"]["what"]
    )
    # the headers are the same, so that only the bytes can tell; other headers are told at once
    save_file(
        {**weights, "extra": torch.zeros(2)}, made.base / "model.safetensors", metadata=metadata
    )
    shutil.rmtree(again)
    data = data_of("export", out, "--out", again, code=4)
    assert "is not the base that the artifact was made from" in data["error"]["what"]


def test_other_edits_are_another_plan(folder_of: Folders) -> None:
    made = folder_of()
    out = made.export()
    assert data_of("plan", out)["again"]["same"] is True
    np.save(made.folder / "mood.npy", np.load(made.folder / "mood.npy")[::-1])
    other = made.export("other")
    shutil.copy(other / "bake" / "edits.safetensors", out / "bake")
    data = data_of("plan", out, code=1)
    assert data["again"]["same"] is False
    assert "bake/edits.safetensors is not the file that bake.json lists" in data["error"]["why"]
    assert "would get other values" in data["error"]["why"]
    data = data_of("export", out, "--out", made.folder / "again", code=1)
    assert "is not the recorded one" in data["error"]["what"]
    assert not (made.folder / "again").exists()


def test_the_rounding_of_another_processor_is_no_other_plan(folder_of: Folders) -> None:
    """A digest is over every bit; the sketch tells rounding from another edit."""
    made = folder_of()
    out = made.export()
    record = (out / "bake.json").read_text()
    rewrite(out / "bake.json", lambda found: found["plan"].update(digest="sha256:other"))
    data = data_of("plan", out)
    assert data["again"]["same"] is True and data["again"]["digest"] != data["again"]["recorded"]
    assert "within the rounding of this processor and torch" in data["again"]["notes"][0]
    assert "the plan of the record, within rounding" in run("plan", out).stdout
    told = data_of("export", out, "--out", made.folder / "again", code=1)
    assert told["reproduced"]["record_differs_at"] == ["plan.digest"]
    assert [row["file"] for row in told["reproduced"]["differing"]] == ["bake.json"]
    assert "every other file is the same" in told["error"]["why"]
    # a difference that is none of rounding, and a record that says nothing of the values
    other = json.loads(record)
    first = next(iter(other["sketch"]))
    other["sketch"][first][0] *= 1.001
    other["plan"]["digest"] = "sha256:0"
    (out / "bake.json").write_text(json.dumps(other))
    error = data_of("plan", out, code=1)["error"]
    assert f"{first} would get other values" in error["why"]
    for value, code in (("x", 4), (None, 4), ([], 1), ({}, 4), ([None], 4)):
        other["sketch"][first] = value
        (out / "bake.json").write_text(json.dumps(other))
        assert data_of("plan", out, code=code)["error"]["exit_code"] == code
    del other["sketch"]
    (out / "bake.json").write_text(json.dumps(other))
    assert "the record does not say which" in data_of("plan", out, code=1)["error"]["why"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("ablate", "resid"),
        ("offset", "embed"),
        ("ablate", "ln1_out.1"),
        ("offset", ["attn_out.*", "mlp_out.*"]),
    ],
)
def test_a_sketch_sees_every_tensor(
    family: str, kind: str, at: Any, tiny_checkpoint: Callable[..., Path]
) -> None:
    base = base_at(tiny_checkpoint(family))
    build = {"ablate": make.ablate, "offset": make.offset}[kind]

    def planned(seed: int, share: float = 0.0) -> Plan:
        found = vector(base.layout.hidden, seed) + share * vector(base.layout.hidden, 7)
        return plan_of(base, [edit_at(base, kind, build(found), at)], allow=("nulling",))

    plan = planned(1)
    assert plan.tensors or plan.biases
    kept = json.loads(json.dumps(sketch(plan)))
    assert set(kept) == {update.name for update in (*plan.tensors, *plan.biases)}
    assert differing(kept, plan) == () and differing(kept, planned(1, 1e-14)) == ()
    changed = set(differing(kept, planned(1, 1e-3)))
    # what is copied, and zeros that a flag demands, have no values of the edit
    assert changed == {name for name, numbers in kept.items() if any(numbers)} != set()


def test_a_recipe_that_says_something_else_is_told(folder_of: Folders) -> None:
    made = folder_of()
    out = made.export()
    text = made.recipe.read_text()

    def tell(new: str, *, digest: bool = True) -> str:
        def change(record: dict[str, Any]) -> None:
            record["recipe"]["text"] = new
            if digest:
                record["recipe"]["digest"] = "sha256:" + sha256(new.encode())

        rewrite(out / "bake.json", change)
        why: str = data_of("plan", out, code=1)["error"]["why"]
        return why

    assert "the recipe's digest is" in tell(text + "# more\n", digest=False)
    assert "acts at other sites, first resid_mid.0" in tell(
        text.replace('"resid"', '"resid_pre.*"')
    )
    assert "edit 1 of the recipe (affine mood) is ablate mood" in tell(
        text.replace('"ablate"', '"affine"')
    )
    assert "not one that this bake reads: unknown key" in tell(text + 'unheard = "of"\n')
    assert "most_kl = 0.5, the record None" in tell(text + "[verify]\nmost_kl = 0.5\n")
    assert "nests too deeply" in tell("x = " + "[" * 5000)
    strange = tell(text.replace("mood]", '"\\u001b[2J"]').replace('"mood"', '"\\u001b[2J"'))
    assert "holds U+001B" in strange and "\x1b" not in strange
    tell_again = text + "[export]\n"

    def change(record: dict[str, Any]) -> None:
        record["recipe"]["text"] = tell_again
        record["recipe"]["digest"] = "sha256:" + sha256(tell_again.encode())

    rewrite(out / "bake.json", change)
    assert data_of("plan", out)["again"]["same"] is True  # the same edits in other words


def test_the_record_that_another_bake_wrote_is_named(folder_of: Folders) -> None:
    made = folder_of()
    out = made.export()

    def change(record: dict[str, Any]) -> None:
        record["bake"] = "0.0.9"
        record["plan"]["notes"] = ["in other words"]

    rewrite(out / "bake.json", change)
    data = data_of("export", out, "--out", made.folder / "again", code=1)
    assert data["reproduced"]["record_differs_at"] == ["bake", "plan.notes"]
    assert "made by bake 0.0.9" in data["error"]["why"]
    assert [row["file"] for row in data["reproduced"]["differing"]] == ["bake.json"]


def test_what_the_record_decides_is_not_asked_for(folder_of: Folders) -> None:
    made = folder_of()
    out = made.export()
    for command in ("plan", "export"):
        place = ("--out", made.folder / "x") if command == "export" else ()
        for option in (("--model", "a/b"), ("--allow", "recast"), ("--target", "vllm")):
            error = data_of(command, out, *place, *option, code=2)["error"]
            assert f"{option[0]} is for recipes, and this is an artifact" in error["what"]
    for option in (("--to", "lora"), ("--rounding", "nearest"), ("--outtype", "f32")):
        error = data_of("export", out, "--out", made.folder / "x", *option, code=2)["error"]
        assert f"{option[0]} is for recipes" in error["what"]
    error = data_of("plan", made.recipe, "--base", made.base, code=2)["error"]
    assert "--base is for artifacts" in error["what"]


def test_a_base_that_has_moved_is_asked_for(folder_of: Folders) -> None:
    made = folder_of()
    out = made.export()
    moved = made.base.rename(made.folder / "moved")
    for command in (("plan", out), ("export", out, "--out", made.folder / "x"), ("verify", out)):
        error = data_of(*command, code=4)["error"]
        assert "the base base is not where it was" in error["what"]
        assert error["fix"] == "name it with --base"
    data = data_of("export", out, "--out", made.folder / "x", "--base", moved)
    assert data["reproduced"]["differing"] == []
    assert data_of("plan", out, "--base", moved)["again"]["same"] is True


def test_what_is_no_artifact_is_called_what_it_is(folder_of: Folders) -> None:
    made = folder_of()
    out = made.export()
    (out / "bake.json").unlink()
    for folder, what in ((made.base, "a checkpoint"), (out, "a checkpoint")):
        for command in ("plan", "verify"):
            error = data_of(command, folder, code=4)["error"]
            assert f"this is no artifact of bake: it is {what}" in error["what"]
    error = data_of("plan", made.folder / "absent.toml", code=4)["error"]
    assert "the recipe cannot be read" in error["what"]


# --- the user's own table ----------------------------------------------------------------------


def test_the_users_own_table_travels_in_the_record(folder_of: Folders) -> None:
    made = folder_of()
    text = (FAMILIES / "llama.toml").read_text(encoding="utf-8")
    config = json.loads((made.base / "config.json").read_text())
    config["architectures"] = ["MyCausalLM"]
    (made.base / "config.json").write_text(json.dumps(config))
    own = made.folder / "own.toml"
    own.write_text(text.replace("LlamaForCausalLM", "MyCausalLM").replace('"llama"', '"mine"', 1))
    out = made.export("out", "--family", own)
    record = json.loads((out / "bake.json").read_text())
    assert record["family"]["text"] == own.read_text() and record["family"]["file"] == "own.toml"
    own.unlink()
    again = made.folder / "again"
    assert data_of("export", out, "--out", again)["reproduced"]["differing"] == []
    assert files_of(again) == files_of(out)
    deep = {"file": "own.toml", "digest": "sha256:0", "text": "x = " + "[" * 5000}
    rewrite(out / "bake.json", lambda found: {**found, "family": deep})
    assert "nests too deeply" in data_of("plan", out, code=4)["error"]["what"]
    rewrite(out / "bake.json", lambda found: {k: v for k, v in found.items() if k != "family"})
    error = data_of("plan", out, code=4)["error"]
    assert "bake has no family table for MyCausalLM" in error["what"]
    assert "--family FILE" in error["fix"]


def test_a_table_of_another_class_is_refused(folder_of: Folders, tiny_checkpoint: Any) -> None:
    from bake.checkpoints import open_checkpoint
    from bake.errors import FamilyError
    from bake.families import family_named

    base = open_checkpoint(folder_of().base)
    table = family_named("qwen2")
    with pytest.raises(FamilyError, match="the table qwen2 is for Qwen2ForCausalLM"):
        layout_of(base, table)
    # a model that was declared as another class has that class's own table
    assert layout_of(base, table, declared=True).family.name == "llama"


# --- the limit that a recipe asks for ----------------------------------------------------------


def test_the_recipe_sets_the_limit_of_the_divergence(folder_of: Folders) -> None:
    made = folder_of()
    text = made.recipe.read_text()
    name = "lost in storage: KL(hooked ‖ stored) / KL(hooked ‖ base)"

    def rows(out: Path, *args: object, code: int = 0) -> dict[str, Any]:
        found = data_of("verify", out, "--no-plots", "--generate", "0", *args, code=code)
        return {row["name"]: row for row in found["rows"]}

    plain = rows(made.export("plain"))[name]
    assert 0 < plain["limit"] <= 0.05 and plain["passed"] is True
    made.recipe.write_text(text + "[verify]\nmost_kl = 0.05\n")
    out = made.export()
    assert json.loads((out / "bake.json").read_text())["verify"] == {"most_kl": 0.05}
    found = rows(out)[name]
    assert found["limit"] <= 0.05 and found["passed"] is True and found["value"] > 0
    tight = found["value"] / 2
    assert rows(out, "--most-kl", tight, code=1)[name]["passed"] is False


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("most_kl = 0.0", "most_kl = 0.0 is not above zero"),
        ("most_kl = -1", "most_kl = -1.0 is not above zero"),
        ("most_kl = nan", "most_kl = nan is not finite"),
        ('most_kl = "0.1"', "is no number"),
        ("most_kr = 0.1", "unknown key 'most_kr'"),
    ],
)
def test_a_limit_that_is_none(line: str, what: str, tmp_path: Path) -> None:
    text = recipe_text("base") + f"[verify]\n{line}\n"
    with pytest.raises(UsageError, match=what):
        parse_recipe(text.encode(), tmp_path / "recipe.toml")


# --- nothing of this machine -------------------------------------------------------------------


def test_nothing_that_is_written_names_a_place_of_this_machine(
    folder_of: Folders, tmp_path: Path
) -> None:
    made = folder_of()
    out = made.export()
    # the base is named by its place, as on a command line
    data_of("export", made.recipe, "--model", made.base, "--out", made.folder / "named")
    for folder in (out, made.folder / "named"):
        before = set(files_of(folder))
        data_of("verify", folder, "--html", "--generate", "0", "--rebake")
        written = {n: d for n, d in files_of(folder).items() if n not in before}
        assert {"verify.json", "verify.md", "verify.html", "reproduction.json"} <= set(written)
        for name, data in written.items():
            assert str(tmp_path).encode() not in data, name
            assert tmp_path.name.encode() not in data, name
    assert not any(str(tmp_path).encode() in data for data in files_of(out).values())
    report = json.loads((made.folder / "named" / "verify.json").read_text())
    assert (report["artifact"], report["base"]) == ("named", "base")


def test_paths_are_cut_down_to_their_last_name() -> None:
    text = "no python at '/home/ann/env/bin/python3' (C:\\Users\\ann\\a.b) for /tmp/x"
    assert without_paths(text) == "no python at 'python3' (a.b) for x"
    assert "ann" not in without_paths("python '/home/ann/env/bin/python3'")
    assert without_paths({"classifier:/srv/m/judge": ("/a/b", 1.0)}) == {
        "classifier:judge": ("b", 1.0)
    }
    for plain in ("https://huggingface.co/a/b", "mean KL / mean KL", "owner/name@main", "../x/y"):
        assert without_paths(plain) == plain


# --- two verifications side by side ------------------------------------------------------------

ROWS = (
    Row("effect: hooked − base", 9.5, 1e-9, True, "", "effect"),
    Row("plan − hooked", 1e-12, 1e-9, True, "", "plan"),
    Row("control: plan", 1.0, 1e-9, True, "", "plan control"),
    Row("values off the plan", 0.0, 0.0, True, "", "files"),
    Row("control: files", 9.0, 1.0, True, "", "files control"),
    Row("same most likely token", 1.0, None, None, "", "metric"),
    Row("vllm: lost", 1e-6, 1e-3, True, "", "runtime"),
    Row("vllm: control", 1.0, 1e-3, True, "", "cost control"),
)


def report_of(*rows: Row, digest: str = "sha256:1") -> Report:
    return Report(
        "out", "base", "sha256:plan", "exact", "F32", rows, {"torch": "2"}, {"digest": digest}
    )


def test_the_same_verification_agrees() -> None:
    published = json.loads(json.dumps(report_of(*ROWS).to_json()))
    found = agreement(published, report_of(*ROWS))
    assert found.problems == () and found.notes == ()
    # rounding of another machine is no difference, a runtime that was not asked for neither
    other = (Row("effect: hooked − base", 9.5 + 1e-10, 1e-9, True, "", "effect"), *ROWS[1:6])
    found = agreement(published, report_of(*other))
    assert found.problems == ()
    assert found.notes == ("not measured here (--runtime): vllm: lost, vllm: control",)
    assert "Reproduced: the same rows" in markdown(found, "a/b@c")
    assert "| vllm: lost | 1e-06 pass | – |" in markdown(found, "a/b@c")
    # An earlier bake compared other things, which are no problem; its verdict counts.
    earlier = {**published, "format": 1, "rows": published["rows"][:1]}
    found = agreement(earlier, report_of(*ROWS))
    assert found.problems == () and "an earlier bake" in found.notes[0]
    assert agreement({**earlier, "passed": False}, report_of(*ROWS)).problems


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ((Row("effect: hooked − base", 4.0, 1e-9, True, "", "effect"),), "published as 9.5"),
        # twice the limit is what rounding allows
        ((Row("effect: hooked − base", 9.5 + 3e-9, 1e-9, True, "", "effect"),), "published as 9.5"),
        ((ROWS[0], Row("plan − hooked", 1.0, 1e-3, False, "", "plan")), "here as 1 (failed)"),
        ((ROWS[0],), "plan − hooked: published, and not measured here"),
        ((*ROWS, Row("files as exported", 0.0, 0.0, True, "", "files")), "files as exported: not"),
    ],
)
def test_another_verification_does_not(rows: tuple[Row, ...], problem: str) -> None:
    found = agreement(report_of(*ROWS).to_json(), report_of(*rows))
    assert any(problem in text for text in found.problems), found.problems
    assert "**Not reproduced:**" in markdown(found, "a/b@c")


def test_numbers_of_other_prompts_are_not_compared() -> None:
    other = Row("effect: hooked − base", 4.0, 1e-9, True, "", "effect")
    found = agreement(report_of(*ROWS).to_json(), report_of(other, *ROWS[1:], digest="sha256:2"))
    assert found.problems == () and "published on other prompts" in found.notes[0]
    failed = Row("plan − hooked", 1.0, 1e-3, False, "", "plan")
    found = agreement(report_of(*ROWS).to_json(), report_of(other, failed, digest="sha256:2"))
    assert len(found.problems) == 1


def test_a_published_failure_or_another_plan_is_not_reproduced() -> None:
    published = report_of(*ROWS).to_json()
    found = agreement({**published, "passed": False}, report_of(*ROWS))
    assert found.problems == ("the published verification did not pass",)
    found = agreement({**published, "plan_digest": "sha256:other"}, report_of(*ROWS))
    assert found.problems == ("the published verify.json is of another plan",)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"rows": "x"},
        {"rows": [1]},
        {"rows": [{"name": "a", "value": "1", "limit": None, "passed": True}]},
        {"rows": [{"name": "a", "value": 1, "limit": None, "passed": "yes"}]},
        {"rows": [{"name": "\x1b[2J", "value": 1, "limit": None, "passed": True}]},
        {"rows": [{"name": "a", "value": 1, "limit": None, "passed": True}] * 2},
        {"prompts": []},
        {"environment": {"torch": "\x1b[31m"}},
    ],
)
def test_a_malformed_published_verification_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"verify\.json"):
        raise_where({**report_of(*ROWS).to_json(), **change})


def raise_where(content: dict[str, Any]) -> None:
    try:
        agreement(content, report_of(*ROWS))
    except InputError as error:
        raise InputError(str(error)) from error


# --- recipe and edits --------------------------------------------------------------------------

TWO = recipe_text("base", at=["attn_out.0", "attn_out.1"]) + (
    '[[edits]]\nkind = "offset"\ndirection = "mood"\nat = "resid_post.1"\n'
)


def test_edits_are_those_of_the_recipe(folder_of: Folders) -> None:
    from bake.checkpoints import open_checkpoint

    layout = layout_of(open_checkpoint(folder_of().base))
    recipe = parse_recipe(TWO.encode(), Path("recipe.toml"))
    vector = torch.ones(layout.hidden, dtype=torch.float64)

    def edit(kind: str, *at: str, name: str = "mood") -> Edit:
        sites = expand(at, layers=layout.layers, stream=layout.stream)
        build = {"ablate": make.ablate, "offset": make.offset}[kind]
        return Edit(EditKind(kind), name, sites, build(vector))

    ablate, offset = edit("ablate", "attn_out.0", "attn_out.1"), edit("offset", "resid_post.1")
    split = (edit("ablate", "attn_out.0"), edit("ablate", "attn_out.1"))  # an item for each layer
    assert disagreement(recipe, (ablate, offset), layout) is None
    assert disagreement(recipe, (*split, offset), layout) is None
    for edits, said in (
        ((ablate,), "edit 2 of the recipe (offset mood) is not among them"),
        ((split[0], offset), "acts at other sites, first attn_out.1"),
        ((ablate, offset, offset), "the recipe has no offset mood at resid_post.1"),
        ((offset, ablate), "edit 1 of the recipe (ablate mood) is offset mood"),
        ((edit("ablate", "attn_out.0-1", name="x"), offset), "is ablate x at attn_out.0"),
    ):
        found = disagreement(recipe, edits, layout)
        assert found is not None and said in found


# --- records of strangers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../base/model.safetensors", "a/../../x", "C:/x", "a\\b", ""]
)
def test_names_that_lead_out_of_an_artifact(name: str) -> None:
    assert not is_inside(name)
    assert is_inside("bake/edits.safetensors") and is_inside("model..safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 3},
        {"plan": []},
        {"plan": {"digest": 1, "exactness": "exact"}},
        {"base": {"model": None}},
        {"base": {"model": "x", "revision": 7}},
        {"base": {"model": "x\x1b[2J"}},
        {"recipe": {"title": "x\x1b]0;owned\x07"}},
        {"recipe": "text"},
        {"allow": "recast"},
        {"allow": [1]},
        {"files": []},
        {"files": {"a": 1}},
        {"verify": {"most_kl": "many"}},
        {"verify": {"most_kl": float("inf")}},
        {"verify": {"most_kl": True}},
        {"family": "text"},
    ],
)
def test_a_malformed_record_is_one_line(folder_of: Folders, change: dict[str, Any]) -> None:
    made = folder_of()
    out = made.export()
    rewrite(out / "bake.json", lambda found: {**found, **change})
    for command in ("plan", "verify"):
        error = data_of(command, out, code=4)["error"]
        assert error["type"] == "InputError" and "\x1b" not in str(error)


def test_a_record_that_names_a_key_twice_or_nests_is_refused(folder_of: Folders) -> None:
    made = folder_of()
    out = made.export()
    text = (out / "bake.json").read_text()
    for spoiled in ('{"kind": "x", ' + text.lstrip()[1:], "[" * 100_000, "[]", "", "\ufeff" + text):
        (out / "bake.json").write_text(spoiled)
        assert data_of("plan", out, code=4)["error"]["exit_code"] == 4
    (out / "bake.json").write_bytes(b"\xff\xfe" + text.encode())
    assert data_of("plan", out, code=4)["error"]["exit_code"] == 4


def test_links_out_of_an_artifact_are_not_followed(folder_of: Folders, tmp_path: Path) -> None:
    made = folder_of()
    out = made.export()
    for name in ("bake.json", "bake/edits.safetensors"):
        kept = (out / name).read_bytes()
        outside = tmp_path / "outside"
        outside.write_bytes(kept)
        (out / name).unlink()
        (out / name).symlink_to(outside)
        error = data_of("plan", out, code=4)["error"]
        assert "link out of the folder" in str(error)
        (out / name).unlink()
        (out / name).write_bytes(kept)
    (out / "bake").rename(tmp_path / "moved")
    (out / "bake").symlink_to(tmp_path / "moved")
    assert "lies outside the artifact" in data_of("plan", out, code=4)["error"]["what"]


def test_hostile_edits_are_refused_or_another_plan(folder_of: Folders) -> None:
    """No flipped byte of the edits' file ends in anything but one clear line."""
    made = folder_of()
    out = made.export()
    path = out / "bake" / "edits.safetensors"
    sound = path.read_bytes()
    rng = np.random.default_rng(1)
    header = int.from_bytes(sound[:8], "little")
    for _ in range(60):
        data = bytearray(sound)
        for place in rng.integers(0, 8 + header, size=3):
            data[place] = int(rng.integers(0, 256))
        path.write_bytes(bytes(data))
        result = run("plan", out, "--json")
        assert result.exit_code in (0, 1, 2, 3, 4), result.stdout
        if result.exit_code:
            assert "error" in json.loads(result.stdout)
    for cut in (b"", sound[:7], sound[:20], sound[: 8 + header], sound[:-1], sound + b"x"):
        path.write_bytes(cut)
        assert run("plan", out).exit_code == 4


def test_the_base_that_an_artifact_names_is_read_and_nothing_else(folder_of: Folders) -> None:
    made = folder_of()
    out = made.export()
    artifact = open_baked(out)
    assert open_base(artifact, None).path == made.base.resolve()
    rewrite(out / "bake.json", lambda found: found["base"].update(path="../../../etc"))
    assert "is not where it was" in data_of("plan", out, code=4)["error"]["what"]
