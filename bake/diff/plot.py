"""A comparison in one picture. Needs matplotlib, the extra ``plots``.

On the left how much every tensor has changed, layer by layer; on the right the singular values of
the changes, in units of what rounding alone would give; below, for writers, what is left of the
directions that the changes share.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bake.diff.change import Change
from bake.diff.report import Diff
from bake.diff.roles import kind_of, layer_of
from bake.verify.plots import image, plain_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#26303b", "#8a8f98", "#eef0f3"
COLOURS = ("#2f6db5", "#d9772b", "#4f9d69", "#8c5fb0", "#b8453f", "#3d9ba8", "#b08d2e", "#7a6a5b")
_MOST_ROWS = 28


def draw(compared: Diff, form: str = "png") -> bytes:
    """Return the picture of a comparison as the bytes of an image.

    Args:
        compared: what differs, where it is ``drawable``.
        form: ``png`` or ``svg``.

    """
    kinds = _kinds(compared)
    height = max(4.6, 1.9 + 0.3 * len(kinds))
    return image(partial(_panels, compared, kinds), (12.0, height), form)


def _panels(compared: Diff, kinds: Sequence[str], figure: "Figure") -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.45, 1.0))
    _heat(compared, kinds, left, figure)
    _spectra(compared, right)
    figure.suptitle(_title(compared), fontsize=11.5, color=INK, ha="left", x=0.012)


def _title(compared: Diff) -> str:
    shared = next((space for space in compared.subspaces if space.shared), None)
    count = len({change.tensor for change in compared.changes})
    text = f"{count} of {compared.tensors} tensors changed"
    if shared is None:
        return text
    several = f"{shared.dimension} directions hold"
    what = "one direction holds" if shared.dimension == 1 else several
    all_of_them = len(shared.tensors) == len(compared.changes)
    whose = "their change" if all_of_them else f"the change of {len(shared.tensors)}"
    return f"{text}; {what} {_percent(shared.share)} of {whose}"


def _percent(share: float) -> str:
    """Return a share as a percentage that never rounds up to all of it."""
    return "100 %" if share >= 1 - 1e-9 else f"{math.floor(share * 10000) / 100:.2f} %"


def _kinds(compared: Diff) -> list[str]:
    """Return the kinds of tensor, those of the blocks first in the order of their names."""
    names = [*compared.by_hash, *compared.by_bytes, *(change.tensor for change in compared.changes)]
    changed = {kind_of(change.tensor) for change in compared.changes}
    kinds = sorted({kind_of(name) for name in names}, key=lambda k: ("#" not in k, k))
    # Of many kinds the unchanged ones are left out: a picture has room for some.
    return kinds if len(kinds) <= _MOST_ROWS else [k for k in kinds if k in changed][:_MOST_ROWS]


def _heat(compared: Diff, kinds: Sequence[str], axes: "Axes", figure: "Figure") -> None:
    import numpy as np
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator

    names = [*compared.by_hash, *compared.by_bytes, *(change.tensor for change in compared.changes)]
    layers = sorted({layer for name in names if (layer := layer_of(name)) is not None})
    # One column more for what belongs to no layer.
    column = {layer: place for place, layer in enumerate([*layers, None])}
    grid = np.full((len(kinds), len(layers) + 1), np.nan)
    there = np.zeros(grid.shape, dtype=bool)
    row = {kind: place for place, kind in enumerate(kinds)}

    def cell(name: str) -> tuple[int, int] | None:
        place = row.get(kind_of(name))
        return None if place is None else (place, column[layer_of(name)])

    for name in names:
        if (place := cell(name)) is not None:
            there[place] = True
    for change in compared.changes:
        place = cell(change.tensor)
        if place is not None and change.relative:
            # Experts share a cell: the one that changed most is shown.
            grid[place] = np.nanmax([grid[place], change.relative])
    axes.imshow(
        np.where(there, 1.0, np.nan), aspect="auto", cmap=ListedColormap([PALE]), vmin=0, vmax=2
    )
    low, high = np.nanmin(grid), np.nanmax(grid)
    norm = LogNorm(vmin=min(low, high / 10), vmax=high)
    shown = axes.imshow(grid, aspect="auto", cmap="YlGnBu", norm=norm)
    bar = figure.colorbar(shown, ax=axes, pad=0.015, aspect=28)
    bar.set_label("‖ΔW‖ / ‖W‖", fontsize=9, color=INK)
    bar.locator = LogLocator(subs=(1.0, 2.0, 5.0))
    bar.formatter = FuncFormatter(lambda value, _: f"{100 * value:.3g} %")
    bar.minorticks_off()
    bar.update_ticks()
    bar.ax.tick_params(labelsize=8, colors=INK, length=3)
    bar.outline.set_visible(False)
    _label(axes, kinds, layers)


def _label(axes: "Axes", kinds: Sequence[str], layers: Sequence[int]) -> None:
    step = max(1, math.ceil(len(layers) / 16))
    ticks = [*range(0, len(layers), step)]
    axes.set_xticks([*ticks, len(layers)], [*(str(layers[t]) for t in ticks), "none"], fontsize=8)
    axes.set_yticks(range(len(kinds)), [_short(kind) for kind in kinds], fontsize=8.5)
    axes.set_xlabel("layer", fontsize=9, color=INK)
    axes.set_title("How much every tensor changed (grey: not a byte)", **_TITLE)
    axes.set_xticks([x - 0.5 for x in range(1, len(layers) + 1)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(kinds))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0 if len(layers) <= 20 else 0.4)
    axes.tick_params(which="both", length=0, colors=INK)
    for side in axes.spines.values():
        side.set_visible(False)


_TITLE: dict[str, Any] = {"fontsize": 10, "color": INK, "loc": "left", "pad": 8}


def _short(kind: str) -> str:
    """Return a kind without what all of them have in common."""
    return kind.rpartition("#.")[2].removeprefix("model.").removesuffix(".weight")


def _spectra(compared: Diff, axes: "Axes") -> None:
    shown = [c for c in compared.changes if c.spectrum is not None and c.matrix[1] > 1]
    kinds = list(dict.fromkeys(kind_of(change.tensor) for change in shown))
    for change in shown:
        place = kinds.index(kind_of(change.tensor))
        _spectrum(axes, change, COLOURS[place % len(COLOURS)], len(shown))
    for place, kind in enumerate(kinds[:10]):
        axes.plot([], [], color=COLOURS[place % len(COLOURS)], marker="o", ms=4, label=_short(kind))
    known = any(c.spectrum is not None and c.spectrum.threshold for c in shown)
    axes.set_yscale("log")
    if known:
        axes.axhline(1.0, color=GREY, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(
            "the largest that independent rounding gives",
            (0.985, 1.0),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=GREY,
        )
    axes.set_title("Singular values of the changes (dots: they count)", **_TITLE)
    if known:
        axes.set_ylabel("in units of what rounding gives", fontsize=9, color=INK)
    axes.set_xlabel("direction", fontsize=9, color=INK)
    if shown:
        longest = max(len(c.spectrum.values) for c in shown if c.spectrum is not None)
        axes.set_xticks(range(1, longest + 1, max(1, longest // 8)))
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    plain_frame(axes)


def _spectrum(axes: "Axes", change: Change, colour: str, count: int) -> None:
    assert change.spectrum is not None
    unit = change.spectrum.threshold or 1.0
    values = [float(value) / unit for value in change.spectrum.values]
    rank = change.spectrum.rank if change.spectrum.rank is not None else len(values)
    places = list(range(1, len(values) + 1))
    faint = max(0.15, min(0.8, 6 / count))
    axes.plot(places, values, color=colour, linewidth=0.9, alpha=faint)
    # The directions that count are dots; what is left of the line is rounding.
    axes.plot(places[:rank], values[:rank], "o", color=colour, ms=4.5, alpha=max(0.5, faint), mew=0)
