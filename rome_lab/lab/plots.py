"""Results in, Axes out: the figures of the paper, and the files behind them.

    heatmap(trace)                  one fact: p_restored, or another metric, by token and layer (Figure 1a-c); or by head
    heatmaps(traces, limits)        several traces of one prompt side by side, as a figure of their own
    average_heatmap(average, kind)  mean effect by bucket and layer (Figures 1 and 2)
    heads_heatmap(average)          mean effect by layer and head
    lines(average, kind)            mean effects with 95% intervals (Figure 7)
    severed_lines(average)          effect at the last subject token, ordinary and severed (Figure 3)
    facts_and_average(...)          Figure 1 whole: heatmaps of several facts and of the average, a row each
    average_heatmaps(...), severed_and_gaps(...), average_lines(...)    Figures 2, 3 and 7 whole
    lens_heatmap(lens)              the answer's rank or probability in every state (logit lens)
    plot_history(edit)              how the optimisation of v* went
    shared_limits(*data)            vmin and vmax with which compared heatmaps share their colour scale
    cell_table(trace)               the numbers of a heatmap, as a table
    save_figure, save_table         a figure as PDF, PNG and CSV; a table as CSV

The parts that all drawings share are in `rome_lab.lab.drawing`.

Colours (`COLOUR_MAPS`): white is no effect; the kind's own colour is above it, and its opposite below, at the same distance
equally strong. The scale always reaches as far as the data. For a shared scale of lines: `plt.subplots(..., sharey=True)`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from pandas.api.typing import DataFrameGroupBy

from rome_lab.base import visible, write_atomically
from rome_lab.editing import Edit
from rome_lab.lab.drawing import (
    COLOURS,
    COLUMN_WIDTH,
    colour_bar,
    finish,
    layer_ticks,
    line_with_band,
    new_axes,
    panel_figure,
    shared_legend,
    token_names,
)
from rome_lab.tracing import BUCKETS, KINDS, LogitLens, Trace, buckets

logger = logging.getLogger(__name__)

SAVING = {"pdf.fonttype": 42, "savefig.bbox": "tight", "savefig.pad_inches": 0.02}  # 42: text stays text in the PDF
TITLES = {
    "state": "State restored",
    "mlp": "MLP restored",
    "attn": "Attention restored",
    "severed-mlp": "State restored, MLP severed",
    "severed-attn": "State restored, attention severed",
    "head": "Head restored",
}
PUT_IN = {"denoise": "restored", "noise": "corrupted"}  # direction -> what was done at a place
QUANTITY_NAMES = {
    **{"indirect_effect": "average indirect effect", "p_restored": "average p, restored"},
    **{"effect": "average effect", "normalised_effect": "average effect, as a share"},
}
POSSIBLE = {"p_restored": (0, 1), **dict.fromkeys(("indirect_effect", "effect"), (-1, 1))}  # of probabilities
METRIC_NAMES = {"probability": "p({})", "log_probability": "log p({})", "logit_difference": "logit of {} minus {}"}
COLOUR_MAPS = {"state": ("Oranges", "Purples"), "mlp": ("RdPu", "Greens"), "attn": ("Blues", "Reds")}
# The two sites that the paper speaks of stand out.
BUCKET_STYLES = {
    "subject_first": {"color": COLOURS["sky"], "linestyle": (0, (4, 1.5)), "linewidth": 0.9},
    "subject_middle": {"color": COLOURS["blue"], "linestyle": (0, (1, 1)), "linewidth": 1.1},
    "subject_last": {"color": COLOURS["red"], "linestyle": "-", "linewidth": 1.6},
    "first_subsequent": {"color": COLOURS["orange"], "linestyle": (0, (4, 1.5, 1, 1.5)), "linewidth": 0.9},
    "further": {"color": COLOURS["green"], "linestyle": (0, (2, 1)), "linewidth": 0.9},
    "last": {"color": COLOURS["black"], "linestyle": "-", "linewidth": 1.2},
}
_NO_ATTENTION = {"color": COLOURS["red"], "linestyle": (0, (4, 1.5))}
_NO_MLP = {"color": COLOURS["green"], "linestyle": (0, (1, 1))}
SEVERED_STYLES = {
    "state": ("ordinary", {"color": "#6A3D9A", "linestyle": "-", "linewidth": 1.6}),
    "severed-attn": ("attention severed", _NO_ATTENTION | {"linewidth": 1.2}),
    "severed-mlp": ("MLP severed", _NO_MLP | {"linewidth": 1.5}),
    "state minus severed-attn": ("ordinary minus attention severed", _NO_ATTENTION),
    "state minus severed-mlp": ("ordinary minus MLP severed", _NO_MLP),
}


def heatmap(trace: Trace, ax: Axes | None = None, vmin: float | None = None, vmax: float | None = None) -> Axes:
    """p_restored of one fact by restored token and layer; the subject's tokens bear an asterisk (Figure 1a-c).

    It shows the trace's metric. White is what it is in the run that is restored into: p_corrupted, for one, from which the
    scale goes up, and down as well where restoring made the answer less probable. Rows of tokens that were not restored
    are left empty. Of heads the rows are layers.

    Args: vmin, vmax: the least range of the colour scale; see `shared_limits`.
    """
    ax = ax or new_axes(heatmap_height(trace))
    scale = Scale(trace.kind, trace.base, vmin, vmax, metric_name(trace))
    ax.set_title(trace_title(trace))
    if trace.token is not None:
        return _draw_heads(ax, trace.read().restored, scale)
    _draw_cells(ax, trace.read().restored, token_names(trace.tokens, trace.subject_range), scale)
    done = PUT_IN[trace.direction]
    ax.set_xlabel("layer" if trace.kind == "state" else f"middle of the {trace.window} {done} layers")
    return finish(ax, layer_ticks())


def trace_title(trace: Trace) -> str:
    """What was put where, such as "MLP restored", or, where the direction is "noise", "MLP corrupted"."""
    return TITLES[trace.label].replace("restored", PUT_IN[trace.direction])


def metric_name(trace: Trace) -> str:
    """What a trace's metric is called beside its scale, such as p("Paris")."""
    words = (f'"{visible(text.strip())}"' for text in (trace.answer, trace.foil or ""))
    return METRIC_NAMES[trace.metric].format(*words)


