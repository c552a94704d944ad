"""``bake init``: a recipe for a model and a fitted artifact, with what the plan says of it."""

from pathlib import Path
from typing import Any

import click

from bake.cli.options import PATH, direction_options, table_options
from bake.cli.output import Output, bake_command
from bake.errors import UsageError

_RECIPE = ".toml"


@bake_command("init")
@click.argument("model")
@click.argument("direction")
@click.option(
    "--out",
    type=PATH,
    default=Path("recipe.toml"),
    show_default=True,
    metavar="FILE",
    help="The recipe to write.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a model on the Hub.")
@direction_options
@table_options
@click.option("--force", is_flag=True, help="Replace the recipe that is at --out.")
def command(
    output: Output, model: str, direction: str, *, out: Path, force: bool, **options: Any
) -> None:
    """Write a recipe that edits MODEL with the artifact DIRECTION.

    Both are recognised, every kind of edit that DIRECTION could be is planned, and one that goes
    ahead is chosen, exact where there is one. What the others come to stands in the recipe.

    \b
    bake init meta-llama/Meta-Llama-3-8B-Instruct refusal/direction.pt
    """
    from bake.atomic import write_atomically
    from bake.checkpoints.hub_names import HUB_PREFIX
    from bake.cli.render.pieces import facts, next_step
    from bake.cli.render.plans import brief
    from bake.directions import read_directions
    from bake.jobs.first_plan import first_plan
    from bake.jobs.model import open_model
    from bake.recipe import fetch_artifact

    if out.suffix != _RECIPE:
        raise UsageError(f"--out names {out.name}", fix=f"name a {_RECIPE} file")
    if out.exists() and not force:
        raise UsageError(f"{out} exists already", fix="name another --out, or give --force")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {out.parent} for --out", fix="make it first")
    named = {name: options.pop(name) for name in ("revision", "family", "assume_harmless")}
    path = fetch_artifact(direction) if direction.startswith(HUB_PREFIX) else Path(direction)
    said = {name: value for name, value in options.items() if value is not None}
    found = read_directions(path, **options)
    opened = open_model(model, **named)
    made = first_plan(opened, found, direction, out, options=said, bars=output.bar)
    write_atomically(out, made.text.encode())
    others = [("not taken", one.told()) for one in made.tried if one is not made.chosen]
    output.present(
        data=lambda: {**made.to_json(), "written": str(out)},
        view=lambda: [
            facts(
                [
                    *brief(made.request),
                    *others,
                    ("written", str(out)),
                    next_step("bake", "try", out, "PROMPT"),
                ]
            )
        ],
    )
