"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def table_options(function: F) -> F:
    """Add what a table of the user's own, or his word for a key of the config, is named by."""
    for option in (
        click.option(
            "--assume-harmless",
            multiple=True,
            metavar="KEY",
            help="Take a key of config.json that no table knows to change nothing. "
            "May be repeated.",
        ),
        click.option("--family", type=PATH, metavar="FILE", help="Your own family table."),
    ):
        function = option(function)
    return function


def recipe_options(function: F) -> F:
    """Add the recipe, or the artifact that takes its place, and the options that override it."""
    for option in (
        click.option(
            "--target",
            multiple=True,
            metavar="RUNTIME",
            help="A runtime that must load the result, instead of the recipe's: transformers, "
            "peft, vllm, llama.cpp, sglang, ollama or mlx-lm. May be repeated.",
        ),
        click.option(
            "--allow",
            multiple=True,
            metavar="WHAT",
            help="Allow as well: recast, nulling or approximate. May be repeated.",
        ),
        table_options,
        click.option(
            "--model", metavar="MODEL", help="Edit this model instead: a folder or a Hub id."
        ),
        click.option("--base", metavar="MODEL", help="Of an artifact: where its base is."),
        click.argument("recipe", metavar="RECIPE|ARTIFACT"),
    ):
        function = option(function)
    return function
