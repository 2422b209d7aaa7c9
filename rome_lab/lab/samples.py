"""The figure of what samples of noise are worth: `samples_lines`."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from rome_lab.lab.drawing import COLOURS, finish, new_axes
from rome_lab.lab.plots import TITLES
from rome_lab.tracing import BUCKETS


def samples_lines(worth: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The standard error at each site by number of samples, with as many facts (solid), and at the same cost (dashed).

    Args: worth: what `samples_worth` returns.
    """
    ax = ax or new_axes(2.3)
    for (kind, bucket), colour in zip(
        dict.fromkeys(zip(worth["kind"], worth["bucket"], strict=True)), COLOURS.values(), strict=False
    ):
        rows = worth[(worth["kind"] == kind) & (worth["bucket"] == bucket)]
        ax.plot(rows["samples"], rows["error"], color=colour, linewidth=1.1, label=f"{TITLES[kind]}, {BUCKETS[bucket]}")
        ax.plot(rows["samples"], rows["error_same_cost"], color=colour, linewidth=1.1, linestyle=(0, (3, 2)))
    ax.set(xlabel="samples of noise for each fact", ylabel="standard error of the mean effect", ylim=(0, None))
    ax.set_title("As many facts (solid), or as many samples in all (dashed)")
    return finish(ax, legend=True)
