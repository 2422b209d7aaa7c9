"""The parts that all drawings share: figures and axes in the sizes of print, lines with bands, legends, names of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, MaxNLocator

from rome_lab.base import MeanCI, visible

FONT_SIZE = 7
COLUMN_WIDTH = 3.4  # inches, of a two-column page
COLOURS = {
    **{"black": "#000000", "orange": "#E69F00", "sky": "#56B4E9", "green": "#009E73"},
    **{"blue": "#0072B2", "red": "#D55E00", "pink": "#CC79A7"},
}
"""The colours of Okabe and Ito, told apart by the colour-blind."""


def panel_figure(
    rows: int, columns: int, size: tuple[float, float], note: str = "", **options: object
) -> tuple[Figure, np.ndarray]:
    """A figure of several panels and its Axes, as `plt.subplots` gives them, with a note above it in the sizes of print.

    Args: size: width and height in inches. options: as `plt.subplots` takes them, such as `sharey`.
    """
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", dpi=150, **options)
    if note:
        figure.suptitle(note, fontsize=FONT_SIZE)
    return figure, axes


def new_axes(height: float, width: float = COLUMN_WIDTH) -> Axes:
    """Axes of a figure of their own; inches."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def finish(ax: Axes, locator: Locator | None = None, frame: bool = True, legend: bool = False) -> Axes:
    """The sizes of print, whatever style the axes were made under.

    Args:
        locator: of the ticks of the x axis; None leaves them.
        frame: whether the upper and the right side are drawn.
        legend: whether a legend is put on the axes.
    """
    if locator:
        ax.xaxis.set_major_locator(locator)
    ax.tick_params(labelsize=FONT_SIZE - 1, length=2, width=0.5, which="both")
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        text.set_size(FONT_SIZE)
    ax.spines[["top", "right"]].set_visible(frame)
    plt.setp(list(ax.spines.values()), linewidth=0.5)
    if legend:
        ax.legend(fontsize=FONT_SIZE - 1, frameon=False, handlelength=2.4, labelspacing=0.3)
    return ax


def line_with_band(
    ax: Axes,
    x: Sequence[float],
    mean: MeanCI | pd.DataFrame,
    *,
    within: tuple[float, float] = (-np.inf, np.inf),
    opacity: float = 0.15,
    **style: object,
) -> None:
    """A line and the band of its interval, in its colour.

    Args:
        mean: what `mean_ci` returns, or rows with columns of these names.
        within: what can be; a t-interval of few facts goes beyond, and would press all lines flat.
        style: as `Axes.plot` takes it, with a color.
    """
    mean = mean if isinstance(mean, MeanCI) else MeanCI(*(mean[name] for name in MeanCI._fields))
    ax.plot(x, mean.mean, **style)
    ends = (np.clip(end, *within) for end in (mean.ci_low, mean.ci_high))
    ax.fill_between(x, *ends, color=style["color"], alpha=opacity, linewidth=0)


def layer_ticks() -> Locator:
    """Ticks at whole numbers."""
    return MaxNLocator(nbins=7, integer=True)


def shared_legend(figure: Figure, columns: int) -> None:
    """One legend below the figure for panels that draw the same lines; it is that of the last panel."""
    style = {"fontsize": FONT_SIZE, "frameon": False, "columnspacing": 1.2, "handlelength": 2.2}
    handles = figure.axes[-1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, **style)


def colour_bar(mesh: QuadMesh, label: str = "") -> None:
    """The scale of a heatmap's colours, beside it."""
    bar = mesh.axes.figure.colorbar(mesh, ax=mesh.axes, fraction=0.05, pad=0.02, aspect=15)
    bar.set_label(label, fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE - 1, length=2, width=0.5)
    bar.outline.set_linewidth(0.5)


def token_names(tokens: Sequence[str], subject_range: tuple[int, int]) -> list[str]:
    """Tokens as the rows of a heatmap name them: spaces shown, long ones cut short, an asterisk at the subject's."""
    begin, end = subject_range
    short = [token if len(token) <= 20 else token[:19] + "…" for token in tokens]
    return [visible(token) + "*" * (begin <= i < end) for i, token in enumerate(short)]
