"""The text of a recipe → ``Recipe``. Nothing here opens a model or a direction.

The keys of each table are those of its class in ``bake.recipe.spec``; a table of which their types
do not say all has a module of its own. ``docs/recipes.md`` documents the keys.
"""

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from msgspec import structs

from bake.checkpoints.hub_names import HUB_PREFIX
from bake.errors import InputError, UsageError
from bake.nearby import nearby
from bake.positions import Positions
from bake.recipe.artifacts import located
from bake.recipe.base import local_path, model_of
from bake.recipe.card import read_card
from bake.recipe.edits import check_condition, read_edits
from bake.recipe.export import read_export
from bake.recipe.limits import read_verify
from bake.recipe.settings import with_settings
from bake.recipe.spec import (
    BaseTable,
    CalibrateSpec,
    CalibrateTable,
    DirectionSpec,
    DirectionTable,
    Recipe,
    RecipeFile,
)
from bake.section import Toml, parse_toml
from bake.sites import parse_site

BYTE_ORDER_MARK = "\ufeff"
_YAML = re.compile(r"(?:\s*#.*\n|\s*\n|---.*\n)*[\w-]+:(?:\s|$)")
"""How YAML begins and TOML cannot: a key with a colon."""


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a file.

    Args:
        path: the file.
        settings: ``KEY=VALUE``, instead of values of the file.

    Raises:
        InputError: the file cannot be read.
        UsageError: it is no TOML, lacks a key, or holds an unknown or contradictory one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"the recipe cannot be read: {reason}",
            where=str(path),
            fix=nearby(path, "name a recipe; `bake init MODEL DIRECTION` writes one"),
        ) from error
    return parse_recipe(data, path, settings)


def parse_recipe(data: bytes, path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Return the recipe that a file holds.

    Args:
        data: the file's bytes.
        path: where it is, which its own paths are taken from and messages name.
        settings: ``KEY=VALUE``, instead of values of the file.

    Raises:
        InputError: the file is no UTF-8 text.
        UsageError: it is no TOML, lacks a key, or holds an unknown or contradictory one.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "the recipe is no UTF-8 text",
            where=str(path),
            fix="a recipe is a TOML file; `bake init MODEL DIRECTION` writes one for an artifact",
        ) from error
    if text.startswith(BYTE_ORDER_MARK):
        raise UsageError(
            "the recipe begins with a byte order mark",
            where=str(path),
            why="TOML has none, and no program that reads the record expects one",
            fix="save it as UTF-8 without one",
        )
    _refuse_yaml(text, path)
    values = with_settings(parse_toml(text, "the recipe", UsageError, str(path)), settings)
    # The keys first: a table whose name is misspelt explains most of what else is missing.
    RecipeFile.keys({"edits": [], **values}, str(path))
    kinds = {"title": str, "edits": list}
    root = {
        key: RecipeFile.value(key, values[key], kinds.get(key, dict), str(path)) for key in values
    }

    def table(key: str) -> tuple[Toml, str]:
        return root.get(key, {}), f"{path} [{key}]"

    base = BaseTable.read(*table("base"))
    rows = root.get("directions", {})
    directions = {name: _direction(name, row, path, rows) for name, row in rows.items()}
    return Recipe(
        title=root.get("title", path.stem),
        text=text,
        settings=tuple(settings),
        digest="sha256:" + hashlib.sha256(data).hexdigest(),
        path=path,
        base=model_of(base.model, base.revision, path.parent, f"{path} [base]"),
        directions=directions,
        edits=read_edits(root.get("edits", []), path, directions),
        export=read_export(*table("export")),
        card=read_card(*table("card")),
        verify=read_verify(*table("verify")),
        calibrate=_calibrate(*table("calibrate"), path.parent) if root.get("calibrate") else None,
    )


def _refuse_yaml(text: str, path: Path) -> None:
    if _YAML.match(text):
        raise UsageError(
            "the recipe is YAML, and bake's are TOML",
            where=str(path),
            fix='write [base] and model = "…" below it, [[edits]] and so on: docs/recipes.md',
        )


def _direction(name: str, row: Toml, path: Path, names: Collection[str]) -> DirectionSpec:
    """Return where a direction comes from. Its file is not opened."""
    where = f"{path} [directions.{name}]"
    table = DirectionTable.read(row, where)

    def place(file: str | None) -> Path | None:
        if file is None or file.startswith(HUB_PREFIX):
            return None
        return local_path(path.parent, file, where)

    own, other = place(table.file), place(table.minus)
    with located(where):
        if table.positions is not None:
            Positions(table.positions)
        if table.site is not None:
            parse_site(table.site)
        if table.site is not None and table.layer is not None:
            raise UsageError("layer and site both pick one item", fix="give one of them")
        if table.gate is not None:
            check_condition(table.gate, names)
    return DirectionSpec(**structs.asdict(table), name=name, path=own, minus_path=other)


def _calibrate(values: Toml, where: str, folder: Path) -> CalibrateSpec:
    table = CalibrateTable.read(values, where)
    path = local_path(folder, table.prompts, where)
    return CalibrateSpec(**structs.asdict(table), path=path)
