"""The JSON Schema of a recipe, for editors: what ``docs/recipe.schema.json`` is made of."""

from typing import Any

from bake.artifact.schema import json_schema
from bake.recipe.edits import KINDS_OF_KEY
from bake.recipe.spec import RecipeFile


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, with the keys that belong to some kinds of edit only."""
    found = json_schema(RecipeFile)
    for table in found["$defs"].values():
        for key, value in table.get("properties", {}).items():
            table["properties"][key] = _in_toml(value)
    found["$defs"]["EditTable"]["dependentSchemas"] = {
        key: {"properties": {"kind": {"enum": [str(kind) for kind in kinds]}}}
        for key, kinds in KINDS_OF_KEY.items()
    }
    return found


def _in_toml(value: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a value without null, which TOML does not have: a key is left out."""
    found = {key: said for key, said in value.items() if (key, said) != ("default", None)}
    kinds = [kind for kind in found.pop("anyOf", ()) if kind != {"type": "null"}]
    found |= kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {}
    if found.get("type") == "array" and "minLength" in found:  # one text stands for a list of it
        found = {key: said for key, said in found.items() if key != "default"}
        found["type"] = ["string", "array"]
    return found
