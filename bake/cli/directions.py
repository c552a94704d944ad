"""``bake directions``: what is in an artifact."""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from bake.cli.options import direction_options
from bake.cli.output import Output, bake_command

if TYPE_CHECKING:
    from bake.directions import Options


@bake_command("directions")
@click.argument("file")
@direction_options
def command(output: Output, file: str, *, reader: str | None, **options: Unpack["Options"]) -> None:
    """Say what the artifact FILE holds, and where it belongs.

    FILE is a file or a folder, here or at hf://owner/name/path@revision. The last lines are a
    recipe to begin with.
    """
    from bake.checkpoints.hub_names import HUB_PREFIX
    from bake.cli.render import results
    from bake.directions import describe, read_directions
    from bake.recipe import fetch_artifact, first_recipe

    path = fetch_artifact(file) if file.startswith(HUB_PREFIX) else Path(file)
    found = read_directions(path, reader=reader, **options)
    rows = describe(found)
    given = {"reader": reader, **options}
    text = first_recipe(found, file, {k: v for k, v in given.items() if v is not None})
    output.present(
        data=lambda: {
            "concept": found.concept,
            "format": found.format,
            "source": found.source,
            "digest": found.digest,
            "width": found.width,
            "metadata": dict(found.metadata),
            "rows": [row.to_json() for row in rows],
            "recipe": text,
        },
        view=lambda: results.directions(found, rows, text),
    )
