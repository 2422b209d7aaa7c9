"""The room of gradients.ipynb: effects estimated by gradients beside the exact ones, cell by cell.

compare_cells         every cell of pairs of facts: its exact effect, and the estimate by attribution patching
agreement             rank correlation, slope and strongest cell, within each fact, by kind and place
completeness          how far sums of integrated gradients are from the exact effects, by steps
estimate_costs        what exact effects, both estimates and a plain run take
gradients_figure      the four in one figure; drawn_cells are the points in it
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from tqdm.auto import tqdm

from rome_lab.base import Store, mean_ci
from rome_lab.facts import read_prompt
from rome_lab.lab import COLOURS, FONT_SIZE, finish, panel_figure, plots
from rome_lab.models import LanguageModel
from rome_lab.tracing import (
    BUCKETS,
    SwapPair,
    Trace,
    TraceSettings,
    attributions,
    integrals,
    restore,
    run_clean_and_corrupted,
    trace_facts,
)

COMPARED = ("state", "mlp", "attn")
ESTIMATED_IN = ("logit_difference", "probability")
SITE_COLOURS = {"subject_last": COLOURS["red"], "last": COLOURS["black"]}
KIND_COLOURS = {"state": COLOURS["orange"], "mlp": COLOURS["pink"], "attn": COLOURS["blue"]}
LEAST = 0.01  # of the greatest effect of a fact's bucket: where all are smaller, ranks are ranks of nothing


def compare_cells(
    lm: LanguageModel,
    pairs: Sequence[SwapPair],
    windows: Sequence[int] = (1, 10),
    store: Store | str | Path | None = None,
) -> pd.DataFrame:
    """Exact and estimated effect of each cell from the subject on, with the partner's subject in the corrupted run.

    Returns: a row a cell: fact, kind, window, metric, position, bucket, layer, exact, estimate. States have one window.
    """
    tables = []
    for window in windows:
        kinds = COMPARED if window == windows[0] else COMPARED[1:]
        traces = iter(trace_facts(lm, pairs, kinds, store, window=window))
        for pair in tqdm(pairs, f"estimating, runs of {window}", unit="fact"):
            runs = run_clean_and_corrupted(lm, pair.fact, None, TraceSettings(pair.swap, window=window))
            exact = {kind: next(traces) for kind in kinds}
            for metric in ESTIMATED_IN:
                estimates = attributions(runs, kinds, metric)
                tables += [cells_of(exact[kind].by(metric), estimates[kind], window) for kind in kinds]
    return pd.concat(tables, ignore_index=True)


def cells_of(trace: Trace, estimate: np.ndarray, window: int) -> pd.DataFrame:
    """The rows of one trace and its estimate, from the subject's first token on."""
    effects = {"exact": trace.effect.ravel(), "estimate": estimate.ravel()}
    named = {"fact": trace.prompt, "window": 1 if trace.kind == "state" else window, "metric": trace.metric}
    cells = plots.cell_table(trace).assign(**named, **effects)
    names = ["fact", "kind", "window", "metric", "position", "bucket", "layer", *effects]
    return cells.loc[cells["position"] >= trace.subject_range[0], names].reset_index(drop=True)


def agreement(cells: pd.DataFrame) -> pd.DataFrame:
    """How well estimates agree with exact effects within a fact, by metric, kind, window and bucket; means over facts.

    Returns: a row a group: `spearman` with its 95% interval over facts, `slope` (of the estimate on the exact effect,
        through nothing, of all cells), `top` (share of facts whose strongest cell is the same), `worth` (exact effect at the
        cell with the greatest estimate, over the greatest one; mean), n_facts. Bucket "all" is all cells. Left out are facts
        without three cells in a bucket, or with no effect above `LEAST` of the fact's greatest there.
    """
    rows = []
    everywhere = cells.assign(bucket="all")
    greatest = cells.groupby(["metric", "kind", "window", "fact"])["exact"].transform(lambda x: x.abs().max())
    parts = pd.concat([everywhere.assign(greatest=greatest), cells.assign(greatest=greatest)], ignore_index=True)
    for key, group in parts.groupby(["metric", "kind", "window", "bucket"], sort=False):
        told = []
        for _, fact in group.groupby("fact"):
            exact, estimate = fact["exact"].to_numpy(), fact["estimate"].to_numpy()
            if len(exact) < 3 or np.ptp(exact) == 0 or exact.max() < LEAST * fact["greatest"].iloc[0]:
                continue
            best, guess = exact.argmax(), estimate.argmax()
            told.append((stats.spearmanr(exact, estimate).statistic, best == guess, exact[guess] / exact[best]))
        if not told:
            continue
        values = np.array(told, dtype=float)
        ci = mean_ci(values[:, 0])
        slope = float((group["exact"] * group["estimate"]).sum() / (group["exact"] ** 2).sum())
        rows.append(
            (*key, float(ci.mean), float(ci.ci_low), float(ci.ci_high), slope, *values[:, 1:].mean(0), len(values))
        )
    names = ["metric", "kind", "window", "bucket", "spearman", "ci_low", "ci_high", "slope", "top", "worth", "n_facts"]
    return pd.DataFrame(rows, columns=names)


