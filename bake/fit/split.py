"""Which examples a fit sees, by which a site is chosen, and by which the choice is judged.

Whoever takes the best of sixty sites by their AUROC finds a good one in noise. So the examples that
choose are not those that judge, and neither are those that were fitted.
"""

import hashlib
from dataclasses import dataclass

from bake.errors import InputError, UsageError

FEWEST = 4
"""Examples of each class that choose, and that judge: three of each are told apart without a fault
by one direction in twenty that means nothing, four by one in seventy."""
FITTED = 2
"""Examples of each class that are fitted at least."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of both classes."""

    positive: tuple[int, ...]
    negative: tuple[int, ...]

    def __str__(self) -> str:
        return f"{len(self.positive)} + {len(self.negative)}"


@dataclass(frozen=True, slots=True)
class Split:
    """Every example is in one of the three."""

    fit: Part
    choose: Part
    judge: Part


def split(positive: int, negative: int, *, held_out: float, seed: int) -> Split:
    """Return a split of two classes; the same for the same numbers, on every machine.

    Classes of one size are split alike, so that examples that stand in one line stay together:
    pairs, and two versions of one question.

    Args:
        positive: how many examples the class has.
        negative: likewise.
        held_out: share of each class that is not fitted: half of it chooses, half of it judges.
        seed: of the order.

    Raises:
        UsageError: a share that is none.
        InputError: a class is too small.
    """
    if not 0 < held_out < 1:
        raise UsageError(
            f"--held-out is {held_out:g}, and no share between 0 and 1",
            fix="leave it out for 0.4: half of that chooses the site, half judges it",
        )
    parts = [
        _parts(count, name, held_out, seed)
        for count, name in ((positive, "positive"), (negative, "negative"))
    ]
    fit, choose, judge = (Part(*both) for both in zip(*parts, strict=True))
    return Split(fit, choose, judge)


def _parts(count: int, name: str, held_out: float, seed: int) -> tuple[tuple[int, ...], ...]:
    least = FITTED + 2 * FEWEST
    if count < least:
        raise InputError(
            f"the {name} class has {count} example{'s' * (count != 1)}",
            why=f"of each class {FITTED} are fitted at least, {FEWEST} choose the site and "
            f"{FEWEST} judge it",
            fix=f"give {least} examples or more of each class; with 80 an interval says something",
        )
    each = max(FEWEST, round(count * held_out / 2))
    if count - 2 * each < FITTED:
        raise UsageError(
            f"--held-out {held_out:g} leaves {count - 2 * each} of {count} examples to fit",
            fix="hold out less",
        )
    # Not a library's generator, whose order may change from one version to the next.
    order = sorted(range(count), key=lambda i: hashlib.sha256(f"{seed} {i}".encode()).digest())
    pieces = (order[2 * each :], order[:each], order[each : 2 * each])
    return tuple(tuple(sorted(piece)) for piece in pieces)
