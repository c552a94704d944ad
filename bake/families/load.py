"""The tables that ship with bake, a table of the user's own, and the classes that none is for."""

from functools import cache
from importlib import resources
from pathlib import Path

from bake.errors import FamilyError
from bake.families.section import Table, Texts
from bake.families.table import Family, parse_family
from bake.section import parse_toml

REFUSED = "refused.toml"


class Refused(Table, frozen=True, kw_only=True):
    """Classes that no table can describe."""

    architectures: Texts
    source: str
    reason: str


class _Refusals(Table, frozen=True, kw_only=True):
    refused: tuple[Refused, ...]


@cache
def load_families() -> tuple[Family, ...]:
    """Return the tables that ship with bake, by name: read once, since they do not change."""
    files = (f for f in resources.files(__package__).iterdir() if f.name.endswith(".toml"))
    return tuple(
        parse_family(file.read_text(encoding="utf-8"), f"bake/families/{file.name}")
        for file in sorted(files, key=lambda file: file.name)
        if file.name != REFUSED
    )


@cache
def load_refused() -> tuple[Refused, ...]:
    """Return the classes that no table can describe, with the reasons."""
    where = f"bake/families/{REFUSED}"
    text = (resources.files(__package__) / REFUSED).read_text(encoding="utf-8")
    values = parse_toml(text, "the list of refused classes", FamilyError, where)
    return _Refusals.read(values, where).refused


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
