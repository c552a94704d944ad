"""Write the JSON Schemas of a record and of a recipe anew: ``python docs/make_schemas.py``."""

import json
from pathlib import Path

from bake.artifact.schema import Record, json_schema
from bake.recipe.schema import recipe_schema

HERE = Path(__file__).parent


def schemas() -> dict[str, str]:
    """Return the texts of the schemas by the names of their files."""
    made = {"record.schema.json": json_schema(Record), "recipe.schema.json": recipe_schema()}
    return {name: json.dumps(schema, indent=2) + "\n" for name, schema in made.items()}


if __name__ == "__main__":
    for name, text in schemas().items():
        (HERE / name).write_text(text, encoding="utf-8")
