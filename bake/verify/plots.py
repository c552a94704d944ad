"""The report in pictures. Needs matplotlib, the extra ``plots``.

Four plots: how far the residual stream of the baked model lies from the hooked one at every layer,
beside floor and effect; what every writer leaks along the edited directions; the divergence of
every token; and the logits themselves, hooked against baked. The last two
have the effect beside them.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bake.verify.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2f6db5", "#d9772b", "#8a8a8a"
SMALLEST = 1e-18
"""What is drawn for zero on a logarithmic axis."""
VISIBLE = 1e-4
"""Share of the largest write above which a cell of the heat map looks bright."""
CELLS = 60
"""Cells of a heat map that have room for their numbers."""


def titles(report: Report) -> tuple[str, ...]:
    """Return the titles of the plots that a report has the numbers for."""
    return tuple(title for title, (_, has) in _PLOTS.items() if has(report))


def draw(report: Report, title: str, form: str = "png") -> bytes:
    """Return one plot as the bytes of an image.

    Args:
        report: what was measured.
        title: one of ``titles(report)``.
        form: ``png`` or ``svg``.
    """
    return image(partial(_PLOTS[title][0], report), (7.2, 4.0), form)


def image(draw_on: "Callable[[Figure], None]", size: tuple[float, float], form: str) -> bytes:
    """Return what is drawn on an empty figure as the bytes of an image.

    Args:
        draw_on: draws on it.
        size: width and height in inches.
        form: ``png`` or ``svg``.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw_on(figure)
    buffer = io.BytesIO()
    # Without a date and with fixed identifiers, the same numbers give the same picture.
    with matplotlib.rc_context({"svg.hashsalt": "bake", "svg.fonttype": "none"}):
        metadata: dict[str, Any] = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(buffer, format=form, dpi=144, metadata=metadata)
    return buffer.getvalue()


def _layers(report: Report, figure: "Figure") -> None:
    axes = figure.subplots()
    sites = report.layers["sites"]
    colours = {"effect": ORANGE, "float64": BLUE}
    for name, values in report.layers.items():
        if name == "sites":
            continue
        floor = name.startswith("floor")
        label = {"effect": "effect: hooked − base"}.get(name, f"baked − hooked, {name}")
        axes.plot(
            range(len(sites)),
            [max(value, SMALLEST) for value in values],
            color=GREY if floor else colours.get(name, "#4f9d69"),
            linestyle="--" if floor else "-",
            marker="o",
            markersize=3,
            label=f"noise {name}" if floor else label,
        )
    axes.set_yscale("log")
    _name_sites(axes, sites)
    axes.set_ylabel("‖Δ stream‖ / ‖stream‖")
    if any(
        not value for name, found in report.layers.items() if name != "sites" for value in found
    ):
        axes.set_xlabel("0 is drawn at 10⁻¹⁸", fontsize=8)
    axes.legend(fontsize=8, loc="upper left")
    plain_frame(axes)


