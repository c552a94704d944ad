"""How much of an edit there is at each of its sites: ``strength`` and ``coefficient`` of a recipe.

| in the recipe                                 | at a site                               |
|-----------------------------------------------|-----------------------------------------|
| ``0.9``                                       | the number                              |
| ``[0.2, 0.5, 0.9]``                           | that of its block, in rising order      |
| ``{ "8-20" = 0.9, 21 = 0.4 }``                | that of its block                       |
| ``{ peak = 9, max = 1, min = 0.2, width = 6}``| heretic's kernel, see ``Kernel``        |
| ``{ attn_out = 0.9, mlp_out = { … } }``       | that of its kind: a form from above     |

Every site gets its number from the recipe's words: what they leave out is refused, not defaulted.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, TypeVar

from msgspec import Meta
from typing_extensions import override

from bake.errors import UsageError
from bake.section import nearest
from bake.sites import Site, SiteKind, span

_T = TypeVar("_T", int, SiteKind)
KERNEL = ("peak", "max", "min", "width")
"""The numbers of a kernel, see ``Kernel``."""


def _keys(*words: str) -> Meta:
    return Meta(
        extra_json_schema={
            "propertyNames": {"pattern": f"^({'|'.join(('[0-9]+(-[0-9]+)?', *words))})$"}
        }
    )


Inner = float | tuple[float, ...] | Annotated[dict[str, float], _keys(*KERNEL)]
Written = (
    float | tuple[float, ...] | Annotated[dict[str, Inner], _keys(*KERNEL, *map(str, SiteKind))]
)
"""An amount as a recipe's file holds it."""
HERETIC = {
    "max_weight": "max",
    "max_weight_position": "peak",
    "min_weight": "min",
    "min_weight_distance": "width",
}
"""heretic's words for the numbers of its kernel, and ours."""


class Amount(ABC):
    """A number for each site of an edit."""

    @abstractmethod
    def at(self, sites: Sequence[Site], key: str) -> dict[Site, float]:
        """Return the number of every site.

        Args:
            sites: all sites of the edit.
            key: what the recipe calls the amount, for messages.

        Raises:
            UsageError: a site gets none, or one is given for what is no site of the edit.
        """

    @abstractmethod
    def words(self) -> str:
        """Return it in a few words, for the plan and the card."""


@dataclass(frozen=True, slots=True)
class Everywhere(Amount):
    """One number for all sites."""

    value: float

    @override
    def at(self, sites: Sequence[Site], key: str) -> dict[Site, float]:
        return dict.fromkeys(sites, self.value)

    @override
    def words(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True, slots=True)
class InOrder(Amount):
    """One number for each block that the edit acts in, the first block's first."""

    values: tuple[float, ...]

    @override
    def at(self, sites: Sequence[Site], key: str) -> dict[Site, float]:
        blocks = sorted(set(_blocks(sites, key).values()))
        if len(blocks) != len(self.values):
            raise UsageError(
                f"{key} lists {len(self.values)} numbers, and the edit acts in {len(blocks)} "
                f"blocks, {span(blocks)}",
                fix="list one number for each of these blocks, in rising order",
            )
        by_block = dict(zip(blocks, self.values, strict=True))
        return {site: by_block[block] for site, block in _blocks(sites, key).items()}

    @override
    def words(self) -> str:
        return f"{', '.join(f'{value:g}' for value in self.values)} by block"


@dataclass(frozen=True, slots=True)
class ByBlock(Amount):
    """Numbers for runs of blocks: the first and the last one, and the number of all in it."""

    runs: tuple[tuple[int, int, float], ...]

    @override
    def at(self, sites: Sequence[Site], key: str) -> dict[Site, float]:
        blocks = _blocks(sites, key)
        numbers: dict[int, float] = {}
        for first, last, value in self.runs:
            run = range(first, last + 1)
            if twice := numbers.keys() & set(run):
                raise UsageError(f"{key} names block {span(twice)} twice")
            numbers |= dict.fromkeys(run, value)
        _same(numbers.keys(), {*blocks.values()}, lambda odd: f"block {span(odd)}", key)
        return {site: numbers[block] for site, block in blocks.items()}

    @override
    def words(self) -> str:
        return ", ".join(
            f"{value:g} in block{'' if first == last else 's'} {span(range(first, last + 1))}"
            for first, last, value in self.runs
        )


@dataclass(frozen=True, slots=True)
class Kernel(Amount):
    """The kernel of heretic (``Model.abliterate``), over the blocks.

    With δ = |l − peak|, block l has max + δ / width (min − max) where δ ≤ width, and 0 elsewhere:
    the amount falls linearly from ``max`` to ``min``, and from there at once to nothing.
    """

    peak: float
    """The block of the largest amount, counted from 0; it may lie between two."""
    max: float
    min: float
    width: float
    """The distance, in blocks, at which the amount is ``min``."""

    @override
    def at(self, sites: Sequence[Site], key: str) -> dict[Site, float]:
        blocks = _blocks(sites, key)
        if all(abs(block - self.peak) > self.width for block in blocks.values()):
            raise UsageError(
                f"the kernel of {key} is 0 in every block of the edit, {span(blocks.values())}",
                why=f"none is within {self.width:g} blocks of {self.peak:g}",
                fix="move the peak or widen it",
            )
        return {site: self._of(block) for site, block in blocks.items()}

    def _of(self, block: int) -> float:
        distance = abs(block - self.peak)
        if distance > self.width:
            return 0.0
        return self.max + distance / self.width * (self.min - self.max)

    @override
    def words(self) -> str:
        return (
            f"{self.max:g} at block {self.peak:g}, falling to {self.min:g} at {self.width:g} "
            "blocks from it and 0 beyond"
        )


