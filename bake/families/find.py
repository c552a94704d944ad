"""Which table is for a model, and what is said where none is."""

import difflib
from collections.abc import Mapping, Sequence

from bake.errors import FamilyError
from bake.families.config_keys import known_keys
from bake.families.load import load_families, load_refused
from bake.families.section import Json
from bake.families.table import Family, configured


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
        raise _unknown(names[0], config, known)
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


def _unknown(name: str, config: Mapping[str, Json], known: Sequence[Family]) -> FamilyError:
    """Return the error for a class that no table is for: why, or which table is nearest."""
    for refused in load_refused():
        if name in refused.architectures:
            return FamilyError(
                f"bake does not edit a {name}",
                where="config.json",
                why=f"{refused.reason} ({refused.source})",
                fix="hook the model while it runs; no stock weights compute such an edit",
            )
    near, share = nearest(name, config, known)
    return FamilyError(
        f"bake has no family table for {name}",
        where="config.json",
        why="without a table it cannot know every tensor that reads or writes the residual stream",
        fix=f"bring one with --family FILE (docs/families.md). The nearest is {near.name!r}, for "
        f"{near.architectures[0]}, which knows {share:.0%} of the keys of this config.json; "
        "`bake families` lists all",
    )


def nearest(name: str, config: Mapping[str, Json], known: Sequence[Family]) -> tuple[Family, float]:
    """Return the table that a new one for a class is best begun from, and what it knows.

    Args:
        name: the class.
        config: the parsed config.json.
        known: the tables.

    Returns:
        The table whose class knows most of the keys; of several the one whose class is called most
        alike. And the share of the keys that it knows.
    """

    def key(family: Family) -> tuple[float, float]:
        inner = family.section(config)
        unknown = len(set(inner) - known_keys(family)) / max(len(inner), 1)
        alike = difflib.SequenceMatcher(None, name, family.architectures[0]).ratio()
        return 1 - unknown, alike

    own = [family for family in known if family.within is None]
    best = max(own, key=key)
    return best, key(best)[0]


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
