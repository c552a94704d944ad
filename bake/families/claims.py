"""``Claims``: every tensor of a checkpoint is claimed once, or the model is refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from bake.errors import CheckpointError, FamilyError
from bake.families.layout import Shape
from bake.families.table import Family

DTYPES = ("F64", "F32", "BF16", "F16")


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """Return a name with the first prefix that it begins with replaced."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


@dataclass(frozen=True)
class Claims:
    """The tensors of one checkpoint, and which of them the table has named so far."""

    family: Family
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    claimed: set[str] = field(default_factory=set)

    @cached_property
    def prefixes(self) -> Mapping[str, str]:
        """What this checkpoint writes for prefixes of the table's names."""
        ways: tuple[Mapping[str, str], ...] = self.family.names
        if self.family.within is None:
            ways = ({}, *ways)
        embed = f"{self.family.embed.module}.weight"
        return next((way for way in ways if renamed(embed, way) in self.shapes), ways[-1])

    def on_disk(self, name: str) -> str:
        """Return the name in this checkpoint of a tensor that the table names."""
        return renamed(name, self.prefixes)

    def live(self, path: str) -> str:
        """Return the path in a loaded model of a module that the table names."""
        return path if self.family.within is None else renamed(path, self.family.within.live)

    def claim(self, name: str, expected: tuple[int | None, ...], what: str) -> str:
        """Claim a tensor by its table name, and return its name in the checkpoint.

        Args:
            name: without a prefix left out.
            expected: its shape; None leaves that axis free.
            what: what it is, for messages.

        Raises:
            CheckpointError: it is missing or has another shape.
            FamilyError: it holds codes, or is claimed already.
        """
        disk = self.on_disk(name)
        if disk not in self.shapes:
            raise CheckpointError(
                f"{what} {disk} is missing from the checkpoint",
                why=f"the table {self.family.name!r} expects it",
                fix="fetch the checkpoint again, or bring a table that fits with --family FILE",
            )
        shape = self.shapes[disk]
        if len(shape) != len(expected) or any(
            want is not None and want != have for want, have in zip(expected, shape, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            raise CheckpointError(
                f"{what} {disk} has the shape {list(shape)} where [{wanted}] is meant",
                why="config.json and the tensors disagree",
            )
        if self.dtypes[disk] not in DTYPES:
            raise FamilyError(
                f"the checkpoint stores {what} {disk} as {self.dtypes[disk]}",
                why="an edit must be folded into weights, and these are codes",
                fix=f"use a checkpoint in one of {', '.join(DTYPES)}",
            )
        if disk in self.claimed:
            raise FamilyError(f"the tensor {disk} is claimed twice", where=self.family.name)
        self.claimed.add(disk)
        return disk

    def close(self, layers: int) -> tuple[str, ...]:
        """Return the tensors that travel as they are, sorted.

        Args:
            layers: how many blocks the model has.

        Raises:
            FamilyError: a tensor is neither claimed nor named among those.
        """
        block = self.family.block
        below = [f"{block.path}.{name}" for name in block.untouched]
        own = [self.on_disk(name) for name in (*below, *self.family.untouched)]
        towers = () if self.family.within is None else self.family.within.untouched
        allowed = [_pattern(name) for name in (*own, *towers)]
        rest = sorted(set(self.shapes) - self.claimed)
        for name in rest:
            found = (pattern.fullmatch(name) for pattern in allowed)
            if not any(match and _is_beyond(match, layers) for match in found):
                raise FamilyError(
                    f"the checkpoint's tensor {name} is not in the table {self.family.name!r}",
                    why="a tensor that bake does not know could read or write the residual stream",
                    fix="bring a table that names it with --family FILE",
                )
        return tuple(rest)


def _pattern(name: str) -> re.Pattern[str]:
    """Return what matches the names that a table leaves alone.

    ``{layer}`` is any number, ``{beyond}`` that of no block, as layers for further tokens are
    counted; ``*`` is any one part between dots, ``**`` any parts, also none.
    """
    text = re.escape(name).replace(r"\{layer\}", r"\d+").replace(r"\{beyond\}", r"(?P<beyond>\d+)")
    return re.compile(text.replace(r"\*\*", ".*").replace(r"\*", r"[^.]+"))


def _is_beyond(match: re.Match[str], layers: int) -> bool:
    """Return whether a number that is to be that of no block is."""
    beyond = match.groupdict().get("beyond")
    return beyond is None or int(beyond) >= layers