@dataclass(frozen=True, slots=True)
class ByKind(Amount):
    """An amount for each kind of site, such as what attention and what MLPs write."""

    parts: Mapping[SiteKind, Amount]

    @override
    def at(self, sites: Sequence[Site], key: str) -> dict[Site, float]:
        acting = {site.kind for site in sites}
        _same(self.parts.keys(), acting, lambda odd: f"site {', '.join(sorted(odd))}", key)
        found: dict[Site, float] = {}
        for kind, part in self.parts.items():
            found |= part.at([site for site in sites if site.kind is kind], f"{key}.{kind}")
        return {site: found[site] for site in sites}

    @override
    def words(self) -> str:
        return "; ".join(f"{kind} {part.words()}" for kind, part in self.parts.items())


def amount_of(written: Written, key: str) -> Amount:
    """Return what a recipe's value means. Its numbers are finite.

    Args:
        written: the value.
        key: its key, for messages.

    Raises:
        UsageError: a table of other keys than the forms have, or a kernel of no width.
    """
    if isinstance(written, dict) and {*written} & {*SiteKind}:
        for word in written:
            if word not in tuple(SiteKind):
                raise _unknown(word, key, SiteKind)
        return ByKind(
            {SiteKind(kind): _inner(part, f"{key}.{kind}") for kind, part in written.items()}
        )
    return _inner(written, key)


def _inner(written: Inner | Written, key: str) -> Amount:
    """Return an amount that does not tell kinds of sites apart."""
    if isinstance(written, tuple):
        return InOrder(written)
    if not isinstance(written, dict):
        return Everywhere(written)
    numbers = {word: value for word, value in written.items() if isinstance(value, int | float)}
    if not written or len(numbers) < len(written):
        raise UsageError(
            f"{key} = {written!r} is no table of numbers",
            fix='{ "8-20" = 0.9, 21 = 0.4 } gives one to blocks, { attn_out = …, mlp_out = … } one '
            "to kinds of sites",
        )
    if {*numbers} & {*KERNEL, *HERETIC}:
        return _kernel(numbers, key)
    return ByBlock(tuple((*_run(word, key), value) for word, value in numbers.items()))


def _kernel(numbers: Mapping[str, float], key: str) -> Kernel:
    for word in numbers:
        if word not in KERNEL:
            raise _unknown(word, key, KERNEL)
    missing = [word for word in KERNEL if word not in numbers]
    if missing:
        raise UsageError(
            f"the kernel of {key} has no {' and no '.join(missing)}",
            fix="give peak, max, min and width, which heretic calls max_weight_position, "
            "max_weight, min_weight and min_weight_distance",
        )
    if not numbers["width"] > 0:
        raise UsageError(
            f"{key}: width = {numbers['width']:g} is not above zero",
            why="it is the distance from the peak, in blocks, at which the amount is min",
        )
    return Kernel(**numbers)


def _run(word: str, key: str) -> tuple[int, int]:
    """Return the first and the last block of ``"8-20"`` or ``"21"``."""
    first, _, last = word.partition("-")
    if not all(n.isascii() and n.isdecimal() and len(n) <= 5 for n in (first, last or first)):
        raise _unknown(word, key, ())
    run = int(first), int(last or first)
    if run[1] < run[0]:
        raise UsageError(
            f"{key}: {word!r} counts blocks downwards", fix=f'write "{run[1]}-{run[0]}"'
        )
    return run


def _unknown(word: str, key: str, known: Sequence[str] | type[SiteKind]) -> UsageError:
    if word in HERETIC and known == KERNEL:
        fix = f"heretic's {word} is {HERETIC[word]!r} here"
    elif known:
        fix = nearest(word, known)
    else:
        fix = (
            'name blocks, as in { "8-20" = 0.9, 21 = 0.4 }, or peak, max, min and width; kinds of '
            "sites, as in { attn_out = …, mlp_out = … }, stand outermost"
        )
    return UsageError(f"{key} has the unknown key {word!r}", fix=fix)


def _blocks(sites: Sequence[Site], key: str) -> dict[Site, int]:
    """Return the block of every site."""
    found = {site: site.layer for site in sites if site.layer is not None}
    rest = [site for site in sites if site.layer is None]
    if rest:
        raise UsageError(
            f"{key} goes by block, and {rest[0]} is in none",
            fix=f"give its kind a number of its own: {key} = {{ {rest[0].kind} = 1.0, … }}",
        )
    return found


def _same(named: Set[_T], acting: Set[_T], told: Callable[[Set[_T]], str], key: str) -> None:
    """Refuse an amount for what the edit does not touch, and none for what it does."""
    if rest := acting - named:
        raise UsageError(
            f"{key} gives no number to {told(rest)}, where the edit acts",
            fix="name it too, with 0 where the edit is not to act",
        )
    if odd := named - acting:
        raise UsageError(
            f"{key} gives a number to {told(odd)}, where the edit does not act",
            fix="leave it out, or add it to `at`",
        )
