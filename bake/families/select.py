"""``Only``: which blocks of a model a branch or a row of its table is for.

The blocks of hybrids and of mixtures differ by their number; which is which stands in config.json,
as a list with a word for each, as an interval, or as the number of the first of a kind.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from bake.errors import FamilyError
from bake.families.section import Json, Table, Texts

NumberOrKey = int | str
"""A number, or the config key that holds it."""


@dataclass(frozen=True, slots=True)
class Block:
    """What conditions are held against.

    Attributes:
        layer: its number, counted from 0.
        layers: how many blocks there are.
        said: config.json, with the defaults of the class.
        has: whether the checkpoint has a tensor below the block.
    """

    layer: int
    layers: int
    said: Mapping[str, Json]
    has: Callable[[str], bool]


class Only(Table, frozen=True, kw_only=True):
    """One condition on the number of a block; exactly one of its keys says which."""

    each: Texts = ()
    """The key that holds a list with a word for each block, or a text with a letter for each:
    ``layer_types``; of several, the first that a file has."""
    words: Texts = msgspec.field(name="is", default=())
    """The words that this is for."""
    unsaid: tuple["Only", ...] = ()
    """What holds where config.json has no such list, of words or of numbers."""
    first: NumberOrKey | None = msgspec.field(name="from", default=None)
    """The number of the first block that it is for."""
    below: NumberOrKey | None = None
    """The number of the first block that it is not for."""
    every: NumberOrKey | None = None
    """An interval: blocks whose number leaves ``rest`` when divided by it."""
    rest: NumberOrKey = 0
    """What is left; -1 stands for the last of each interval."""
    among: str = msgspec.field(name="in", default="")
    """A key that holds the numbers of the blocks; a file without it names none."""
    given: str = msgspec.field(name="set", default="")
    """A key that is there and not null: it holds for every block or for none."""
    true: str = ""
    """A key that is true: it holds for every block or for none."""
    last: NumberOrKey | None = None
    """The number of the last block that it is for; -1 stands for the model's last."""
    end: NumberOrKey | None = None
    """How many of the last blocks it is for."""
    above: Mapping[str, int] = {}
    """Keys with numbers that theirs are above: it holds for every block or for none."""
    stored: str = ""
    """A tensor below the block that the checkpoint has: one of several ways to store a layer."""
    never: tuple["Only", ...] = msgspec.field(name="not", default=())
    """Conditions that do not all hold."""

    def holds(self, block: Block) -> bool:
        """Return whether it is for a block.

        Raises:
            FamilyError: a key is missing, of another type, or says nothing of this block.
        """
        layer, said = block.layer, block.said
        if self.each:
            return self._each(block)
        if self.first is not None:
            return layer >= _number(self.first, said)
        if self.below is not None:
            return layer < _number(self.below, said)
        if self.last is not None:
            last = _number(self.last, said)
            return layer <= (last if last >= 0 else block.layers + last)
        if self.end is not None:
            return layer >= block.layers - _number(self.end, said)
        if self.every is not None:
            interval = _number(self.every, said)
            if interval < 1:
                raise FamilyError(f"{self.every} = {interval} is no interval", where="config.json")
            return (layer - _number(self.rest, said)) % interval == 0
        if self.among and (said.get(self.among) is not None or not self.unsaid):
            return layer in _numbers(self.among, said)
        return self._everywhere(block)

    def _everywhere(self, block: Block) -> bool:
        """Return whether it holds where it is no matter of the number of the block."""
        if self.among:
            return all(other.holds(block) for other in self.unsaid)
        if self.given:
            return block.said.get(self.given) is not None
        if self.true:
            return block.said.get(self.true) is True
        if self.above:
            return all(_number(key, block.said) > least for key, least in self.above.items())
        if self.stored:
            return block.has(self.stored)
        return not all(other.holds(block) for other in self.never)

    def _each(self, block: Block) -> bool:
        layer, said = block.layer, block.said
        listed = next((said[key] for key in self.each if said.get(key) is not None), None)
        if listed is None and self.unsaid:
            return all(other.holds(block) for other in self.unsaid)
        if not isinstance(listed, list | str) or len(listed) <= layer:
            named = " or ".join(map(repr, self.each))
            raise FamilyError(
                f"the key {named} is no list with a word for block {layer}",
                where="config.json",
                why="it says which kind of block is where",
            )
        return listed[layer] in self.words

    @property
    def keys_said(self) -> frozenset[str]:
        """The config keys that it reads."""
        numbers = (self.first, self.below, self.last, self.end, self.every, self.rest)
        own = (*numbers, self.among, self.given, self.true, *self.above)
        found = {*self.each, *(key for key in own if isinstance(key, str) and key)}
        return frozenset(found).union(*(o.keys_said for o in (*self.unsaid, *self.never)))

    def check(self, where: str) -> None:
        """Require that exactly one of its keys says which blocks.

        Raises:
            FamilyError: none does, or two do.
        """
        numbers = {
            "from": self.first,
            "below": self.below,
            "last": self.last,
            "end": self.end,
            "every": self.every,
        }
        others = {
            "each": self.each,
            "in": self.among,
            "set": self.given,
            "true": self.true,
            "above": self.above,
            "stored": self.stored,
            "not": self.never,
        }
        kinds = [key for key, value in numbers.items() if value is not None]
        kinds += [key for key, value in others.items() if value]
        if len(kinds) != 1:
            raise FamilyError(
                f"only has {' and '.join(kinds) or 'no condition'}",
                where=where,
                fix=f"one of {', '.join((*numbers, *others))} in each; several are a list of them",
            )
        for other in (*self.unsaid, *self.never):
            other.check(where)


def _number(of: NumberOrKey, said: Mapping[str, Json]) -> int:
    value = said.get(of) if isinstance(of, str) else of
    if not isinstance(value, int) or isinstance(value, bool):
        raise FamilyError(
            f"{of} = {value!r} is no whole number" if value is not None else f"{of!r} is missing",
            where="config.json",
            why="it says which kind of block is where",
        )
    return value


def _numbers(key: str, said: Mapping[str, Json]) -> list[int]:
    found = said.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(type(one) is int for one in found):
        raise FamilyError(f"{key} = {found!r} is no list of whole numbers", where="config.json")
    return found
