"""How long work says how far it is: bytes, or other units, that are done, and their total."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


class Bars(Protocol):
    """Opens the bar of one piece of work: a context that gives its ``Progress``, or None."""

    def __call__(
        self, label: str, *, unit: str | None = None
    ) -> AbstractContextManager[Progress | None]:
        """Open a bar with a label; what is counted are bytes where there is no ``unit``."""


def no_bars(label: str, *, unit: str | None = None) -> AbstractContextManager[None]:
    """Open no bar: nobody looks."""
    return nullcontext()


class Stages(Protocol):
    """Long work of which no one knows the length: stage after stage."""

    def begin(self, text: str) -> None:
        """Say what is begun; a text that is indented tells of a part of a stage."""
        ...

    def expect(self, count: int) -> None:
        """Say how many stages there are to be."""
        ...


class Tally:
    """Adds up what is done, for a ``Progress``."""

    def __init__(self, total: int, report: Progress | None) -> None:
        self._done, self._total, self._report = 0, total, report

    def advance(self, count: int) -> None:
        """Count some more."""
        self._done += count
        if self._report is not None:
            self._report(self._done, self._total)
