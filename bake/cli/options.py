"""Options that several commands share, and the artifact that may take a recipe's place."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bake.errors import UsageError

if TYPE_CHECKING:
    from bake.jobs.recorded import Replanned

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


OUT = click.option("--out", type=PATH, required=True, metavar="DIR", help="The folder to create.")
FORCE = click.option("--force", is_flag=True, help="Replace the artifact of bake that is at --out.")
JOBS = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    expose_value=False,
    callback=lambda context, _, jobs: _limit(context, jobs),
    help="How many workers write at once: one on each processor, where it is not said. The bytes "
    "are the same.",
)
DEQUANTIZE = click.option(
    "--dequantize",
    is_flag=True,
    help="Of a quantised base: every weight in floating point, and no codes.",
)
FAMILY = click.option("--family", type=PATH, metavar="FILE", help="Your own family table.")
PLOT = click.option("--plot", type=PATH, metavar="FILE", help="Draw it: a .png or .svg file.")
SET = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Read this instead of the recipe's value: edits.0.strength=0.8. May be repeated.",
)
_FORMS = (".png", ".svg")
_OPTIONS = {"settings": "set"}
"""What an option is called where its parameter has another name."""
_ASSUME_HARMLESS = click.option(
    "--assume-harmless",
    multiple=True,
    metavar="KEY",
    help="Take a key of config.json that no table knows to change nothing. May be repeated.",
)


def _limit(context: click.Context, jobs: int | None) -> None:
    """Let a command write with so many workers."""
    if jobs is not None:
        from bake.checkpoints.workers import at_most

        context.with_resource(at_most(jobs))


def table_options(function: F) -> F:
    """Add what a table of the user's own, or his word for a key of the config, is named by."""
    return FAMILY(_ASSUME_HARMLESS(function))


def device_option(*, gpu: str) -> Callable[[F], F]:
    """Return what adds the device of a model; ``gpu`` says which GPU it takes by itself."""
    return click.option(
        "--device",
        "--device-map",
        "device_map",
        metavar="MAP",
        help=f"cpu, or a device map of transformers; by itself a GPU {gpu}.",
    )


def run_options(*, gpu: str) -> Callable[[F], F]:
    """Return what adds where a model runs, as a whole or block by block."""
    device = device_option(gpu=gpu)
    stream = click.option(
        "--stream/--no-stream",
        "streamed",
        default=None,
        help="Hold one block in memory at a time; by itself where the model is too large.",
    )
    return lambda function: stream(device(function))


def direction_options(function: F) -> F:
    """Add what an artifact of directions may not say of itself."""
    for option in reversed(
        (
            click.option(
                "--reader", metavar="NAME", help="The format, where the file does not say it."
            ),
            click.option("--key", metavar="NAME", help="One tensor or eraser of several."),
            click.option(
                "--shape",
                metavar="SHAPE",
                help="What a plain matrix is: vector, subspace, layers or hidden_states.",
            ),
            click.option(
                "--minus", type=click.Path(path_type=Path), help="The other class's activations."
            ),
            click.option(
                "--feature", type=int, metavar="N", help="One row of a matrix of features."
            ),
            click.option(
                "--index", type=float, metavar="X", help="A block of hidden states, or between two."
            ),
            click.option(
                "--method", metavar="WORD", help="Which of the system's methods the files are of."
            ),
            click.option("--quantiles", metavar="WORD", help="Within which the system's map acts."),
            click.option(
                "--source", type=int, metavar="N", help="The label that all tokens are taken for."
            ),
            click.option(
                "--target", type=int, metavar="N", help="The label that all tokens are given."
            ),
            click.option(
                "--heads", type=int, metavar="N", help="How many heads activations of ITI are of."
            ),
        )
    ):
        function = option(function)
    return function


def check_plot(plot: Path) -> None:
    """Raise before long work when its picture could not be drawn."""
    if plot.suffix.lower() not in _FORMS:
        raise UsageError(f"{plot} is no picture that can be drawn", fix="name a .png or .svg file")
    if not plot.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {plot.parent} for the plot", fix="make it first")
    if find_spec("matplotlib") is None:
        raise UsageError(
            "the plot needs matplotlib, which is not installed",
            fix="install bake-directions[plots], or leave --plot out",
        )


def recipe_options(function: F) -> F:
    """Add the recipe, or the artifact that takes its place, and the options that override it."""
    for option in (
        named_recipe,
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
            help="Allow as well: recast, relocate, widen, nulling or approximate. May be repeated.",
        ),
    ):
        function = option(function)
    return function


def named_recipe(function: F) -> F:
    """Add the recipe or the artifact, and what says of either which model is meant."""
    for option in (
        SET,
        table_options,
        click.option(
            "--model", metavar="MODEL", help="Edit this model instead: a folder or a Hub id."
        ),
        click.option("--base", metavar="MODEL", help="Of an artifact: where its base is."),
        click.argument("recipe", metavar="RECIPE|ARTIFACT"),
    ):
        function = option(function)
    return function


def spelled(options: Mapping[str, Any]) -> list[str]:
    """Return options with their values as a command line spells them."""
    words: list[str] = []
    for name, value in options.items():
        option = f"--{_OPTIONS.get(name, name).replace('_', '-')}"
        for one in value if isinstance(value, tuple) else [] if value is None else [value]:
            words += [option, str(one)]
    return words


def names_artifact(text: str, base: str | None) -> bool:
    """Tell whether an artifact takes the recipe's place.

    Raises:
        UsageError: --base is given for a recipe.
    """
    from bake.jobs.recorded import is_artifact

    if is_artifact(text):
        return True
    if base is not None:
        raise UsageError("--base is for artifacts", fix="a recipe takes another model with --model")
    return False


def planned_again(
    text: str,
    base: str | None,
    *,
    family: Path | None,
    assume_harmless: tuple[str, ...],
    **overrides: Any,
) -> "Replanned":
    """Return the plan of an artifact, made again.

    Raises:
        UsageError: an option asks for what the record decides.
        BakeError: whatever is wrong with the artifact, its base or their fit.
    """
    from bake.jobs.recorded import find, replan

    for name, value in overrides.items():
        if value not in (None, (), False):
            raise UsageError(
                f"{spelled({name: ''})[0]} is for recipes, and this is an artifact",
                why="the plan of an artifact is that of its record",
                fix="name the base with --base, where it has moved",
            )
    source = find(text, weights=False)
    return replan(source, base=base, family=family, assume_harmless=assume_harmless)
