"""Anatomy of an edit, drawn: tables of `rome_lab.studies.anatomy.measures` in, Axes out.

vector_figure(lm, edit, table)   the usual directions of keys, and the constraint, side by side
disturbance_figure(table)        |dW k| / |W k| by group of keys, with k* itself as a line
sweep_figure(traces, table)      what causal tracing and what edits do, by token and layer
direction_lines, constraint, disturbance_boxes, sweep_heatmap    their panels
quantiles, medians               the numbers of the boxes, and how many times the identity changes more than C
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from pandas.io.formats.style import Styler

from rome_lab.editing import Edit
from rome_lab.lab import COLOURS, FONT_SIZE, colour_bar, finish, new_axes, panel_figure, plots, token_names
from rome_lab.models import LanguageModel
from rome_lab.studies.anatomy.measures import GROUPS, key_of
from rome_lab.tracing import Trace

PAGE_SIZE = (7.0, 2.6)  # inches, both columns of a page
BEFORE, AFTER = "0.55", COLOURS["red"]
UPDATES = {"C": ("with C", COLOURS["blue"]), "identity": ("identity in place of C", COLOURS["orange"])}
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
    return finish(ax, legend=True)


def constraint(lm: LanguageModel, edit: Edit, ax: Axes | None = None) -> Axes:
    """What W and W_hat say at k*, against v*, a dot a component: on the diagonal the constraint is met."""
    ax = ax or new_axes(2.3)
    W, k, v = lm.weight(edit.layer).double().cpu(), key_of(edit), edit.v_star.double()
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


def medians(table: pd.DataFrame) -> Styler:
    """The medians of the boxes, a row a group, and how many times the identity changes more than C; `table`: `quantiles`."""
    wide = table.pivot(index="group", columns="update", values="median").reindex(GROUPS)
    wide["ratio"] = wide["identity"] / wide["C"]
    return wide.style.format("{:.2%}").format("{:.1f} times", subset="ratio")


def disturbance_boxes(table: pd.DataFrame, ax: Axes | None = None, ratio_of_key: float | None = None) -> Axes:
    """|dW k| / |W k| by group: median, quartiles, and whiskers from the 5th to the 95th percentile.

    Args: ratio_of_key: the same of k* itself, for a dashed line.
    """
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
    handles = [Patch(facecolor=colour, label=label) for label, colour in UPDATES.values()]
    if ratio_of_key is not None:
        line = {"color": "black", "linewidth": 0.6, "linestyle": "--", "zorder": 0}
        handles.append(ax.axvline(ratio_of_key, label="k* itself", **line))
    ax.legend(handles=handles, fontsize=FONT_SIZE - 1, frameon=False)
    return finish(ax)


def sweep_heatmap(table: pd.DataFrame, column: str, ax: Axes | None = None) -> Axes:
    """One of `COLUMNS` by the token and the layer of the edit; the subject's tokens bear an asterisk.

    Probabilities go from 0 to 1; what is kept is white at 1, where nothing has changed, and as far from it as the data.
    A cell reaches half-way to the next layer that was edited; those are the ticks.
    """
    values = table.pivot(index="position", columns="layer", values=column)
    values = values.reindex(range(values.index.max() + 1))
    tokens = table.drop_duplicates("position").set_index("position")["token"]
    names = token_names([tokens.get(i, "") for i in values.index], table.attrs["subject_range"])
    ax = ax or new_axes(0.6 + 0.15 * len(names))
    layers = values.columns.to_numpy()
    edges = np.concatenate([[layers[0] - 0.5], (layers[1:] + layers[:-1]) / 2, [layers[-1] + 0.5]])
    reach = max(0.05, float((table[column] - 1).abs().max()))
    scale = {"cmap": "Blues", "vmin": 0, "vmax": 1}
    if column == "kept":
        scale = {"cmap": "RdBu", "vmin": 1 - reach, "vmax": 1 + reach}
    mesh = ax.pcolormesh(edges, np.arange(len(names) + 1) - 0.5, np.ma.masked_invalid(values.to_numpy()), **scale)
    ax.set_ylim(len(names) - 0.5, -0.5)
    colour_bar(mesh)
    ax.set_yticks(range(len(names)), names)
    ax.set(title=COLUMNS[column], xlabel="layer that is edited")
    finish(ax)
    ax.set_xticks(layers)
    return ax


def vector_figure(lm: LanguageModel, edit: Edit, table: pd.DataFrame) -> Figure:
    """Left the usual directions of keys (`table` is what `directions` returns), right the constraint."""
    figure, axes = panel_figure(1, 2, PAGE_SIZE)
    direction_lines(table, axes[0])
    constraint(lm, edit, axes[1])
    return figure


def disturbance_figure(table: pd.DataFrame, ratio_of_key: float) -> Figure:
    """`disturbance_boxes` over the width of a page."""
    return disturbance_boxes(table, new_axes(PAGE_SIZE[1], PAGE_SIZE[0]), ratio_of_key).figure


def sweep_figure(traces: Sequence[Trace], table: pd.DataFrame, note: str) -> Figure:
    """What restoring (two traces) and what editing (`COLUMNS`) do by token and layer, in six panels.

    Args: note: stands above the figure.
    """
    figure, axes = panel_figure(2, 3, (7, 0.8 + 0.34 * len(traces[0].tokens)), note, sharey=True)
    for trace, ax in zip(traces, axes[0], strict=False):
        plots.heatmap(trace, ax)
    for column, ax in zip(COLUMNS, (axes[0, 2], *axes[1]), strict=True):
        sweep_heatmap(table, column, ax)
    for letter, ax in zip("abcdef", axes.flat, strict=True):
        ax.set_title(f"({letter}) {ax.get_title()}", fontsize=FONT_SIZE)
    return figure
