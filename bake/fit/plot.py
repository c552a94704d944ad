"""AUROC by layer, a line for each kind of site. Needs matplotlib, the extra ``plots``."""

from functools import partial
from typing import TYPE_CHECKING

from bake.fit.auroc import CHANCE
from bake.fit.sweep import SiteFit, Sweep, told
from bake.sites import SiteKind
from bake.verify.plots import BLUE, GREY, ORANGE, image, plain_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (BLUE, "#4f9d69", "#8a5fb0", "#b0475f", "#3f9aa8", "#a58b2f")


def draw(found: Sweep, form: str) -> bytes:
    """Return the plot of a sweep as the bytes of an image.

    Args:
        found: what was measured.
        form: ``png`` or ``svg``.
    """
    return image(partial(_on, found), (7.2, 4.0), form)


def _on(found: Sweep, figure: "Figure") -> None:
    axes = figure.subplots()
    kinds: dict[SiteKind, list[SiteFit]] = {}
    for fit in found.fits:
        kinds.setdefault(fit.site.kind, []).append(fit)
    for place, (kind, fits) in enumerate(kinds.items()):
        _line(axes, str(kind), fits, _COLOURS[place % len(_COLOURS)])
    axes.axhline(CHANCE, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)), label="chance")
    best = found.best
    low, high = found.judged.low, found.judged.high
    axes.errorbar(
        [_x(best)],
        [found.judged.value],
        yerr=[[found.judged.value - low], [high - found.judged.value]],
        fmt="o",
        color=ORANGE,
        ms=5,
        capsize=3,
        zorder=5,
        label=f"{best.site}, judged: {told(found.judged)}",
    )
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel(f"AUROC on {found.split.choose} examples", fontsize=9)
    axes.set_ylim(min(0.4, *(fit.chosen_by.value for fit in found.fits)) - 0.02, 1.02)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, loc="lower right")
    plain_frame(axes)


def _line(axes: "Axes", label: str, fits: list[SiteFit], colour: str) -> None:
    x = [_x(fit) for fit in fits]
    axes.plot(x, [fit.chosen_by.value for fit in fits], color=colour, marker="o", ms=3, label=label)
    low, high = ([getattr(fit.chosen_by, end) for fit in fits] for end in ("low", "high"))
    axes.fill_between(x, low, high, color=colour, alpha=0.08, linewidth=0)


def _x(fit: SiteFit) -> int:
    """Return the layer; what belongs to none is drawn at the first."""
    return fit.site.layer or 0
