"""Costs in, Axes out: `growth_panels`, measured time and memory along what grows, beside what is counted."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rome_lab.lab import COLOURS, FONT_SIZE, finish, panel_figure

LABELS = {
    "tokens": "tokens of the prompt",
    "layers": "layers",
    "samples": "samples of the noise",
    "facts": "facts",
    "workers": "Dask workers",
}
MEASURED = {"color": COLOURS["blue"], "marker": "o", "markersize": 3.5, "linestyle": "none"}
COUNTED = {"color": COLOURS["red"], "linewidth": 1.0}


def growth_panels(points: pd.DataFrame, rate: float, note: str = "") -> Figure:
    """Seconds above, megabytes below, a column for each thing that grows; dots are measured, lines are counted.

    Args:
        points: what the functions of `rome_lab.studies.cost.growth` return, together.
        rate: 1e9 operations a second with which counted arithmetic is drawn as time.
        note: stands above the figure.
    """
    names = list(dict.fromkeys(points["along"]))
    points = points.reindex(columns=["along", "at", "seconds", "gflop", "mb", "expected_mb"])  # some have not all
    figure, axes = panel_figure(2, len(names), (1.6 * len(names), 3.2), note, squeeze=False)
    for name, (upper, lower) in zip(names, axes.T, strict=True):
        part = points[points["along"] == name].sort_values("at")
        growth_panel(upper, part["at"], part["seconds"], part["gflop"] / rate if name != "workers" else ideal(part))
        growth_panel(lower, part["at"], part["mb"], part["expected_mb"])
        (lower if lower.axison else upper).set_xlabel(LABELS[name])
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("MB beside the weights")
    axes[0, 0].legend(fontsize=FONT_SIZE - 1, frameon=False)
    return figure


def ideal(part: pd.DataFrame) -> pd.Series:
    """Seconds if n processes took an nth of what the fewest took."""
    fewest = part.iloc[0]
    return fewest["seconds"] * fewest["at"] / part["at"]


def growth_panel(ax: Axes, at: pd.Series, measured: pd.Series, counted: pd.Series) -> None:
    """One panel; it begins at nothing, and is taken away where nothing was measured."""
    if measured.isna().all():
        ax.set_axis_off()
        return
    ax.plot(at, measured, label="measured", **MEASURED)
    if counted.notna().any():
        ax.plot(at, counted, label="counted", **COUNTED)
    ax.set_xlim(0, 1.08 * at.max())
    ax.set_ylim(0, 1.08 * pd.concat([measured, counted]).max())
    finish(ax, MaxNLocator(nbins=5, integer=True), frame=False)
