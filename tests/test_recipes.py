"""Every recipe that ships can be read, and says only what the strict reader knows."""

from pathlib import Path

import pytest

from bake.errors import UsageError
from bake.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def test_there_are_recipes() -> None:
    names = {path.stem for path in RECIPES}
    assert {"quickstart", "quickstart-offset", "refusal-ablation-llama3"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_read(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.title != path.stem
    assert recipe.edits
    assert recipe.export.target
    broken = tmp_path / path.name
    broken.write_text(recipe.text.replace("kind = ", "knid = "), encoding="utf-8")
    with pytest.raises(UsageError, match="knid"):
        load_recipe(broken)
