"""``bake directions``: what is in an artifact."""

from pathlib import Path

import click

from bake.cli.output import Output, bake_command


@bake_command("directions")
@click.argument("file")
@click.option("--reader", metavar="NAME", help="The format, where the file does not say it.")
@click.option("--key", metavar="NAME", help="One tensor or eraser of several.")
@click.option(
    "--shape",
    metavar="SHAPE",
    help="What a plain matrix is: vector, subspace or layers.",
)
def command(
    output: Output, file: str, *, reader: str | None, key: str | None, shape: str | None
) -> None:
    """Say what the artifact FILE holds, and where it belongs.

    FILE is a file or a folder, here or at hf://owner/name/path@revision.
    """
    from bake.checkpoints.hub_names import HUB_PREFIX
    from bake.cli.render import results
    from bake.directions import describe, read_directions
    from bake.recipe import fetch_artifact

    path = fetch_artifact(file) if file.startswith(HUB_PREFIX) else Path(file)
    found = read_directions(path, reader=reader, key=key, shape=shape)
    rows = describe(found)
    output.present(
        data=lambda: {
            "concept": found.concept,
            "format": found.format,
            "source": found.source,
            "digest": found.digest,
            "width": found.width,
            "metadata": dict(found.metadata),
            "rows": [row.to_json() for row in rows],
        },
        view=lambda: results.directions(found, rows),
    )
