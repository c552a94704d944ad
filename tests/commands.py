"""Commands of bake run in this process, and a recipe of one edit of a tiny model to run them on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from click.testing import CliRunner, Result

from bake.cli import main

RECIPE = """
title = "Mood"
[base]
model = {model}
[directions.mood]
file = "mood.npy"
[[edits]]
kind = {kind}
direction = "mood"
at = {at}
"""


def run(*args: object, columns: int | None = None, stdin: str | None = None) -> Result:
    """Run one command; an exception that is no exit is an error of the test."""
    env = {} if columns is None else {"COLUMNS": str(columns)}
    result = CliRunner(env=env).invoke(main, [str(arg) for arg in args], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def data_of(*args: object, code: int = 0) -> dict[str, Any]:
    """Run one command and return what it prints as JSON."""
    result = run(*args, "--json")
    assert result.exit_code == code, result.stdout + result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def error_of(content: dict[str, Any]) -> str:
    """Return what went wrong and where, in one line, of what a command printed as JSON."""
    error = content["error"]
    return " | ".join(str(error[key]) for key in ("what", "where", "why", "fix") if error[key])


def recipe_text(model: object, *, kind: str = "ablate", at: str | Sequence[str] = "resid") -> str:
    """Return a recipe of one edit along ``mood.npy``."""
    return RECIPE.format(model=json.dumps(str(model)), kind=json.dumps(kind), at=json.dumps(at))


def write_recipe(
    folder: Path,
    model: object,
    *,
    kind: str = "ablate",
    at: str | Sequence[str] = "resid",
    more: str = "",
    family: str = "llama",
) -> Path:
    """Write a recipe of one edit of a tiny model, more of it behind, and its random direction."""
    width = tiny.CONFIGS[family].get("hidden_size", tiny.CONFIGS[family].get("n_embd"))
    np.save(folder / "mood.npy", np.random.default_rng(0).standard_normal(width))
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe_text(model, kind=kind, at=at) + more, encoding="utf-8")
    return recipe


@dataclass(frozen=True)
class RecipeFolder:
    """A folder with a recipe for a tiny model."""

    folder: Path
    recipe: Path
    base: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def rewrite(self, old: str, new: str) -> None:
        """Change the recipe's text."""
        text = self.recipe.read_text(encoding="utf-8")
        assert old in text
        self.recipe.write_text(text.replace(old, new), encoding="utf-8")

    def listing(self) -> set[str]:
        """Every file below the folder, hidden ones too."""
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}

    def export(self, name: str = "out", *args: object) -> Path:
        """Write the recipe's artifact."""
        data_of("export", self.recipe, "--out", self.folder / name, *args)
        return self.folder / name