def completeness(
    lm: LanguageModel, pairs: Sequence[SwapPair], steps: Sequence[int] = (1, 3, 9), window: int = 10
) -> pd.DataFrame:
    """Error of both estimates of the logit difference at the subject's last and the last token.

    Returns: a row a fact, kind and number of steps: `error`, the mean of |estimate - exact| over the cells, over the mean of
        |exact|; 0 steps is attribution patching.
    """
    rows = []
    for pair in tqdm(pairs, "integrating", unit="fact"):
        runs = run_clean_and_corrupted(lm, pair.fact, None, TraceSettings(pair.swap, window=window))
        tokens = sorted({runs.prompt.subject_range[1] - 1, len(runs.prompt.ids) - 1})
        estimates = {0: attributions(runs, COMPARED, ESTIMATED_IN[0])}
        estimates |= {m: integrals(runs, COMPARED, ESTIMATED_IN[0], m, tokens) for m in steps}
        for kind in COMPARED:
            exact = restore(runs, kind, tokens=tokens).by(ESTIMATED_IN[0]).effect[tokens]
            for m, values in estimates.items():
                error = np.abs(values[kind][tokens] - exact).mean() / np.abs(exact).mean()
                rows.append((pair.fact.prompt, kind, m, error))
    return pd.DataFrame(rows, columns=["fact", "kind", "steps", "error"])


def estimate_costs(lm: LanguageModel, pair: SwapPair, steps: int = 3, repetitions: int = 3) -> pd.DataFrame:
    """Seconds for one fact, all cells of three kinds, and in plain runs of its two texts; medians.

    Returns: a row a way: way, seconds, forwards. What is recorded of the clean and corrupted run is part of each.
    """
    prompt = read_prompt(lm, pair.fact)
    ids = torch.stack([prompt.ids, pair.swap.swapped_ids(lm, prompt)])
    settings = TraceSettings(pair.swap)
    last = [prompt.subject_range[1] - 1]

    def plain() -> None:
        with torch.no_grad():
            lm.model(input_ids=ids, use_cache=False)

    ways = {
        "plain run of both texts": plain,
        "attribution patching": lambda: attributions(recorded(), COMPARED, ESTIMATED_IN[0]),
        "exact effects": lambda: [restore(recorded(), kind) for kind in COMPARED],
        "exact effects, one token": lambda: [restore(recorded(), kind, tokens=last) for kind in COMPARED],
        f"integrated gradients, one token, {steps} steps": lambda: integrals(
            recorded(), COMPARED, ESTIMATED_IN[0], steps, last
        ),
    }

    def recorded() -> object:
        return run_clean_and_corrupted(lm, pair.fact, None, settings)

    plain()
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repetitions):
        for way, work in ways.items():
            if turn == 0 or way in ("plain run of both texts", "attribution patching"):  # the others are long
                begin = time.perf_counter()
                work()
                taken[way].append(time.perf_counter() - begin)
    table = pd.DataFrame([(way, float(np.median(values))) for way, values in taken.items()], columns=["way", "seconds"])
    return table.assign(forwards=table["seconds"] / table["seconds"][0])


