"""``bake try``: a model's answers as it is and under the edits, before anything is written."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.cli.options import device_option, named_recipe, names_artifact
from bake.cli.output import Output, bake_command
from bake.errors import UsageError
from bake.jobs.fit_directions import DTYPES
from bake.jobs.trying import TOKENS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bake.jobs.trying import Trial, Turn

_FORGET = "/new"


@bake_command("try")
@named_recipe
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=TOKENS,
    show_default=True,
    metavar="N",
    help="The most that an answer has.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="What the model runs in: float32 where memory allows it.",
)
@device_option(gpu="that has room")
def command(
    output: Output, recipe: str, prompts: tuple[str, ...], *, base: str | None, **options: Any
) -> None:
    """Let the model of RECIPE answer as it is, and under the edits.

    Nothing is written. Edits act as hooks, always and everywhere, as weights would: what no weights
    compute is tried as well. Answers are greedy. Without a PROMPT a chat begins, or every line of
    a pipe is one.

    Of an ARTIFACT that is a whole model the baked weights answer too.

    \b
    bake try recipe.toml "How was your weekend?"
    bake try recipe.toml --set edits.0.strength=0.5 "How was your weekend?"
    """
    if not prompts and not sys.stdin.isatty():
        prompts = tuple(line.strip() for line in sys.stdin if line.strip())
        if not prompts:
            raise UsageError("there is no prompt", fix='name one: bake try RECIPE "How are you?"')
    with output.stages() as stages:
        trial = _opened(recipe, base, stages.begin, **options)
        said = {}
        for voice in trial.voices if prompts else ():
            stages.begin(f"answers of {_NAMES[voice]}")
            said[voice] = trial.answer(voice, [[_user(text)] for text in prompts])
    if not prompts:
        _chat(trial)
        return
    rows = [dict(zip(said, texts, strict=True)) for texts in zip(*said.values(), strict=True)]
    output.present(
        data=lambda: {
            "answers": [
                {"prompt": prompt, **row} for prompt, row in zip(prompts, rows, strict=True)
            ]
        },
        view=lambda: _view(prompts, rows),
    )
    if all(row["base"] == row["hooked"] for row in rows):
        output.remark(
            "the edits change none of these answers; more of one: --set edits.0.strength=2, or "
            "coefficient, or alpha"
        )


_NAMES = {"base": "the base", "hooked": "the base under hooks", "baked": "the baked model"}


def _opened(
    recipe: str,
    base: str | None,
    remark: Any,
    *,
    model: str | None,
    settings: tuple[str, ...],
    **options: Any,
) -> "Trial":
    from bake.jobs.recorded import find
    from bake.jobs.trying import TryOptions, try_artifact, try_recipe

    table = {name: options.pop(name) for name in ("family", "assume_harmless")}
    how = TryOptions(**options)
    if not names_artifact(recipe, base):
        return try_recipe(Path(recipe), how, remark, model=model, settings=settings, **table)
    for name, value in (("--model", model), ("--set", settings)):
        if value:
            raise UsageError(f"{name} is for recipes, and this is an artifact", fix="leave it out")
    return try_artifact(find(recipe, weights=True), how, remark, base=base, **table)


def _user(text: str) -> "Turn":
    return {"role": "user", "content": text}


def _view(prompts: tuple[str, ...], rows: list[dict[str, str]]) -> "Iterator[RenderableType]":
    from rich.text import Text

    from bake.cli.render.pieces import facts

    for prompt, row in zip(prompts, rows, strict=True):
        yield Text(f"\n{prompt}" if prompt is not prompts[0] else prompt, "bold")
        yield facts((voice, text.strip() or "(nothing)") for voice, text in row.items())


def _chat(trial: "Trial") -> None:
    """Talk with every voice, each of which remembers its own answers."""
    from bake.cli.render.screen import show

    click.echo(f"{_FORGET} forgets what was said; Ctrl-D ends", err=True)
    told: dict[str, list[Turn]] = {voice: [] for voice in trial.voices}
    while (text := _typed()) is not None:
        if text == _FORGET:
            told = {voice: [] for voice in trial.voices}
            continue
        said: dict[str, str] = {}
        for voice, chat in told.items():
            chat.append(_user(text))
            (said[voice],) = trial.answer(voice, [chat])
            chat.append({"role": "assistant", "content": said[voice]})
        show([*_view((text,), [said])][1:])


def _typed() -> str | None:
    """Return the next line that is not empty, or None when there is none."""
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            click.echo(err=True)
            return None
        if text:
            return text
