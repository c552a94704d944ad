"""The kinds of edit as a card explains them; ``methods.toml`` holds the words."""

import tomllib
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType

import msgspec


class Paper(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A paper that introduced a method."""

    authors: str
    title: str
    year: int
    arxiv: str


class Method(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of edit."""

    name: str
    """What it is called in a sentence: "an …"."""
    did: str
    """What it did to a concept: "ablated", for the headline."""
    activation: str
    """The map on activations."""
    weights: str
    """What becomes of a weight W and a bias b that write to the site."""
    where: str
    """The letters."""
    tag: str
    """On the Hub."""
    papers: tuple[Paper, ...]
    """Those that introduced it."""


def _read() -> Mapping[str, Method]:
    text = (resources.files(__package__) / "methods.toml").read_text(encoding="utf-8")
    content = tomllib.loads(text)
    for method in content["methods"].values():
        method["papers"] = [content["papers"][name] for name in method["papers"]]
    return MappingProxyType(msgspec.convert(content["methods"], dict[str, Method]))


METHODS: Mapping[str, Method] = _read()
"""Each kind of edit, by the name that a recipe gives it."""
