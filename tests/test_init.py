"""``bake init``: a recipe for a model and an artifact, whose plan goes ahead."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import data_of, error_of, run

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"


def artifact(folder: Path, family: str = "llama") -> Path:
    path = folder / "mood.npy"
    np.save(path, np.random.default_rng(0).standard_normal(tiny.CONFIGS[family]["hidden_size"]))
    return path


def test_a_recipe_is_written_whose_plan_goes_ahead(tmp_path: Path) -> None:
    out = tmp_path / "mood.toml"
    files = (QUICKSTART / "model", QUICKSTART / "mood.safetensors")
    made = data_of("init", *files, "--out", out)
    assert out.read_text(encoding="utf-8") == made["recipe"]
    kinds = {row["kind"]: row["told"] for row in made["tried"]}
    assert kinds["ablate"] == "ablate: exact" and set(kinds) == {
        "ablate", "affine", "offset", "clamp",
    }  # fmt: skip
    for told in kinds.values():
        assert f"# {told}" in made["recipe"]
    plan = data_of("plan", out)["plan"]
    assert plan["exactness"] == made["exactness"] == "exact"
    # What it says of the carriers is so; one that it does not name is refused.
    for carrier in ("checkpoint", "lora", "gguf-lora", "control-vector"):
        recipe = data_of(
            "plan",
            out,
            "--set",
            f'export.to=["{carrier}"]',
            code=0 if carrier in made["carriers"] else 3,
        )
        assert ("error" in recipe) is (carrier not in made["carriers"])


@pytest.mark.parametrize(("family", "allowed"), [("llama", ""), ("gemma2", "relocate")])
def test_as_little_is_allowed_as_will_do(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str, allowed: str
) -> None:
    out = tmp_path / "recipe.toml"
    vector = artifact(tmp_path, family)
    data_of("init", tiny_checkpoint(family), vector, "--out", out)
    assert data_of("plan", out)["plan"]["exactness"] == "exact"


def test_where_no_checkpoint_holds_it_another_carrier_does(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """An offset of a Qwen3 has no bias to go to: it is recast, or a control vector."""
    from bake.directions import read_directions
    from bake.edits import EditKind
    from bake.jobs import open_model
    from bake.jobs.first_plan import _try

    vector = artifact(tmp_path, "qwen3")
    model = open_model(tiny_checkpoint("qwen3"))
    found = read_directions(vector)
    tried = _try(model, found, str(vector), tmp_path / "r.toml", EditKind.OFFSET, {})
    assert tried.problem is None and tried.allowed in (("widen",), ("relocate",), ("recast",))
    assert "with allow" in tried.told()


def test_nothing_that_exists_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "recipe.toml"
    out.write_text("mine", encoding="utf-8")
    files = (QUICKSTART / "model", QUICKSTART / "mood.safetensors")
    refused = run("init", *files, "--out", out)
    assert (refused.exit_code, out.read_text(encoding="utf-8")) == (2, "mine")
    assert "exists already" in refused.stderr and "--force" in refused.stderr
    assert run("init", *files, "--out", out, "--force").exit_code == 0
    assert "[[edits]]" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("out", "said", "code"),
    [
        ("recipe.yaml", "name a .toml file", 2),
        ("absent/recipe.toml", "there is no folder", 2),
        ("recipe.toml", "no site of this model has width 63", 4),
    ],
)
def test_what_fits_nothing_is_one_error_and_no_file(
    tmp_path: Path, out: str, said: str, code: int
) -> None:
    np.save(tmp_path / "narrow.npy", np.ones(63))
    place = tmp_path / out
    args = ("init", QUICKSTART / "model", tmp_path / "narrow.npy", "--out", place)
    assert said in error_of(data_of(*args, code=code))
    assert not place.exists()
