"""``bake diff``: what differs between two models, from their bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bake.atomic import write_atomically
from bake.cli.options import FAMILY, PATH, PLOT, check_plot
from bake.cli.output import Output, bake_command
from bake.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@bake_command("diff")
@click.argument("models", nargs=-1, required=True, metavar="[BASE] OUT")
@click.option(
    "--direction",
    "directions",
    multiple=True,
    type=PATH,
    metavar="FILE",
    help="Compare what the changes share with this artifact; may be given again.",
)
@click.option(
    "--most-rank",
    type=click.IntRange(1, 256),
    default=16,
    show_default=True,
    metavar="N",
    help="Tell ranks apart up to this one.",
)
@click.option("--rank/--no-rank", "ranks", default=True, help="Leave ranks and subspaces out.")
@PLOT
@FAMILY
def command(
    output: Output,
    models: tuple[str, ...],
    *,
    directions: tuple[Path, ...],
    most_rank: int,
    ranks: bool,
    plot: Path | None,
    family: Path | None,
) -> None:
    """Say byte by byte what differs between BASE and OUT.

    Both are folders, Hub ids or GGUF files. Without BASE it is the one that OUT's record names.
    Models that bake did not make are reported on: how much every tensor changed, in which rank,
    and whether the changes share a direction of the residual stream.

    The exit code is 1 when OUT was made by bake and differs in anything that its plan does not
    name; 0 otherwise, whatever differs.
    """
    if len(models) > 2:
        raise UsageError(f"{len(models)} models are named", fix="name one, or two: BASE OUT")
    if plot is not None:
        check_plot(plot)
    from bake.cli.render.comparison import comparison
    from bake.diff import diff
    from bake.families import read_family

    given = _given(directions)
    with output.bar("comparing") as move:
        found = diff(
            models[-1],
            models[0] if len(models) == 2 else None,
            family=None if family is None else read_family(family),
            most_rank=most_rank,
            ranks=ranks,
            given=given,
            progress=move,
        )
    if plot is not None and not found.drawable:
        output.remark("nothing is drawn: no tensor with a norm has changed")
        plot = None
    if plot is not None:
        from bake.diff.plot import draw

        write_atomically(plot, draw(found, plot.suffix.lower().removeprefix(".")))
    output.present(
        data=lambda: {**found.to_json(), "plot": None if plot is None else str(plot)},
        brief=(lambda: []) if found.other_base else None,
        view=lambda: comparison(found, plot, verbose=bool(output.verbose)),
        error=found.failure(),
    )


def _given(files: Sequence[Path]) -> "dict[str, Tensor]":
    """Return the directions of some artifacts as rows in float64, by what to call them."""
    from bake.directions import Role, read_directions

    rows: dict[str, Tensor] = {}
    for path in files:
        for item in read_directions(path).items:
            for role, tensor in item.tensors.items():
                if role in (Role.VECTOR, Role.OFFSET, Role.SUBSPACE, Role.LEFT, Role.RIGHT):
                    wide = tensor.double()
                    wide = wide.T if role is Role.LEFT else wide.reshape(-1, wide.shape[-1])
                    rows[f"{path.name}: {role} of {item.place}"] = wide
        if not any(label.startswith(f"{path.name}: ") for label in rows):
            raise UsageError(f"{path} holds no direction to compare with")
    return rows
