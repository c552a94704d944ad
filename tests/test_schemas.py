"""The JSON Schemas in ``docs/``: up to date, true of what bake ships, false of what is broken."""

import json
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cards import EXAMPLES, KINDS, example

from bake.errors import UsageError
from bake.recipe import parse_recipe
from bake.recipe.schema import recipe_schema

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def validator(name: str) -> Any:
    schema = json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schemas_are_up_to_date() -> None:
    for name, text in runpy.run_path(str(ROOT / "docs" / "make_schemas.py"))["schemas"]().items():
        stored = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert stored == text, f"run python docs/make_schemas.py: {name} has changed"


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_validates_and_a_broken_one_does_not(kind: str) -> None:
    found = validator("record.schema.json")
    record = {**example(kind, "bake.json"), "schema": 2}
    assert list(found.iter_errors(record)) == []
    for broken in (
        {**record, "schema": 3},
        {**record, "kind": "poem"},
        {**record, "something": 1},
        {**record, "base": {"model": "x"}},
        {**record, "base_tensors": {"x": "sha256:abc"}},
        {**record, "plan": {**record["plan"], "exactness": "rather"}},
    ):
        assert list(found.iter_errors(broken)) != []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_validates(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert list(validator("recipe.schema.json").iter_errors(tomllib.loads(text))) == []


RECIPE = """
[base]
model = "base"
[directions.mood]
file = "mood.npy"
[[edits]]
kind = "ablate"
direction = "mood"
at = "resid"
[export]
[card]
[verify]
text = "held-out.txt"
[verify.gate]
perplexity = 1.05
[verify.gate.scores."contains:sorry"]
most = 0.1
[verify.gate.refusals]
prompts = "asked.txt"
least = 0.9
[calibrate]
prompts = "texts.txt"
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('model = "base"\n', ""),
        ('"ablate"', '"ablat"'),
        ('"resid"', "3"),
        ('"resid"', "[]"),
        ('at = "resid"', 'at = "resid"\nstrenght = 0.5'),
        ('at = "resid"', 'at = "resid"\nalpha = 1.0'),
        ("[export]", '[export]\nto = ["ggfu"]'),
        ("[export]", "[export]\nto = []"),
        ("[verify]", "[verify]\nmost_kl = 0"),
        ("1.05", "0.05"),
        ("most = 0.1", "mast = 0.1"),
        ("most = 0.1", "drop = 0"),
        ("least = 0.9", "least = 1"),
        ("[card]", '[card]\nnotice = "loud"'),
        ('"mood.npy"', '"mood.npy"\nsign = 2'),
        ('"mood.npy"', '"mood.npy"\nlayer = -1'),
        ("[[edits]]", "[[edit]]"),
        ("[calibrate]", "[calibrate]\ntokens = 0"),
    ],
)
def test_what_the_schema_refuses_the_reader_refuses(old: str, new: str) -> None:
    found = validator("recipe.schema.json")
    assert list(found.iter_errors(tomllib.loads(RECIPE))) == []
    assert parse_recipe(RECIPE.encode(), Path("r.toml")).title == "r"  # the control
    broken = RECIPE.replace(old, new, 1)
    assert list(found.iter_errors(tomllib.loads(broken))) != []
    with pytest.raises(UsageError):
        parse_recipe(broken.encode(), Path("r.toml"))


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("[base]", "BaseTable"),
        ("[directions.mood]", "DirectionTable"),
        ("[[edits]]", "EditTable"),
        ("[export]", "ExportTable"),
        ("[card]", "CardTable"),
        ("[verify]", "VerifyTable"),
        ("[verify.gate]", "GateTable"),
        ('[verify.gate.scores."contains:sorry"]', "BoundsTable"),
        ("[verify.gate.refusals]", "RefusalsTable"),
        ("[calibrate]", "CalibrateTable"),
        ("", "RecipeFile"),
    ],
)
def test_the_schema_has_the_keys_of_the_reader(table: str, name: str) -> None:
    """An unknown key's error lists what the reader knows of that table."""
    text = RECIPE.replace(table, f"{table}\n0123456789 = 1\n", 1)
    with pytest.raises(UsageError, match="unknown key '0123456789'") as refused:
        parse_recipe(text.encode(), Path("r.toml"))
    listed = re.sub("^known are ", "", refused.value.fix or "").split(", ")
    assert set(listed) == set(recipe_schema()["$defs"][name]["properties"])


def test_the_examples_are_records_on_disk() -> None:
    assert {path.parent.name for path in EXAMPLES.glob("*/bake.json")} == set(KINDS)
