"""Anatomy of an edit, drawn: tables of `rome_lab.studies.anatomy.measures` in, Axes out.

direction_lines(table)           how much of k* and of u is along the usual directions of keys
constraint(lm, edit)             W k* and W_hat k* against v*
disturbance_boxes(table)         |dW k| / |W k| by group of keys, with C and with the identity
sweep_heatmap(table, column)     what edits do, by token and layer
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from rome_lab.base import visible
from rome_lab.editing import Edit
from rome_lab.lab import COLUMN_WIDTH, FONT_SIZE
from rome_lab.models import LanguageModel
from rome_lab.studies.anatomy.measures import GROUPS, one_key

BEFORE, AFTER = "0.55", "#D55E00"  # grey, and a red that the colour-blind tell from it
UPDATES = {"C": ("with C", "#0072B2"), "identity": ("identity in place of C", "#E69F00")}
WHISKERS = (5, 95)  # percentiles
COLUMNS = {
    "p_target": "p(target) after the prompt",
    "p_paraphrase": "p(target) after paraphrases",
    "kept": "neighbours: part of p(own object) kept",
    "together": "all three: harmonic mean",
}


def direction_lines(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Cumulative shares of squared length along the usual directions of keys; `table` is what `directions` returns."""
    ax = ax or new_axes(2.3)
    styles = {"text": ("keys in text", "black", ":"), "k*": ("k*", BEFORE, "-"), "u": ("u = C$^{-1}$ k*", AFTER, "-")}
    for name, (label, colour, line) in styles.items():
        ax.plot(table["n"], table[name], color=colour, linestyle=line, linewidth=1.2, label=label)
    ax.set(xscale="log", xlabel="most usual directions of keys", ylabel="share of squared length", ylim=(0, 1.02))
    ax.legend(fontsize=FONT_SIZE - 1, frameon=False)
    return finish(ax)


def constraint(lm: LanguageModel, edit: Edit, ax: Axes | None = None) -> Axes:
    """What W and W_hat say at k*, against v*, a dot a component: on the diagonal the constraint is met."""
    ax = ax or new_axes(2.3)
    W, k, v = lm.weight(edit.layer).double().cpu(), one_key(edit), edit.v_star.double()
    W_hat = (W + edit.delta).float().double()
    ends = [float(v.min()), float(v.max())]
    ax.plot(ends, ends, color="0.8", linewidth=0.8, zorder=0)
    ax.scatter(v, W @ k, s=3, color=BEFORE, label="before: W k*", linewidths=0)
    ax.scatter(v, W_hat @ k, s=3, color=AFTER, label="after: Ŵ k*", linewidths=0)
    ax.set(xlabel="component of v*", ylabel="what the matrix says")
    ax.legend(fontsize=FONT_SIZE - 1, frameon=False, markerscale=3)
    return finish(ax)


def quantiles(table: pd.DataFrame) -> pd.DataFrame:
    """The numbers of the boxes: a row a group and update, with n and percentiles of |dW k| / |W k|."""
    points = {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}
    by = table.groupby(["group", "update"], sort=False)["ratio"]
    return pd.DataFrame({"n": by.size()} | {name: by.quantile(q) for name, q in points.items()}).reset_index()


def disturbance_boxes(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """|dW k| / |W k| by group: median, quartiles, and whiskers from the 5th to the 95th percentile."""
    ax = ax or new_axes(2.3)
    groups = [group for group in GROUPS if group in set(table["group"])]
    for shift, (update, (_, colour)) in zip((-0.19, 0.19), UPDATES.items(), strict=True):
        rows = [table.loc[(table["group"] == x) & (table["update"] == update), "ratio"] for x in groups]
        ax.boxplot(
            rows, orientation="horizontal", positions=np.arange(len(groups)) + shift, widths=0.3, whis=WHISKERS,
            showfliers=False, patch_artist=True, boxprops={"facecolor": colour, "linewidth": 0.5},
            medianprops={"color": "black"}, whiskerprops={"linewidth": 0.5}, capprops={"linewidth": 0.5},
        )  # fmt: skip
    n = [int((table["group"] == group).sum() // table["update"].nunique()) for group in groups]
    ax.set_yticks(range(len(groups)), [f"{group} ({k})" for group, k in zip(groups, n, strict=True)])
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="|ΔW k| / |W k|")
    patches = [Patch(facecolor=colour, label=label) for label, colour in UPDATES.values()]
    ax.legend(handles=patches, fontsize=FONT_SIZE - 1, frameon=False)
    return finish(ax)


def sweep_heatmap(table: pd.DataFrame, column: str, ax: Axes | None = None) -> Axes:
    """One of `COLUMNS` by the token and the layer of the edit; the subject's tokens bear an asterisk.

    Probabilities go from 0 to 1; what is kept is white at 1, where nothing has changed, and as far from it as the data.
    A cell reaches half-way to the next layer that was edited; those are the ticks.
    """
    begin, end = table.attrs["subject_range"]
    values = table.pivot(index="position", columns="layer", values=column)
    values = values.reindex(range(values.index.max() + 1))
    tokens = table.drop_duplicates("position").set_index("position")["token"]
    names = [visible(tokens.get(i, "")) + "*" * (begin <= i < end) for i in values.index]
    ax = ax or new_axes(0.6 + 0.15 * len(names))
    layers = values.columns.to_numpy()
    edges = np.concatenate([[layers[0] - 0.5], (layers[1:] + layers[:-1]) / 2, [layers[-1] + 0.5]])
    reach = max(0.05, float((table[column] - 1).abs().max()))
    scale = (
        {"cmap": "RdBu", "vmin": 1 - reach, "vmax": 1 + reach}
        if column == "kept"
        else {"cmap": "Blues", "vmin": 0, "vmax": 1}
    )
    mesh = ax.pcolormesh(edges, np.arange(len(names) + 1) - 0.5, np.ma.masked_invalid(values.to_numpy()), **scale)
    ax.set_ylim(len(names) - 0.5, -0.5)
    bar = ax.figure.colorbar(mesh, ax=ax, fraction=0.05, pad=0.02, aspect=15)
    bar.ax.tick_params(labelsize=FONT_SIZE - 1, length=2, width=0.5)
    bar.outline.set_linewidth(0.5)
    ax.set_yticks(range(len(names)), names)
    ax.set(title=COLUMNS[column], xlabel="layer that is edited")
    finish(ax)
    ax.set_xticks(layers)
    return ax


def new_axes(height: float) -> Axes:
    return plt.subplots(figsize=(COLUMN_WIDTH, height), layout="constrained")[1]


def finish(ax: Axes) -> Axes:
    """The sizes of print."""
    ax.tick_params(labelsize=FONT_SIZE - 1, length=2, width=0.5, which="both")
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        text.set_size(FONT_SIZE)
    for spine in ax.spines.values():
        spine.set_linewidth(0.5)
    return ax
