"""``[directions.NAME]``: where a direction comes from, and what its artifact cannot say itself."""

from collections.abc import Mapping
from pathlib import Path

from bake.directions import Shape
from bake.errors import UsageError
from bake.recipe.base import local_path
from bake.recipe.section import Section
from bake.recipe.spec import HUB_PREFIX, DirectionSpec
from bake.section import Toml, nearest


def read_specs(values: Mapping[str, Toml], path: Path) -> Mapping[str, DirectionSpec]:
    """Return the directions of a recipe, by name. Their files are not opened.

    Args:
        values: the tables below ``[directions]``.
        path: the recipe's.

    Raises:
        UsageError: a missing or unknown key, or a value out of its range.
    """
    return {
        name: _direction(name, Section(value, f"{path} [directions.{name}]"), path.parent)
        for name, value in values.items()
    }


def _direction(name: str, table: Section, folder: Path) -> DirectionSpec:
    file = table.take("file", str)
    shape = table.optional("shape", str)
    if shape is not None and shape not in tuple(Shape):
        raise UsageError(
            f"shape = {shape!r} is unknown", where=table.where, fix=nearest(shape, list(Shape))
        )
    layer, sign = table.optional("layer", int), table.take("sign", int, 1)
    if layer is not None and layer < 0:
        raise UsageError(
            f"layer = {layer} is negative", where=table.where, fix="blocks count from 0"
        )
    if sign not in (1, -1):
        raise UsageError(
            f"sign = {sign} is neither 1 nor -1",
            where=table.where,
            fix="a factor belongs to the edit: coefficient, alpha or strength",
        )
    spec = DirectionSpec(
        name=name,
        file=file,
        path=None if file.startswith(HUB_PREFIX) else local_path(folder, file, table.where),
        reader=table.optional("reader", str),
        key=table.optional("key", str),
        shape=None if shape is None else Shape(shape),
        layer=layer,
        sign=sign,
    )
    table.close()
    return spec
