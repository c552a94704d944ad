"""The shipped tables, a table of the user's own, and which of them is for a model."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from bake.errors import FamilyError
from bake.families.section import Json
from bake.families.table import Family, configured, parse_family


@cache
def load_families() -> tuple[Family, ...]:
    """Return the tables that ship with bake, by name: read once, since they do not change."""
    files = (f for f in resources.files(__package__).iterdir() if f.name.endswith(".toml"))
    return tuple(
        parse_family(file.read_text(encoding="utf-8"), f"bake/families/{file.name}")
        for file in sorted(files, key=lambda file: file.name)
    )


def read_family(path: Path) -> Family:
    """Return the table in a user's file.

    Raises:
        FamilyError: the file cannot be read or is no table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise FamilyError(f"the family table cannot be read: {reason}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise FamilyError("the family table is no UTF-8 text", where=str(path)) from error
    return parse_family(text, str(path))


def family_named(name: str) -> Family:
    """Return the shipped table of that name."""
    for family in load_families():
        if family.name == name:
            return family
    raise FamilyError(f"there is no family table named {name!r}")


def find_family(config: Mapping[str, Json], families: tuple[Family, ...] | None = None) -> Family:
    """Return the one table for a model's config.json.

    Raises:
        FamilyError: no table, or more than one, is for the architecture, or ``model_type`` is that
            of another class than ``architectures`` names.
    """
    tables = load_families() if families is None else families
    known = (*tables, *(table.wrapped(one) for table in tables for one in table.wrappers))
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise FamilyError(f"architectures = {names!r} names no single class", where="config.json")
    named = [family for family in known if names[0] in family.architectures]
    if not named:
        supported = ", ".join(sorted({name for family in known for name in family.architectures}))
        raise FamilyError(
            f"bake has no family table for {names[0]}",
            where="config.json",
            why="without a table it cannot know every tensor that reads or writes the residual "
            "stream",
            fix=f"bring one with --family FILE; bake knows {supported}",
        )
    _check_model_type(config, names[0], named)
    found = [family for family in named if _is_meant(family, config)]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(family.name for family in found)
        raise FamilyError(f"several tables fit {names[0]}: {several}", where="config.json")
    conditions = "; ".join(
        f"{family.name} needs {key} in {list(allowed)}"
        for family in named
        for key, allowed in family.when.items()
    )
    wrappers = (family.within for family in named if family.within is not None)
    texts = ", ".join(kind for wrapper in wrappers for kind in wrapper.text_types)
    conditions = conditions or f"its text model is none of {texts}"
    raise FamilyError(f"no table fits this {names[0]}: {conditions}", where="config.json")


def _is_meant(family: Family, config: Mapping[str, Json]) -> bool:
    """Return whether a table is for this variant, or this text model, of its class."""
    inner, wrapper = family.section(config), family.within
    if wrapper is not None and inner.get("model_type") not in wrapper.text_types:
        return False
    return all(configured(family, inner, key) in allowed for key, allowed in family.when.items())


def _check_model_type(config: Mapping[str, Json], name: str, named: Sequence[Family]) -> None:
    """Refuse a file whose two names of its class disagree."""
    kinds = sorted({kind for family in named for kind in family.model_types})
    if config.get("model_type", kinds[0]) in kinds:
        return
    raise FamilyError(
        f"architectures names {name}, and model_type = {config['model_type']!r} is not its type",
        where="config.json",
        why="transformers loads the class of model_type, and what is folded for the other one is "
        "lost or lands elsewhere",
        fix=f"set model_type to {' or '.join(map(repr, kinds))}, or name in architectures the "
        "class that the weights are of",
    )
