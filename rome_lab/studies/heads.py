"""The room of heads.ipynb: which heads bring the answer to the last token, and how many of them it takes.

trace_heads, top_heads          the effect of each head at the last token, over pairs of facts; the strongest of them
knock_out, knockout_lines       what the answer loses where the last token may not attend to some tokens, by layer
share_of_heads                  what so many of the strongest heads bring back together, chosen on other facts
enough_in_words                 how many of them make most of it
heads_figure                    all three in one figure
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from rome_lab.base import Store, mean_ci
from rome_lab.facts import read_prompt
from rome_lab.lab import COLOURS, FONT_SIZE, finish, layer_ticks, line_with_band, panel_figure, plots
from rome_lab.models import LanguageModel
from rome_lab.tracing import (
    SwapPair,
    Traces,
    TraceSettings,
    knocked_out,
    restore_heads,
    run_clean,
    run_clean_and_corrupted,
    trace_facts,
)

logger = logging.getLogger(__name__)

METRIC = "logit_difference"
KNOCKED = {"subject": "the subject", "subject_last": "its last token", "rest": "all other tokens"}


def trace_heads(lm: LanguageModel, pairs: Sequence[SwapPair], store: Store | str | Path | None = None) -> Traces:
    """The effect of each head at the last token on the logit difference, with the partner in the corrupted run."""
    return trace_facts(lm, pairs, ["head"], store, metric=METRIC)


def top_heads(average: pd.DataFrame, n: int = 10) -> pd.DataFrame:
    """The n heads of the greatest mean effect.

    Args: average: what `Traces.average_heads` returns.
    """
    return average.nlargest(n, "mean").reset_index(drop=True)


def knock_out(lm: LanguageModel, pairs: Sequence[SwapPair], window: int = 9) -> pd.DataFrame:
    """What the answer's probability loses by layer, for each choice of `KNOCKED`; a row a choice and layer, over facts.

    Returns: DataFrame: knocked, layer, mean, ci_low, ci_high, n_facts, of the relative change of P[o]. The last token itself
             is never among "all other tokens".
    """
    changes: dict[str, list[np.ndarray]] = {name: [] for name in KNOCKED}
    for pair in tqdm(pairs, desc="knocking out", unit="fact"):
        clean = run_clean(lm, pair.fact, read_prompt(lm, pair.fact))
        subject = range(*clean.prompt.subject_range)
        others = [x for x in range(len(clean.prompt.ids) - 1) if x not in subject]
        for name, tokens in {"subject": subject, "subject_last": subject[-1:], "rest": others}.items():
            nothing = np.full(lm.n_layers, np.nan)
            changes[name].append(knocked_out(clean, tokens, window).relative_change if len(tokens) else nothing)
    parts = [
        pd.DataFrame({"knocked": name, "layer": range(lm.n_layers)} | mean_ci(np.stack(values))._asdict())
        for name, values in changes.items()
    ]
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def share_of_heads(
    lm: LanguageModel,
    pairs: Sequence[SwapPair],
    traces: Traces,
    sizes: Sequence[int] = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89),
) -> pd.DataFrame:
    """What the k strongest heads bring back together at the last token, as a share of what all heads together do.

    The heads are chosen on the first half of the facts and measured on the other. Shares are of means over facts, ratios of
    single facts being wild where all heads bring back little; the interval is by a bootstrap over facts. Where the interval
    of what all heads bring back reaches zero, shares say nothing: they are NaN, with a warning.

    Returns: DataFrame: heads, share, ci_low, ci_high, n_facts.
    Raises:  ValueError: fewer than two pairs, or traces of others.
    """
    if len(pairs) < 2 or [x.prompt for x in traces] != [x.fact.prompt for x in pairs]:
        raise ValueError(
            f"share_of_heads: {len(pairs)} pairs and {len(traces)} traces; expected two or more, one each."
        )
    half = len(pairs) // 2
    order = top_heads(Traces(traces[:half]).average_heads(), traces[0].p_restored.size)
    ranked = list(zip(order["layer"].tolist(), order["head"].tolist(), strict=True))
    sizes = [*(k for k in sizes if k < len(ranked)), len(ranked)]
    rows = []
    for pair in tqdm(pairs[half:], desc="restoring heads together", unit="fact"):
        runs = run_clean_and_corrupted(lm, pair.fact, None, TraceSettings(pair.swap), with_heads=True)
        restored = restore_heads(runs, [ranked[:k] for k in sizes])[METRIC]
        rows.append(restored - runs.metrics[METRIC][1])
    effects = np.stack(rows)  # (facts, sizes)
    rng = np.random.default_rng(0)
    drawn = effects[rng.integers(len(effects), size=(2000, len(effects)))].mean(axis=1)  # (2000, sizes)
    means, whole = effects.mean(axis=0), drawn[:, -1:]
    if np.percentile(whole, 2.5) <= 0:
        logger.warning("share_of_heads: all heads bring back %.3g, not clearly above zero: no shares", means[-1])
        means, whole = np.full_like(means, np.nan), np.full_like(whole, np.nan)
    low, high = np.percentile(drawn / whole, [2.5, 97.5], axis=0)
    return pd.DataFrame(
        {"heads": sizes, "share": means / means[-1], "ci_low": low, "ci_high": high, "n_facts": len(effects)}
    )


def enough_in_words(shares: pd.DataFrame, share: float = 0.8) -> str:
    """How many of the strongest heads make such a share of what all heads restore, of the numbers that were tried."""
    enough = shares.loc[shares["share"] >= share, "heads"].min()
    if pd.isna(enough):
        return "What all heads restore together is not clearly above zero, so there are no shares of it."
    return f"{enough} of {shares['heads'].max()} heads make {share:.0%} of what all restore at the last token, or fewer do."


def heads_figure(average: pd.DataFrame, knocked: pd.DataFrame, shares: pd.DataFrame, note: str) -> Figure:
    """The three of them side by side."""
    figure, axes = panel_figure(1, 3, (7, 2.8), note)
    plots.heads_heatmap(average, axes[0])
    knockout_lines(knocked, axes[1])
    style = {"color": COLOURS["blue"], "marker": "o", "markersize": 2.5, "linewidth": 1}
    line_with_band(axes[2], shares["heads"], shares.rename(columns={"share": "mean"}), **style)
    axes[2].axhline(0.8, color="0.6", linewidth=0.6, linestyle="--", zorder=0)
    axes[2].set(xscale="log", xlabel="strongest heads, together", ylabel="share of what all heads restore")
    axes[2].set_title(f"Heads together (n = {shares['n_facts'].max()})")
    finish(axes[2])
    return figure


def knockout_lines(knocked: pd.DataFrame, ax: Axes) -> Axes:
    """The relative change of the answer's probability by layer, a line for each choice of tokens, with intervals."""
    colours = (COLOURS["black"], COLOURS["red"], COLOURS["sky"])
    for (name, title), colour in zip(KNOCKED.items(), colours, strict=True):
        part = knocked[knocked["knocked"] == name]
        line_with_band(ax, part["layer"], part, color=colour, linewidth=1.1, label=title)
    ax.axhline(0, color="0.6", linewidth=0.5, zorder=0)
    ax.set(xlabel="middle of the layers", ylabel="relative change of p")
    ax.set_title(f"Attention knocked out (n = {knocked['n_facts'].max()})")
    finish(ax, layer_ticks())
    ax.legend(frameon=False, fontsize=FONT_SIZE - 1)
    return ax
