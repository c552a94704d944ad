"""A recipe whose edit no stock weights compute: planned, written, verified and made again."""

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import Result
from commands import run
from safetensors.torch import load_file, save_file

from bake.edit_store import EDITS, FITTED, load_edits
from bake.edits import EditKind

RECIPES = Path(__file__).parents[1] / "recipes"
NAME = "quickstart-one-site.toml"
PROMPTS = RECIPES / "quickstart" / "prompts.txt"


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of the shipped recipe, exported once: read it, never write to it."""
    out = tmp_path_factory.mktemp("approximate") / "out"
    result = run("export", RECIPES / NAME, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def verify(folder: Path, report: Path, *options: object) -> Result:
    return run(
        "verify", folder, "--prompts", PROMPTS, "--generate", 0, "--report", report, "--json",
        "--no-plots", *options,
    )  # fmt: skip


def share(report: Path) -> float:
    rows = json.loads((report / "verify.json").read_text())["rows"]
    (row,) = (row for row in rows if row["name"].startswith("lost in storage"))
    return float(row["value"])


def recipe_without(tmp_path: Path, *lines: str) -> Path:
    """Return a copy of the recipe in a folder beside the model, without some of its lines."""
    text = (RECIPES / NAME).read_text()
    for line in lines:
        assert line in text
        text = text.replace(line, "")
    path = tmp_path / NAME
    path.write_text(text.replace('"quickstart/', f'"{RECIPES}/quickstart/'))
    return path


def test_the_plan_says_what_stands_in_for_what(baked: Path) -> None:
    record = json.loads((baked / "bake.json").read_text())
    assert record["plan"]["exactness"] == "approximate"
    for finding in record["plan"]["findings"]:
        assert finding["exactness"] == "approximate"
        assert (
            "stands in for affine 'mood' at resid_post.2: fitted by least squares on"
            in (finding["reason"])
        )
    facts = record["calibration"]
    assert facts["share"] < 0.02 < facts["effect_kl"]
    assert facts["prompts"]["source"] == "eval.txt"
    statuses = {v["runtime"]: v["status"] for v in record["plan"]["runtimes"]}
    assert statuses["transformers"] == statuses["vllm"] == "approximate"


def test_the_artifact_keeps_what_was_asked_and_what_was_folded(baked: Path) -> None:
    (asked,) = load_edits(baked / EDITS)
    assert (asked.kind, [str(s) for s in asked.sites]) == (EditKind.AFFINE, ["resid_post.2"])
    assert {e.kind for e in load_edits(baked / FITTED)} == {EditKind.UPDATE, EditKind.OFFSET}


def test_it_passes_against_the_number_that_the_recipe_asks_for(baked: Path, tmp_path: Path) -> None:
    result = verify(baked, tmp_path)
    assert result.exit_code == 0, result.output
    assert 0.001 < share(tmp_path) < 0.05


def test_every_stand_in_is_left_out_once(baked: Path, tmp_path: Path) -> None:
    """What each is worth: the share of the edit that is lost without it."""
    assert verify(baked, tmp_path).exit_code == 0
    rows = json.loads((tmp_path / "verify.json").read_text())["rows"]
    found = {row["name"]: row for row in rows}
    assert found["control: nothing edited, share lost"]["passed"] is True
    plan = json.loads((baked / "bake.json").read_text())["plan"]
    names = [tensor["name"].removesuffix(".weight") for tensor in plan["tensors"]]
    wanted = {f"without {name}.weight: KL share lost" for name in names}
    wanted |= {f"without {name}.bias: KL share lost" for name in names}
    assert len(wanted) == 10 and wanted <= found.keys()
    lost = [found[name]["value"] for name in wanted]
    assert sum(value > 0.05 for value in lost) >= 4
    # Each is told from the plan all the same, where nothing is rounded.
    controls = [row for row in rows if row["group"] == "plan control"]
    assert len(controls) >= 10 and all(row["passed"] for row in controls)


def test_a_stricter_number_fails(baked: Path, tmp_path: Path) -> None:
    assert verify(baked, tmp_path, "--most-kl", 0.001).exit_code == 1


def test_a_stand_in_that_is_lost_fails(baked: Path, tmp_path: Path) -> None:
    """The same number catches a bake without one of its biases."""
    broken = tmp_path / "broken"
    shutil.copytree(baked, broken)
    (shard,) = broken.glob("model-bake-*.safetensors")
    tensors = load_file(shard)
    tensors["model.layers.2.mlp.down_proj.bias"].zero_()
    save_file(tensors, shard, metadata={"format": "pt"})
    result = verify(broken, tmp_path / "report", "--base", RECIPES / "quickstart" / "model")
    assert result.exit_code == 1
    assert share(tmp_path / "report") > 0.05


def test_it_is_made_again_byte_for_byte(baked: Path, tmp_path: Path) -> None:
    base = RECIPES / "quickstart" / "model"
    result = run("export", baked, "--base", base, "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    count = len(json.loads((baked / "bake.json").read_text())["files"]) + 1
    assert f"{count} of {count} files identical" in result.output


def test_other_stand_ins_than_those_of_the_export_are_noticed(baked: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(baked, other)
    shutil.copyfile(other / EDITS, other / FITTED)
    result = run("plan", other, "--base", RECIPES / "quickstart" / "model")
    assert result.exit_code != 0
    assert "another plan" in result.output or "not the file that bake.json lists" in result.output


def test_it_is_taken_back(baked: Path, tmp_path: Path) -> None:
    base = RECIPES / "quickstart" / "model"
    result = run("revert", baked, "--base", base, "--out", tmp_path / "back")
    assert result.exit_code == 0, result.output
    for path in base.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def test_without_being_allowed_it_is_refused(tmp_path: Path) -> None:
    result = run("plan", recipe_without(tmp_path, 'allow = ["approximate"]'))
    assert result.exit_code == 3
    assert "impossible" in result.output


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ("[calibrate]", 'prompts = "quickstart/eval.txt"'),
            "there are no texts to fit it on",
        ),
        (("[verify]", "most_kl = 0.05"), "nothing says how good it has to be"),
    ],
)
def test_what_an_approximation_needs(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    result = run("plan", recipe_without(tmp_path, *lines))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_fit_that_breaks_its_own_number_is_refused(tmp_path: Path) -> None:
    """Export and plan end with 3 and both shares; the number that they offer is taken."""
    path = recipe_without(tmp_path)
    texts = (RECIPES / "quickstart" / "eval.txt").read_text().splitlines()[:20]
    (tmp_path / "few.txt").write_text("\n".join(texts) + "\n")
    kept = path.read_text().replace(f"{RECIPES}/quickstart/eval.txt", "few.txt")
    assert 'prompts = "few.txt"' in kept
    kept = kept.replace(
        "[calibrate]", "[calibrate]\ncorrections = 0"
    )  # nor any of the later writers
    path.write_text(kept.replace("most_kl = 0.05", "most_kl = 0.0001"))
    result = run("export", path, "--out", tmp_path / "out")
    said = " ".join(result.output.split())
    assert result.exit_code == 3, said
    assert "most_kl allows 0.0001" in said
    assert not (tmp_path / "out").exists()
    (offered,) = re.findall(r"allow more with (most_kl = [\d.]+)", said)
    path.write_text(kept.replace("most_kl = 0.05", offered))
    assert run("plan", path).exit_code == 0


def test_texts_that_are_not_there(tmp_path: Path) -> None:
    path = recipe_without(tmp_path)
    path.write_text(path.read_text().replace("eval.txt", "none.txt"))
    result = run("export", path, "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert "the prompts cannot be read" in result.output
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    """What is advised is done, and the fit goes on to its texts."""
    base = tmp_path / "model"
    shutil.copytree(RECIPES / "quickstart" / "model", base)
    kept = {file.name: file.read_bytes() for file in base.glob("tokenizer*")}
    path = recipe_without(tmp_path)
    text = path.read_text().replace(f"{RECIPES}/quickstart/model", str(base))
    (tmp_path / "few.txt").write_text("One text.\n")
    path.write_text(text.replace(f"{RECIPES}/quickstart/eval.txt", "few.txt"))
    for name in kept:
        (base / name).unlink()
    result = run("plan", path)
    said = " ".join(result.output.split())
    assert result.exit_code == 4, said
    assert "put its files beside the model, tokenizer.json among them" in said
    assert "--prompts" not in said
    for name, data in kept.items():
        (base / name).write_bytes(data)
    assert "1 calibration texts are too few" in " ".join(run("plan", path).output.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rank = 0", "rank = 0 is below 1"),
        ("tokens = 0", "tokens = 0 is below 1"),
        ("corrections = -1", "corrections = -1 is below 0"),
        ("ranks = 2", "unknown key 'ranks'"),
    ],
)
def test_keys_without_a_meaning(tmp_path: Path, line: str, message: str) -> None:
    path = recipe_without(tmp_path)
    path.write_text(path.read_text().replace("[calibrate]", f"[calibrate]\n{line}"))
    result = run("plan", path)
    assert result.exit_code == 2
    assert message in result.output
