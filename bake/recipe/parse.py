"""The text of a recipe → ``Recipe``. Nothing here opens a model or a direction.

Each table of the file has a module of its own, which takes its keys and checks them.
``docs/recipes.md`` documents the keys.
"""

import hashlib
from pathlib import Path

from bake.errors import InputError, UsageError
from bake.recipe.approximation import read_calibrate, read_verify
from bake.recipe.base import read_base
from bake.recipe.card import read_card
from bake.recipe.directions import read_specs
from bake.recipe.edits import read_edits
from bake.recipe.export import read_export
from bake.recipe.section import Section
from bake.recipe.spec import Recipe

BYTE_ORDER_MARK = "\ufeff"


def load_recipe(path: Path) -> Recipe:
    """Return the recipe in a file.

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
            fix="check the path: it is taken from the folder that bake runs in",
        ) from error
    return parse_recipe(data, path)


def parse_recipe(data: bytes, path: Path) -> Recipe:
    """Return the recipe that a file holds.

    Args:
        data: the file's bytes.
        path: where it is, which its own paths are taken from and messages name.

    Raises:
        InputError: the file is no UTF-8 text.
        UsageError: it is no TOML, lacks a key, or holds an unknown or contradictory one.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("the recipe is no UTF-8 text", where=str(path)) from error
    if text.startswith(BYTE_ORDER_MARK):
        raise UsageError(
            "the recipe begins with a byte order mark",
            where=str(path),
            why="TOML has none, and no program that reads the record expects one",
            fix="save it as UTF-8 without one",
        )
    root = Section.parse(text, "the recipe", str(path))
    title = root.take("title", str, path.stem)
    base = root.table("base")
    artifacts = root.take("directions", dict, {})
    rows = root.take("edits", list, [])
    export = root.table("export", optional=True)
    card = root.table("card", optional=True)
    verify = root.table("verify", optional=True)
    fitting = root.table("calibrate", optional=True)
    root.close()  # first: a table whose name is misspelt explains most of what else is missing
    directions = read_specs(artifacts, path)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    return Recipe(
        title=title,
        text=text,
        digest=digest,
        path=path,
        base=read_base(base, path.parent),
        directions=directions,
        edits=read_edits(rows, path, directions),
        export=read_export(export),
        card=read_card(card),
        verify=read_verify(verify),
        calibrate=read_calibrate(fitting, path.parent),
    )
