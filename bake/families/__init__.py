"""Family tables: which tensors of an architecture read and write the residual stream, and how."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from bake.errors import FamilyError
from bake.families.layout import BiasSlot, Branch, Layout, Linear, Norm, Part, resolve, runtime_of
from bake.families.runtime import ADAPTABLE, DESCRIBED, READS, RUNTIMES, Runtime
from bake.families.section import Json
from bake.families.table import Family, GgufNames, Recast, configured, parse_family

__all__ = [
    "ADAPTABLE",
    "DESCRIBED",
    "READS",
    "RUNTIMES",
    "BiasSlot",
    "Branch",
    "Family",
    "GgufNames",
    "Json",
    "Layout",
    "Linear",
    "Norm",
    "Part",
    "Recast",
    "Runtime",
    "configured",
    "family_named",
    "find_family",
    "load_families",
    "read_family",
    "resolve",
    "runtime_of",
]


def load_families() -> tuple[Family, ...]:
    """Return the tables that ship with bake, by name."""
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
        FamilyError: no table, or more than one, names the architecture.
    """
    known = load_families() if families is None else families
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise FamilyError(f"architectures = {names!r} names no single class", where="config.json")
    named = [family for family in known if names[0] in family.architectures]
    found = [
        family
        for family in named
        if all(configured(family, config, key) in allowed for key, allowed in family.when.items())
    ]
    if len(found) == 1:
        return found[0]
    supported = ", ".join(sorted({name for family in known for name in family.architectures}))
    if len(found) > 1:
        tables = ", ".join(family.name for family in found)
        raise FamilyError(f"several tables fit {names[0]}: {tables}", where="config.json")
    if named:
        conditions = "; ".join(
            f"{family.name} needs {key} in {list(allowed)}"
            for family in named
            for key, allowed in family.when.items()
        )
        raise FamilyError(f"no table fits this {names[0]}: {conditions}", where="config.json")
    raise FamilyError(
        f"bake has no family table for {names[0]}",
        where="config.json",
        why="without a table it cannot know every tensor that reads or writes the residual stream",
        fix=f"bring one with --family FILE; bake knows {supported}",
    )