def _name_sites(axes: "Axes", sites: list[str]) -> None:
    step = max(1, len(sites) // 12)
    ticks = list(range(0, len(sites), step))
    axes.set_xticks(ticks, [sites[tick] for tick in ticks], rotation=35, ha="right", fontsize=8)


def _leaks(report: Report, figure: "Figure") -> None:
    import numpy as np

    axes = figure.subplots(1, 2, sharey=True)
    writers = list(dict.fromkeys(str(leak["writer"]) for leak in report.leaks))
    layers = sorted({leak["layer"] or 0 for leak in report.leaks})
    largest = max(float(leak["before"]) for leak in report.leaks)
    for axis, when in zip(axes, ("before", "after"), strict=True):
        grid = np.full((len(layers), len(writers)), np.nan)
        for leak in report.leaks:
            row, column = layers.index(leak["layer"] or 0), writers.index(str(leak["writer"]))
            # Several concepts share a cell: the largest is what leaks.
            grid[row, column] = np.nanmax([grid[row, column], float(leak[when]) / largest])
        shown = np.log10(np.maximum(grid, SMALLEST), where=~np.isnan(grid), out=grid)
        image = axis.imshow(shown, aspect="auto", cmap="magma", vmin=-17, vmax=0)
        _mark(axis, report, when, writers, layers, largest)
        axis.set_xticks(range(len(writers)), writers, fontsize=8)
        axis.set_title(when, fontsize=10)
        axis.set_xlabel("writer")
    step = max(1, len(layers) // 12)
    axes[0].set_yticks(range(0, len(layers), step), [str(x) for x in layers[::step]], fontsize=8)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="log₁₀ |rᵀ·write|, of the largest before")


def _mark(
    axis: "Axes",
    report: Report,
    when: str,
    writers: Sequence[str],
    layers: Sequence[int],
    largest: float,
) -> None:
    """Write the numbers into the cells of a small map, and say where a bright one is no leak."""
    cells: dict[tuple[int, int], Mapping[str, Any]] = {}
    for leak in sorted(report.leaks, key=lambda leak: float(leak[when])):
        cells[writers.index(str(leak["writer"])), layers.index(leak["layer"] or 0)] = leak
    for (column, row), leak in cells.items():
        value, constant = float(leak[when]), float(leak.get("constant", 0.0))
        # Every token has the value that an affine edit sets.
        fixed = when == "after" and value > VISIBLE * largest and constant > 0.99 * value
        words = [f"{value:.1e}"] if len(cells) <= CELLS else []
        words += ["(set by the edit)"] if fixed else []
        colour = "black" if value > 1e-6 * largest else "white"
        axis.text(column, row, "\n".join(words), ha="center", va="center", fontsize=6, color=colour)


def _kl(report: Report, figure: "Figure") -> None:
    import numpy as np

    axes = figure.subplots()
    found = {
        "baked (the error)": (report.kl, BLUE),
        "base (the effect)": (report.kl_effect, ORANGE),
    }
    logs = {
        name: np.log10(np.maximum(np.asarray(values), SMALLEST))
        for name, (values, _) in found.items()
        if values
    }
    low, high = (pick(x for log in logs.values() for x in log) for pick in (min, max))
    bins = np.linspace(low - 0.1, high + 0.1, 61).tolist()
    for name, values in logs.items():
        axes.hist(values, bins=bins, color=found[name][1], label=name, alpha=0.85)
    axes.set_xlabel("log₁₀ KL(hooked ‖ model) of a token, in nats" + _zeros(low))
    axes.set_ylabel("tokens")
    axes.legend(fontsize=8, loc="upper left")
    plain_frame(axes)


def _zeros(low: float) -> str:
    return "; 0 is drawn at −18" if low <= math.log10(SMALLEST) else ""


def _logits(report: Report, figure: "Figure") -> None:
    axes = figure.subplots()
    every = [value for pair in (*report.points, *report.points_effect) for value in pair]
    low, high = min(every), max(every)
    axes.plot([low, high], [low, high], color=GREY, linewidth=0.8)
    for points, colour, label in (
        (report.points_effect, ORANGE, "base (the effect)"),
        (report.points, BLUE, "baked"),
    ):
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=5, color=colour, alpha=0.5, linewidths=0, label=label)
    axes.set_xlabel("logit of the hooked model")
    axes.set_ylabel("logit of the model")
    axes.legend(fontsize=8, markerscale=3, loc="upper left")
    axes.set_aspect("equal")
    plain_frame(axes)


def plain_frame(axes: "Axes") -> None:
    """Draw a faint grid, and no line above or on the right."""
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


_Draw = Callable[[Report, "Figure"], None]
_PLOTS: Mapping[str, tuple[_Draw, Callable[[Report], bool]]] = {
    "Residual stream by layer": (_layers, lambda report: bool(report.layers)),
    "Leak per writer": (
        _leaks,
        lambda report: any(leak["before"] for leak in report.leaks),
    ),
    "Divergence per token": (_kl, lambda report: bool(report.kl)),
    "Hooked against baked logits": (_logits, lambda report: bool(report.points)),
}
