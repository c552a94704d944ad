"""``Settings``: what config.json says of one model, in the words of its table."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from msgspec import structs

from bake.errors import FamilyError
from bake.families.config_keys import check_config
from bake.families.section import Json, length_of, rows_of, size_keys
from bake.families.select import Block, Only
from bake.families.table import (
    MISSING,
    PER_SQRT_LAYERS,
    SQRT_HIDDEN,
    TIED,
    BranchRow,
    Family,
    configured,
)
from bake.sites import SiteKind


@dataclass(frozen=True, slots=True)
class Settings:
    """The sizes and switches of one model."""

    family: Family
    config: Mapping[str, Json]
    dims: Mapping[str, int]
    flags: Mapping[str, bool]
    tied: bool
    assumed: tuple[str, ...]
    """Keys that the table does not know and the user takes to change nothing."""

    def has(self, only: tuple[Only, ...], layer: int, stored: Callable[[str], bool]) -> bool:
        """Return whether a block has what some conditions of the table are on.

        Args:
            only: the conditions.
            layer: the number of the block.
            stored: whether the checkpoint has a tensor below the block.
        """
        if not only:
            return True
        said = {**self.family.defaults, **self.config}
        block = Block(layer, self.dims["layers"], said, stored)
        return all(one.holds(block) for one in only)

    def sizes(self, row: BranchRow, rows: Callable[[str], int | None]) -> Mapping[str, int]:
        """Return the sizes of a branch: the model's, but for those that are its own.

        Args:
            row: the branch.
            rows: how many rows a tensor below the block has, None where there is no such tensor.

        Raises:
            FamilyError: a key that the branch names is missing or holds no size.
        """
        own: dict[str, int | None] = {}
        for name, of in row.dims.items():
            tensor, _, part = rows_of(of).partition("/")
            size = rows(tensor) if tensor else _size(self.family, self.config, of)
            own[name] = size // (own[part] or 1) if size is not None and part else size
        for name, size in own.items():
            if size is None:
                raise missing(row.dims[name])
        return {**self.dims, **{name: size for name, size in own.items() if size is not None}}

    def number(self, value: float | str | tuple[str, ...]) -> float:
        """Return a factor that the table says itself, or by the keys whose product it is.

        Raises:
            FamilyError: the key is missing or holds no number.
        """
        if isinstance(value, float):
            return value
        if isinstance(value, tuple):
            return math.prod(map(self.number, value))
        if value == SQRT_HIDDEN:
            return math.sqrt(self.dims["hidden"])
        if value == PER_SQRT_LAYERS:
            return 1 / math.sqrt(self.dims["layers"])
        number = configured(self.family, self.config, value)
        real = isinstance(number, int | float) and not isinstance(number, bool)
        if not real or not math.isfinite(number):
            raise FamilyError(f"the key {value!r} is missing or no number", where="config.json")
        return float(number)


def inner_width(dims: Mapping[str, int], kind: SiteKind) -> int:
    """Return the width of the activations between a reader and a writer."""
    if kind in (SiteKind.Q, SiteKind.Z):
        return dims["heads"] * dims["head_dim"]
    if kind in (SiteKind.K, SiteKind.V):
        return dims["kv_heads"] * dims["head_dim"]
    return dims["inner"]


def read_settings(
    family: Family, config: Mapping[str, Json], assumed: Collection[str] = ()
) -> Settings:
    """Return what a config says of a model.

    Args:
        family: its table.
        config: the parsed config.json.
        assumed: keys that the table does not know and the user takes to change nothing.

    Raises:
        FamilyError: the config contradicts the table, lacks a key or holds an unknown one.
    """
    passed = check_config(family, config, assumed)
    config = family.section(config)
    tied = next((key for key in family.tied_by if key in config), TIED)
    return Settings(
        family,
        config,
        _dims(family, config),
        {key: _flag(config, key, default) for key, default in family.flags.items()},
        _flag(config, tied, family.defaults.get(TIED, MISSING)),
        passed,
    )


def _flag(config: Mapping[str, Json], key: str, default: Json) -> bool:
    value = config.get(key, default)
    if value is MISSING:
        raise FamilyError(f"the key {key!r} is missing", where="config.json")
    if not isinstance(value, bool):
        raise FamilyError(f"{key} = {value!r} is no boolean", where="config.json")
    return value


def _dims(family: Family, config: Mapping[str, Json]) -> dict[str, int]:
    found = {name: _size(family, config, of) for name, of in structs.asdict(family.dims).items()}
    dims = {name: size for name, size in found.items() if size is not None}
    for name in ("layers", "hidden", "vocab", "heads"):
        if name not in dims and (getattr(family.dims, name) or name != "heads"):
            raise missing(getattr(family.dims, name))
    dims.setdefault("heads", 1)  # a mixer without heads is one of its own width
    dims.setdefault("kv_heads", dims["heads"])
    dims.setdefault("head_dim", dims["hidden"] // dims["heads"])
    # GPT-2 leaves n_inner unsaid when it is 4 × n_embd (configuration_gpt2.py).
    dims.setdefault("inner", 4 * dims["hidden"])
    dims.setdefault("experts", 0)
    return dims


def missing(size: str | int | tuple[str, ...]) -> FamilyError:
    """Return the error for a size that config.json does not say."""
    if tensor := rows_of(size):
        return FamilyError(f"a block has no tensor {tensor}, whose rows are a size of the model")
    named = " or ".join(map(repr, size_keys(size)))
    return FamilyError(f"the key {named} is missing", where="config.json")


def _stated(config: Mapping[str, Json], key: str) -> Iterator[Json]:
    """Yield what a file says of a size, if it does."""
    listed = length_of(key)
    if listed is None and key in config:
        yield config[key]
    elif listed is not None and isinstance(config.get(listed), list | str):
        yield len(config[listed])


def _size(
    family: Family, config: Mapping[str, Json], of: str | int | tuple[str, ...]
) -> int | None:
    """Return a size; None where the table names no key for it, or the config leaves it unsaid."""
    if isinstance(of, int):
        return of
    said = {key: size for key in size_keys(of) for size in _stated(config, key)}
    unsaid = {key: family.defaults[key] for key in size_keys(of) if key in family.defaults}
    given = {key: size for key, size in (said or unsaid).items() if size is not None}
    if not given:
        return None
    for key, size in given.items():
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise FamilyError(f"{key} = {size!r} is no positive integer", where="config.json")
    if len(set(given.values())) > 1:
        stated = ", ".join(f"{key} = {size}" for key, size in given.items())
        raise FamilyError(
            f"{stated}: one size, said twice and differently",
            where="config.json",
            why="versions of the class call it so, and each would read another",
        )
    (size,) = set(given.values())
    return int(size)