def heads_heatmap(average: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Mean effect by layer and head, white at zero.

    Args: average: what `Traces.average_heads` returns.
    """
    values = average.pivot(index="layer", columns="head", values="mean").to_numpy()
    ax = ax or new_axes(0.6 + 0.09 * len(values))
    _name_axes(ax, average, "head", average["n_facts"].max())
    return _draw_heads(ax, values, Scale("head", 0.0, None, None, _quantity_name(average, "effect")))


def _draw_heads(ax: Axes, values: np.ndarray, scale: Scale) -> Axes:
    """(L, heads), the layers from the first, at the top, to the last."""
    _draw_cells(ax, values, [str(x) if x % 5 == 0 else "" for x in range(len(values))], scale)
    ax.set(xlabel="head", ylabel="layer")
    return finish(ax, layer_ticks())


def heatmaps(traces: Sequence[Trace], limits: Mapping[str, float], titles: Sequence[str] = ()) -> Figure:
    """Traces of one prompt side by side in a figure that pyplot does not keep, in the colours of `shared_limits`."""
    figure = Figure(figsize=(COLUMN_WIDTH * len(traces), heatmap_height(traces[0])), layout="constrained")
    for number, (trace, ax) in enumerate(zip(traces, np.ravel(figure.subplots(1, len(traces))), strict=True)):
        heatmap(trace, ax, **limits)
        if titles:
            ax.set_title(titles[number], fontsize=ax.title.get_fontsize())
    return figure


def lens_heatmap(lens: LogitLens, ax: Axes | None = None, quantity: str = "rank") -> Axes:
    """The answer's rank, dark where it comes first, by token and layer; or its probability, `quantity="p"`.

    Raises: ValueError: quantity is another word.
    """
    if quantity not in ("rank", "p"):
        raise ValueError(f"lens_heatmap: quantity is {quantity!r}; expected 'rank' or 'p'.")
    ax, names = ax or new_axes(0.6 + 0.15 * len(lens.tokens)), token_names(lens.tokens, lens.subject_range or (0, 0))
    answer = visible(lens.answer.strip())
    if quantity == "p":
        _draw_cells(ax, lens.p, names, Scale("attn", 0.0, None, None, f'p("{answer}")'))
    else:
        layers, rows = (np.arange(n + 1) - 0.5 for n in lens.rank.T.shape)
        colours = {"cmap": "Blues_r", "norm": LogNorm(1, max(2, lens.rank.max()))}
        mesh = ax.pcolormesh(layers, rows, lens.rank, edgecolors="face", linewidth=0.1, **colours)
        ax.set_ylim(rows[-1], rows[0])
        ax.set_yticks(range(len(names)), names)
        colour_bar(mesh, f'rank of "{answer}"')
    ax.set(title="Logit lens", xlabel="layer")
    return finish(ax, layer_ticks())


def heatmap_height(trace: Trace) -> float:
    """Of a heatmap in print, in inches."""
    return 0.6 + (0.15 * len(trace.tokens) if trace.token is None else 0.09 * trace.n_layers)


def average_heatmap(
    average: pd.DataFrame, kind: str, ax: Axes | None = None, vmin: float | None = None, vmax: float | None = None
) -> Axes:
    """Mean effect of one kind by bucket and layer, white at zero (Figures 1 and 2).

    A bucket that fewer facts have than the title says carries its own n.

    Args:   average: what `Traces.average` returns. kind: a label of `KINDS`. vmin, vmax: see `shared_limits`.
    Raises: ValueError: `average` has nothing of this kind.
    """
    rows = _of_kind(average, kind)
    present = [bucket for bucket in BUCKETS if bucket in set(average["bucket"])]
    values = rows.pivot(index="bucket", columns="layer", values="mean").reindex(present).to_numpy()
    n_facts = rows.groupby("bucket")["n_facts"].max().reindex(present, fill_value=0)
    n_most = n_facts.max()
    names = [BUCKETS[bucket] + (f" ({n})" if n < n_most else "") for bucket, n in n_facts.items()]
    ax = ax or new_axes(0.6 + 0.17 * len(present))
    white = np.nanmin(values) if average.attrs.get("quantity") == "p_restored" else 0.0
    _draw_cells(ax, values, names, Scale(KINDS[kind][0], white, vmin, vmax, _quantity_name(average)))
    _name_axes(ax, average, kind, n_most)
    return finish(ax, layer_ticks())


def facts_and_average(singles: Sequence[Sequence[Trace]], average: pd.DataFrame | None, note: str) -> Figure:
    """Figure 1: a row of heatmaps for each fact, with one colour scale, and a row of averages; a column a kind.

    Args: singles: of each fact, its traces of state, MLP and attention. note: stands above the figure.
    """
    heights = [*(1 + len(traces[0].tokens) for traces in singles), *([] if average is None else [7])]
    size = (7, 0.16 * sum(heights))
    figure, axes = panel_figure(len(heights), 3, size, note, height_ratios=heights, sharey="row", squeeze=False)
    for traces, row in zip(singles, axes, strict=False):
        for trace, ax in zip(traces, row, strict=True):
            heatmap(trace, ax, **shared_limits(*traces))
    if average is not None:
        for kind, ax in zip(dict.fromkeys(average["kind"]), axes[-1], strict=True):
            average_heatmap(average, kind, ax, **shared_limits(average))
    for ax in axes.flat:
        ax.label_outer()  # tokens are named once a row, layers once a column
    for ax in axes[1 : len(singles)].flat:
        ax.set_title("")
    return figure


def average_heatmaps(average: pd.DataFrame, note: str) -> Figure:
    """Figure 2: mean effects by bucket and layer, a panel a kind, all with one colour scale."""
    kinds = list(dict.fromkeys(average["kind"]))
    figure, axes = panel_figure(len(kinds), 1, (COLUMN_WIDTH, 0.1 + 1.5 * len(kinds)), note)
    for kind, ax in zip(kinds, axes, strict=True):
        average_heatmap(average, kind, ax, **shared_limits(average))
    return figure


def severed_and_gaps(average: pd.DataFrame, gaps: pd.DataFrame, note: str) -> Figure:
    """Figure 3: the effect at the last subject token, ordinary and severed, and beside it what severing takes away."""
    figure, axes = panel_figure(1, 2, (7, 2.4), note, sharey=True)
    severed_lines(average, axes[0], title="Effect of restoring one state")
    severed_lines(gaps, axes[1], title="What severing takes away")
    return figure


def average_lines(average: pd.DataFrame, note: str) -> Figure:
    """Figure 7: mean effects with their 95% intervals, a line a bucket and a panel a kind."""
    kinds = list(dict.fromkeys(average["kind"]))
    figure, axes = panel_figure(1, len(kinds), (7, 2.4), note, sharey=True)
    for kind, ax in zip(kinds, axes, strict=True):
        lines(average, kind, ax, legend=False)
    shared_legend(figure, columns=6)
    return figure


def lines(average: pd.DataFrame, kind: str, ax: Axes | None = None, legend: bool = True) -> Axes:
    """Mean effect of one kind over the layers, a line a bucket, with 95% intervals over facts (Figure 7).

    Args:   average: what `Traces.average` returns. kind: a label of `KINDS`.
    Raises: ValueError: `average` has nothing of this kind.
    """
    rows = _of_kind(average, kind)
    ax = ax or new_axes(2.3)
    _name_axes(ax, average, kind, rows["n_facts"].max())
    names = {bucket: (name, BUCKET_STYLES[bucket]) for bucket, name in BUCKETS.items()}
    return _draw_lines(ax, rows.groupby("bucket"), names, average, legend)


def severed_lines(average: pd.DataFrame, ax: Axes | None = None, legend: bool = True, title: str | None = None) -> Axes:
    """Effect of restoring the state of the last subject token, ordinary and with a module severed (Figure 3).

    Args:   average: what `Traces.average` or `Traces.gap` returns, or several of these concatenated; all lines in it that
            Figure 3 knows are drawn, with 95% intervals over facts. title: instead of the place and the n.
    Raises: ValueError: none of them is there.
    """
    rows = average[(average["bucket"] == "subject_last") & average["kind"].isin(list(SEVERED_STYLES))]
    if rows.empty:
        raise ValueError(
            f"severed_lines: no row of kind {', '.join(SEVERED_STYLES)} at subject_last; trace_facts with these kinds"
        )
    ax = ax or new_axes(2.3)
    ax.set_title(title or f"Last subject token (n = {rows['n_facts'].max()})")
    ax.set_xlabel("layer")
    return _draw_lines(ax, rows.groupby("kind"), SEVERED_STYLES, average, legend)


def plot_history(edit: Edit, ax: Axes | None = None) -> Axes:
    """The terms of the loss and, on an axis of its own, the target's probability, step by step; means over several facts."""
    ax = ax or new_axes(2.2)
    mean = edit.history.groupby("step").mean()
    for name, label in {"loss": "loss", "nll": "-log P[target]", "kl": "KL", "weight_decay": "weight decay"}.items():
        ax.plot(mean.index, mean[name], label=label, color="black" if name == "loss" else None)
    ax.set(xlabel="step of Adam", ylabel="loss (nats)")
    right = ax.twinx()
    right.plot(mean.index, mean["p_target"], color="tab:purple", linestyle="--")
    right.set(ylim=(0, 1), ylabel="P[target], mean over prefixes (dashed)")
    ax.legend(frameon=False)
    return ax


def shared_limits(*data: Trace | pd.DataFrame) -> dict[str, float]:
    """The least {"vmin", "vmax"} that fits the heatmaps of all these traces or averages, and their white."""
    ends: list[float] = []
    for item in data:
        if isinstance(item, Trace):
            restored = item.read().restored
            ends += [item.base, np.nanmin(restored), np.nanmax(restored)]
        else:
            zero = [] if item.attrs.get("quantity") == "p_restored" else [0.0]
            ends += [item["mean"].min(), item["mean"].max(), *zero]
    low, high = _limits(ends)
    return {"vmin": low, "vmax": high}


def cell_table(trace: Trace) -> pd.DataFrame:
    """A row a cell of `heatmap`: kind, position, token, bucket, layer, p_restored; with p_corrupted and p_clean.

    Where the trace's metric is another, its own three numbers follow. Of heads: kind, layer, head and those numbers.
    """
    numbers = {"p_restored": trace.p_restored.ravel(), "p_corrupted": trace.p_corrupted, "p_clean": trace.p_clean}
    if trace.metric != "probability":
        readings = trace.read()
        parts = {"restored": readings.restored.ravel(), "corrupted": readings.corrupted, "clean": readings.clean}
        numbers |= {f"{trace.metric}_{name}": values for name, values in parts.items()}
    if trace.token is not None:
        layer, head = np.indices(trace.p_restored.shape).reshape(2, -1)
        return pd.DataFrame({"kind": trace.label, "layer": layer, "head": head} | numbers)
    n_tokens, n_layers = trace.p_restored.shape
    position = np.repeat(np.arange(n_tokens), n_layers)
    bucket = buckets(n_tokens, trace.subject_range)
    return pd.DataFrame(
        {
            "kind": trace.label,
            "position": position,
            "token": [trace.tokens[i] for i in position],
            "bucket": [bucket[i] or "before_subject" for i in position],
            "layer": np.tile(np.arange(n_layers), n_tokens),
            **numbers,
        }
    )


def save_figure(figure: Figure, numbers: pd.DataFrame, stem: str | Path, unit: str = "probability") -> None:
    """Write `stem`.csv (the plotted numbers), `stem`.png (200 dpi) and, last, `stem`.pdf, each whole or not at all.

    The table gets the columns `quantity`, `unit` and `interval` where they apply and it has none of that name. The same
    figure gives the same bytes: no times are written.
    """
    columns = {"quantity": numbers.attrs.get("quantity"), "unit": unit}
    table = numbers.assign(**{name: text for name, text in columns.items() if text and name not in numbers})
    if "ci_low" in table and "interval" not in table:
        over = ", clustered by relation" if numbers.attrs.get("clustered") else ""
        table["interval"] = np.where(table["ci_low"].notna(), f"95% t over facts{over}", None)
    save_table(table, f"{stem}.csv")  # with_suffix would take the end off "qwen2.5"
    with plt.rc_context(SAVING):
        write_atomically(Path(f"{stem}.png"), lambda path: figure.savefig(path, format="png", dpi=200))
        write_atomically(Path(f"{stem}.pdf"), partial(figure.savefig, format="pdf", metadata={"CreationDate": None}))


def save_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as CSV, without its index, whole or not at all."""
    write_atomically(Path(path), lambda place: table.to_csv(place, index=False, lineterminator="\n"))


def _of_kind(average: pd.DataFrame, kind: str) -> pd.DataFrame:
    rows = average[average["kind"] == kind]
    if rows.empty:
        present = ", ".join(dict.fromkeys(average["kind"])) or "nothing"
        raise ValueError(f"plots: the average has no rows of kind {kind!r}, only of {present}; choose one of these")
    return rows


def _limits(ends: list[float], vmin: float | None = None, vmax: float | None = None) -> tuple[float, float]:
    """The range asked for, widened to hold all of `ends`; a range of no width gets one percentage point."""
    low, high = float(np.min(ends)), float(np.max(ends))
    if (vmin is not None and low < vmin) or (vmax is not None and high > vmax):
        logger.warning("colour scale %s to %s widened to hold the data, %.4g to %.4g", vmin, vmax, low, high)
    low = low if vmin is None else min(low, vmin)
    high = high if vmax is None else max(high, vmax)
    return low, high if high > low else low + 0.01


def _colour_map(kind: str, white: float, limits: tuple[float, float]) -> Colormap:
    """The colours of [low, high], equally strong at equal distances from `white`."""
    below, above = (plt.get_cmap(name) for name in COLOUR_MAPS["attn" if kind == "head" else kind])
    strength = np.linspace(0.15, 0.95, 16)
    ramp = LinearSegmentedColormap.from_list(kind, [*below(strength[::-1]), "white", *above(strength)], N=1025)
    low, high = limits
    reach = max(abs(high - white), abs(low - white))
    return ListedColormap(ramp(0.5 + (np.linspace(low, high, 512) - white) / (2 * reach)), name=kind)


@dataclass(frozen=True)
class Scale:
    """Colours of a heatmap: whose they are, the value that is white, the least range that they span, what they measure."""

    kind: str
    white: float
    vmin: float | None
    vmax: float | None
    label: str


def _draw_cells(ax: Axes, values: np.ndarray, names: Sequence[str], scale: Scale) -> None:
    """Values by row and layer as colours, with the names of the rows and a colour bar; cells of NaN are left empty."""
    low, high = _limits([np.nanmin(values), np.nanmax(values), scale.white], scale.vmin, scale.vmax)
    colours = {"cmap": _colour_map(scale.kind, scale.white, (low, high)), "vmin": low, "vmax": high}
    layers, rows = (np.arange(n + 1) - 0.5 for n in values.T.shape)  # the edges of the cells
    # Without edges PDF viewers show the page between the cells.
    mesh = ax.pcolormesh(layers, rows, np.ma.masked_invalid(values), edgecolors="face", linewidth=0.1, **colours)
    ax.set_ylim(rows[-1], rows[0])
    ax.set_yticks(range(len(names)), names)
    colour_bar(mesh, scale.label)


def _name_axes(ax: Axes, average: pd.DataFrame, kind: str, n: int) -> None:
    done = PUT_IN[average.attrs.get("direction", "denoise")]
    ax.set_title(f"{TITLES[kind].replace('restored', done)} (n = {n})")
    ax.set_xlabel(f"middle of the {done} layers" if kind in ("mlp", "attn") else "layer")


def _quantity_name(average: pd.DataFrame, otherwise: str = "indirect_effect") -> str:
    metric = average.attrs.get("metric", "probability").replace("_", " ")
    return QUANTITY_NAMES[average.attrs.get("quantity", otherwise)] + f", {metric}" * (metric != "probability")


def _draw_lines(
    ax: Axes, groups: DataFrameGroupBy, names: Mapping[str, tuple[str, dict]], average: pd.DataFrame, legend: bool
) -> Axes:
    """A line with its band for each group of rows that there is, in the order and by the names and styles of `names`."""
    groups = dict(iter(groups))
    in_probability = average.attrs.get("metric", "probability") == "probability"
    within = POSSIBLE.get(average.attrs.get("quantity") if in_probability else None, (-np.inf, np.inf))
    for key, (name, style) in names.items():
        if key in groups:
            rows = groups[key].sort_values("layer")
            line_with_band(ax, rows["layer"], rows, within=within, opacity=0.18, label=name, **style)
    ax.axhline(0, color="0.6", linewidth=0.5, zorder=0)
    ax.margins(x=0.01)
    inner = len(ax.get_shared_y_axes().get_siblings(ax)) > 1 and not ax.get_subplotspec().is_first_col()
    ax.set_ylabel("" if inner else _quantity_name(average))
    return finish(ax, layer_ticks(), frame=False, legend=legend)
