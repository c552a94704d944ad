"""What a fit found: AUROC by site, the best of them, and the recipe that it proposes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from bake.cli.render.pieces import Fact, facts, next_step, section, size, table, word
from bake.fit.sweep import told
from bake.sites import summary

if TYPE_CHECKING:
    from bake.fit.sweep import SiteFit
    from bake.jobs.fit_directions import FittedDirections
    from bake.jobs.fit_proposal import Proposal

SHOWN = 12
"""Sites in the table, the best first, where nobody asks for all."""


def fitted(
    found: "FittedDirections",
    proposal: "Proposal | None",
    written: Sequence[Path],
    *,
    verbose: bool,
) -> list[RenderableType]:
    """Return the sites, the verdict and the recipe; with ``verbose`` all sites, in their order."""
    sweep, metadata = found.sweep, found.directions.metadata
    rows: list[Fact] = [
        ("method", metadata["method"]),
        ("positive", metadata["positive"]),
        ("negative", metadata["negative"]),
        ("examples", metadata["examples"]),
        ("activations", f"{size(found.kept_bytes)} kept: {metadata.get('position', 'as saved')}"),
    ]
    if sweep.left_out:
        rows.append(("left out", f"{summary(sweep.left_out)}: nothing to fit"))
    parts: list[RenderableType] = [facts(rows), _sites(sweep.fits, verbose=verbose)]
    parts.append(Text(f"\n{sweep.verdict}"))
    if proposal is not None:
        parts += [
            section("Recipe", Text(proposal.recipe.rstrip())),
            Text(),
            facts(
                [
                    ("plan", word(proposal.exactness)),
                    *(("written", str(path)) for path in written),
                ]
            ),
        ]
    return parts


def fitted_brief(
    found: "FittedDirections", proposal: "Proposal | None", written: Sequence[Path]
) -> list[RenderableType]:
    """Return the verdict, what was fitted and what was written, in a few lines."""
    rows: list[Fact] = [
        ("verdict", found.sweep.verdict),
        ("fitted", found.directions.metadata["method"]),
    ]
    if proposal is not None:
        rows += [("plan", word(proposal.exactness)), *(("written", str(path)) for path in written)]
        recipe = next(path for path in written if path.suffix == ".toml")
        rows.append(next_step("bake", "try", recipe, "PROMPT"))
    return [facts(rows)]


def _sites(fits: "Sequence[SiteFit]", *, verbose: bool) -> RenderableType:
    title = "AUROC on the examples that choose"
    shown = list(fits)
    if not verbose and len(fits) > SHOWN:
        shown.sort(key=lambda fit: (-fit.chosen_by.value, -fit.margin))
        shown, title = shown[:SHOWN], f"{title}, the best {SHOWN} of {len(fits)} sites"
    grid = table("site", "AUROC", "95 % interval", "margin", right=("AUROC", "margin"))
    for fit in shown:
        value, _, interval = told(fit.chosen_by).partition(" ")
        grid.add_row(str(fit.site), value, interval, f"{fit.margin:.2f}")
    return section(title, grid)