def drawn_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of the scatter: logit difference, the longest runs, the subject's last and the prompt's last token."""
    longest = cells["window"] == cells.groupby("kind")["window"].transform("max")
    chosen = longest & (cells["metric"] == ESTIMATED_IN[0]) & cells["bucket"].isin(list(SITE_COLOURS))
    return cells[chosen].drop(columns="metric").round({"exact": 4, "estimate": 4})


def gradients_figure(cells: pd.DataFrame, agreed: pd.DataFrame, errors: pd.DataFrame, note: str) -> Figure:
    """Above, estimates against exact effects, a panel a kind; below, agreement by place and by length of run, and errors."""
    figure, axes = panel_figure(2, 3, (7, 4.6), note)
    drawn = drawn_cells(cells)
    for kind, ax in zip(COMPARED, axes[0], strict=True):
        effects_scatter(drawn[drawn["kind"] == kind], kind, ax)
    agreement_dots(agreed, axes[1, 0])
    runs_dots(agreed, axes[1, 1])
    for kind, rows in errors.groupby("kind", sort=False):
        mean = rows.groupby("steps")["error"].mean()
        axes[1, 2].plot(range(len(mean)), mean, color=KIND_COLOURS[kind], marker="o", markersize=3, label=kind)
    names = ["attribution\npatching" if m == 0 else str(m) for m in sorted(set(errors["steps"]))]
    axes[1, 2].set_xticks(range(len(names)), names)
    axes[1, 2].set(yscale="log", xlabel="steps of integrated gradients", ylabel="mean |error| / mean |effect|")
    axes[1, 2].set_title(f"Completeness (n = {errors['fact'].nunique()})")
    finish(axes[1, 2], legend=True)
    return figure


def effects_scatter(drawn: pd.DataFrame, kind: str, ax: Axes) -> Axes:
    """Estimated against exact effects of one kind, with the diagonal."""
    for bucket, colour in SITE_COLOURS.items():
        rows = drawn[drawn["bucket"] == bucket]
        ax.scatter(rows["exact"], rows["estimate"], s=2, color=colour, alpha=0.4, linewidth=0, label=BUCKETS[bucket])
    low, high = drawn["exact"].min(), drawn["exact"].max()
    ax.plot([low, high], [low, high], color="0.6", linewidth=0.6, zorder=0)
    run = "" if kind == "state" else f", runs of {drawn['window'].max()}"
    ax.set(title=f"{kind}{run} (n = {drawn['fact'].nunique()})", xlabel="exact effect on the logit difference")
    ax.set_ylabel("estimate" if kind == "state" else "")
    finish(ax)
    if kind == "state":
        ax.legend(fontsize=FONT_SIZE - 1, frameon=False, markerscale=3, handletextpad=0.2, loc="upper left")
    return ax


def agreement_dots(agreed: pd.DataFrame, ax: Axes) -> Axes:
    """Rank correlation by bucket, of the longest runs and the logit difference, with intervals."""
    rows = agreed[(agreed["metric"] == ESTIMATED_IN[0]) & (agreed["bucket"] != "all")]
    rows = rows[rows["window"] == rows.groupby("kind")["window"].transform("max")]
    names = [x for x in BUCKETS if x in set(rows["bucket"])]
    for shift, (kind, group) in enumerate(rows.groupby("kind", sort=False)):
        group = group.set_index("bucket").reindex(names)
        y = np.arange(len(names)) + 0.2 * (shift - 1)
        spread = [group["spearman"] - group["ci_low"], group["ci_high"] - group["spearman"]]
        style = {"fmt": "o", "markersize": 3, "linewidth": 0.8, "color": KIND_COLOURS[kind], "label": kind}
        ax.errorbar(group["spearman"], y, xerr=np.nan_to_num(spread), **style)
    ax.set_yticks(range(len(names)), [BUCKETS[x] for x in names])
    ax.invert_yaxis()
    ax.axvline(0, color="0.6", linewidth=0.5, zorder=0)
    ax.set(xlabel="rank correlation within a fact", title="Do they rank alike?", xlim=(-1.05, 1.05))
    return finish(ax, legend=True)


def runs_dots(agreed: pd.DataFrame, ax: Axes) -> Axes:
    """Slope of the estimates on the exact effects by length of run, at the two sites; 1 is right."""
    rows = agreed[(agreed["metric"] == ESTIMATED_IN[0]) & agreed["bucket"].isin(list(SITE_COLOURS))]
    markers = dict(zip(SITE_COLOURS, "os", strict=True))
    labels = [f"{kind}, {window}" for kind, window in dict.fromkeys(zip(rows["kind"], rows["window"], strict=True))]
    labels.sort(key=lambda x: (COMPARED.index(x.split(",")[0]), int(x.split()[-1])))
    for bucket, group in rows.groupby("bucket", sort=False):
        places = [labels.index(f"{x.kind}, {x.window}") for x in group.itertuples()]
        style = {"color": SITE_COLOURS[bucket], "s": 12, "marker": markers[bucket], "label": BUCKETS[bucket]}
        ax.scatter(group["slope"], places, **style)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) + 0.9, -0.5)  # with room for the legend
    ax.axvline(1, color="0.6", linewidth=0.6, zorder=0)
    ax.set(xlabel="slope of estimates on exact effects", title="Kind, and layers in a run")
    ax.legend(fontsize=FONT_SIZE - 1, frameon=False, loc="lower left")
    return finish(ax)
