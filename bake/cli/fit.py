"""``bake fit``: directions from two classes of prompts, or of saved activations."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bake.atomic import write_atomically
from bake.cli.options import FORCE, PATH, PLOT, check_plot, run_options, table_options
from bake.cli.output import Output, bake_command
from bake.errors import UsageError
from bake.jobs.fit_directions import (
    DEFAULT_DTYPE,
    DEFAULT_METHOD,
    DEFAULT_POSITION,
    DTYPES,
)

if TYPE_CHECKING:
    from bake.jobs.fit_directions import FittedDirections
    from bake.jobs.fit_proposal import Proposal

_FILE = ".safetensors"


@bake_command("fit")
@click.argument("model", metavar="MODEL")
@click.option(
    "--positive",
    type=PATH,
    required=True,
    metavar="FILE",
    help="Examples of the concept: text, one prompt a line; JSONL with prompt, text or messages; "
    "or saved activations, .npy or .safetensors.",
)
@click.option(
    "--negative", type=PATH, required=True, metavar="FILE", help="Examples of the reference."
)
@click.option("--concept", required=True, metavar="NAME", help="What to call it.")
@click.option(
    "--out",
    type=PATH,
    required=True,
    metavar="FILE",
    help=f"The {_FILE} file to write; the recipe goes beside it, with .toml.",
)
@click.option(
    "--method",
    default=DEFAULT_METHOD,
    show_default=True,
    metavar="NAME",
    help="mean-difference, ace, leace, orthogonal, mean-act, gaussian-act, linear-act, pca-diff "
    "or pca-center.",
)
@click.option(
    "--at",
    multiple=True,
    default=("resid",),
    show_default=True,
    metavar="SITES",
    help="Where to fit: resid, resid_post.8-20, mlp_out.* and so on. May be repeated.",
)
@click.option(
    "--position",
    default=DEFAULT_POSITION,
    show_default=True,
    metavar="WORD",
    help="last: the prompt's last token, as the template has it; mean: of all tokens but the "
    "first; answer: of the model's words that a chat ends in.",
)
@click.option(
    "--held-out",
    type=float,
    default=0.4,
    show_default=True,
    metavar="SHARE",
    help="Of each class: half of it chooses the site, half of it judges the choice.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of who is held out.")
@click.option("--every-site", is_flag=True, help="Write what was fitted at every site.")
@PLOT
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a model on the Hub.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=DEFAULT_DTYPE,
    show_default=True,
    help="What the model runs in; fits are in float64.",
)
@run_options(gpu="that has room")
@table_options
@FORCE
def command(
    output: Output, model: str, *, out: Path, plot: Path | None, force: bool, **options: Any
) -> None:
    """Fit a direction of MODEL, and propose a recipe.

    The positive class has the concept and the negative one is the reference: directions point from
    negative to positive. A method is fitted at every site in one pass; examples that were held out
    choose the site with the best AUROC, and others judge it.

    MODEL is a folder or a Hub id. The exit code is 1, and nothing is written, when no site tells
    the classes apart better than chance.
    """
    from bake.cli.render.fits import fitted, fitted_brief
    from bake.jobs.fit_directions import FitRequest, fit_directions
    from bake.jobs.fit_proposal import propose
    from bake.jobs.model import open_model

    recipe = out.with_suffix(".toml")
    read = (options["positive"], options["negative"])
    _check_out(out, recipe, plot, force=force, read=read)
    if plot is not None:
        check_plot(plot)
    named = {name: options.pop(name) for name in ("revision", "family", "assume_harmless")}
    asked = FitRequest(**options)
    found = fit_directions(open_model(model, **named), asked, output.bar, output.remark)
    failure = found.sweep.failure()
    proposal = None
    if failure is None:
        proposal = propose(found, out)
        _write(found, proposal, out, recipe, plot)
    written = () if proposal is None else (out, recipe, *([] if plot is None else [plot]))
    output.present(
        data=lambda: _json(found, proposal, written),
        view=lambda: fitted(found, proposal, written, verbose=output.verbose > 1),
        brief=lambda: fitted_brief(found, proposal, written),
        error=failure,
    )


def _check_out(
    out: Path, recipe: Path, plot: Path | None, *, force: bool, read: Sequence[Path]
) -> None:
    """Raise before long work when its result could not be written."""
    if out.suffix != _FILE:
        raise UsageError(f"--out names {out.name}", fix=f"name a {_FILE} file")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {out.parent} for --out", fix="make it first")
    inputs = {path.resolve() for path in read}
    both = [path for path in (out, recipe, plot) if path is not None and path.resolve() in inputs]
    if both:
        raise UsageError(f"{both[0]} is to be read and to be written", fix="name another --out")
    there = [path for path in (out, recipe) if path.exists() and not force]
    if there:
        raise UsageError(
            f"{' and '.join(map(str, there))} exist{'s' * (len(there) == 1)} already",
            fix="name another --out, or replace what is there with --force",
        )


def _write(
    found: "FittedDirections", proposal: "Proposal", out: Path, recipe: Path, plot: Path | None
) -> None:
    """Write all files, each whole or not at all, the one that the others name first."""
    from bake.fit.plot import draw

    files = {out: proposal.directions, recipe: proposal.recipe.encode()}
    if plot is not None:
        files[plot] = draw(found.sweep, plot.suffix.lower().removeprefix("."))
    for path, data in files.items():
        write_atomically(path, data)


def _json(
    found: "FittedDirections", proposal: "Proposal | None", written: Sequence[Path]
) -> dict[str, Any]:
    data: dict[str, Any] = {
        **found.sweep.to_json(),
        "method": found.asked.method,
        "concept": found.asked.concept,
        "metadata": dict(found.directions.metadata),
        "written": [str(path) for path in written],
    }
    if proposal is not None:
        data |= {"recipe": proposal.recipe, "exactness": proposal.exactness}
    return data
