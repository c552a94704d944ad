"""Write the JSON Schemas of a record and of a recipe anew: ``python docs/make_schemas.py``."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # these classes, whatever bake is installed

from bake.artifact.schema import Record, json_schema  # noqa: E402
from bake.recipe.schema import recipe_schema  # noqa: E402


def schemas() -> dict[str, str]:
    """Return the texts of the schemas by the names of their files."""
    made = {"record.schema.json": json_schema(Record), "recipe.schema.json": recipe_schema()}
    return {name: json.dumps(schema, indent=2) + "\n" for name, schema in made.items()}


if __name__ == "__main__":
    for name, text in schemas().items():
        (HERE / name).write_text(text, encoding="utf-8")
