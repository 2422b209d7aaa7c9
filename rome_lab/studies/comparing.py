"""The room of compare_models.ipynb: what is the same in several models, and what is not.

trace_model                 known facts of one model, traced: a ModelTraces
claims_by_model             the paper's claims, a row a claim and model
numbers_by_model            the numbers of appendices B.1 and B.2 in shares, a row a measure, beside the paper's GPT-2 XL
by_depth                    the effects at the sites as shares, by relative depth
depth_figure                those, drawn: a panel a kind and site, a line a model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from rome_lab.base import Store
from rome_lab.facts import known_facts, load_facts
from rome_lab.lab import COLOURS, FONT_SIZE, finish, line_with_band, panel_figure, plots, shared_legend
from rome_lab.models import LanguageModel
from rome_lab.tracing import BUCKETS, KINDS, Traces, beside_paper, claims, trace_facts

PANELS = (("state", "subject_last"), ("mlp", "subject_last"), ("state", "last"), ("attn", "last"))


@dataclass(frozen=True)
class ModelTraces:
    """The traces of one model's known facts, and what is said of the model.

    Attributes:
        report: how many facts it knows, in words.
    """

    name: str
    n_layers: int
    report: str
    traces: Traces


def trace_model(
    lm: LanguageModel,
    dataset: str,
    n_facts: int,
    samples: int,
    window: int,
    seed: int,
    store: Store | str | Path | None = None,
) -> ModelTraces:
    """Trace the first facts that a model knows, of all kinds; arguments as in `trace_facts` and `known_facts`."""
    known = known_facts(lm, load_facts(dataset), n=n_facts, seed=seed, store=store)
    traces = trace_facts(lm, known, tuple(KINDS), store, samples=samples, window=window, seed=seed)
    return ModelTraces(lm.name, lm.n_layers, str(known.report), traces)


def claims_by_model(models: Sequence[ModelTraces], clustered: bool = False) -> pd.DataFrame:
    """What `claims` returns of each model, in the order of the claims: claim, model, effect, interval, verdict."""
    tables = [claims(model.traces, clustered=clustered).assign(model=model.name) for model in models]
    table = pd.concat(tables).rename_axis("number").sort_values("number", kind="stable").reset_index(drop=True)
    columns = ["claim", "model", "effect", "ci_low", "ci_high", "n_facts", "left_out", "peak_layer", "verdict"]
    return table[columns]


def numbers_by_model(models: Sequence[ModelTraces]) -> pd.DataFrame:
    """What `beside_paper` returns of each model: measure, model, mean, interval, n_facts, recovered, layer, depth.

    The paper's GPT-2 XL comes last, without intervals.
    """
    columns = ["measure", "model", "mean", "ci_low", "ci_high", "n_facts", "recovered", "layer", "depth"]
    tables = [beside_paper(x.traces.summary(), x.n_layers).assign(model=x.name) for x in models]
    ours = pd.concat(tables)[columns]
    paper = {"mean": "paper", "recovered": "paper_recovered", "layer": "paper_layer", "depth": "paper_depth"}
    theirs = tables[0][["measure", *paper.values()]].rename(columns={old: new for new, old in paper.items()})
    table = pd.concat([ours, theirs.assign(model="GPT-2 XL, the paper's", n_facts=1000)])
    return table.rename_axis("number").sort_values("number", kind="stable").reset_index(drop=True)[columns]


def by_depth(models: Sequence[ModelTraces]) -> pd.DataFrame:
    """The effects at each of `PANELS` as shares, by layer and by depth from 0, the first layer, to 1, the last.

    Returns: DataFrame: model, kind, bucket, layer, depth, mean, ci_low, ci_high, n_facts.
    """
    parts = []
    for model in models:
        average = model.traces.average("normalised_effect")
        there = pd.MultiIndex.from_frame(average[["kind", "bucket"]]).isin(PANELS)
        depth = average["layer"] / max(1, model.n_layers - 1)
        parts.append(average.assign(model=model.name, depth=depth)[there])
    columns = ["model", "kind", "bucket", "layer", "depth", "mean", "ci_low", "ci_high", "n_facts"]
    return pd.concat(parts, ignore_index=True)[columns]


def depth_figure(depths: pd.DataFrame, note: str) -> Figure:
    """A panel for each of `PANELS`, a line a model, with 95% intervals over facts."""
    figure, axes = panel_figure(1, len(PANELS), (7, 2.5), note, sharey=True)
    names = list(dict.fromkeys(depths["model"]))
    for ax, (kind, bucket) in zip(axes, PANELS, strict=True):
        rows = depths[(depths["kind"] == kind) & (depths["bucket"] == bucket)]
        for name, colour in zip(names, (COLOURS["blue"], COLOURS["red"], *COLOURS.values()), strict=False):
            part = rows[rows["model"] == name].sort_values("depth")
            line_with_band(ax, part["depth"], part, color=colour, linewidth=1.1, label=name)
        ax.axhline(0, color="0.6", linewidth=0.5, zorder=0)
        ax.set_title(f"{plots.TITLES[kind].split()[0]}, {BUCKETS[bucket]}")
        ax.set_xlabel("depth")
        finish(ax)
    axes[0].set_ylabel("effect, as a share", fontsize=FONT_SIZE)
    shared_legend(figure, columns=len(names))
    return figure
