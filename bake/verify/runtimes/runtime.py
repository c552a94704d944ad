"""``Runtime``: a program that serves artifacts, as facts. Light: the command line lists them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bake.verify.runtimes.request import RuntimeRequest


def _nothing(request: "RuntimeRequest") -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Runtime:
    """One program that loads artifacts and says what it computes."""

    name: str
    """As ``--runtime``, a report and ``Carrier.readers`` spell it."""
    title: str
    """As its makers spell it: for messages."""
    serves: tuple[str, ...]
    """The kinds of artifact that it is asked to load; each of them names it as a reader."""
    worker: str
    """The script in this folder that asks it, in the environment that it is installed in."""
    packages: tuple[str, ...]
    """What its worker imports, by import name: an environment that has them has the runtime."""
    gguf: bool = False
    """Whether it reads GGUF files: then a checkpoint is converted for it first."""
    variables: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Of the worker's environment, beside those that are inherited."""
    details: Callable[["RuntimeRequest"], Mapping[str, Any]] = _nothing
    """What only its worker is told, read from the request's files.

    Raises:
        CheckpointError: the request's adapter is none that it reads.
    """
