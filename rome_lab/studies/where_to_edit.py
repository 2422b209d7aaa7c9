"""The room of where_to_edit.ipynb: does tracing tell in which layer an edit works?

edits_by_layer          how well an edit of each fact works in each layer: a row a fact and layer
traced_by_layer         what tracing says of that layer, for that fact
regressions             how much of an edit's success layer, tracing, or both explain, and what tracing adds
correlations            rank correlations of success and tracing: over a fact's layers, and over facts within a layer
success_figure          success by layer, beside the mean effect, and success against effect

Source of the question, and of the measure of success: Hase et al. 2023, arXiv 2301.04213.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats
from tqdm.auto import tqdm

from rome_lab.base import Store, mean_ci
from rome_lab.editing import ENOUGH, EditSettings, Optima, Rome, covariances, key_size, measured_on
from rome_lab.facts import Case, answers_to
from rome_lab.lab import COLOURS, FONT_SIZE, finish, layer_ticks, line_with_band, panel_figure
from rome_lab.models import Change, LanguageModel
from rome_lab.tracing import trace_facts

SUCCESSES = ("rewrite", "paraphrase", "neighbour")
EFFECTS = {
    "state": "state",
    "mlp": "MLP outputs, ten layers",
    "single": "MLP output, one layer",
    "random": "a random layer",
}
DRAWS = 200  # of facts, for intervals


def edits_by_layer(
    lm: LanguageModel,
    cases: Sequence[Case],
    layers: Sequence[int],
    settings: EditSettings,
    c_text: str = "sampled",
    store: Store | str | Path | None = None,
) -> pd.DataFrame:
    """Edit each layer for each case by ROME, one edit at a time, and see what is said.

        success = (p_new(o*) - p_old(o*)) / (1 - p_old(o*))

    Args: c_text: text that C is measured on, see `measured_on`.

    Returns: DataFrame: fact (its place), layer, rewrite and paraphrase, the success at the edited prompt and the mean over
             the paraphrases; neighbour, the mean of p_new(o) - p_old(o) over the neighbours, o their own object.
    """
    optima, rows = Optima(lm, store, progress=False), []
    tokens = ENOUGH * max(key_size(lm, layer) for layer in layers)
    rome = measured_on(Rome(settings=settings, tokens=tokens), c_text)
    covariances(lm, layers, rome.source, tokens)
    before = [probabilities(lm, Change(), case) for case in cases]
    for layer in tqdm(layers, desc="editing", unit="layer"):
        for place, case in enumerate(cases):
            after = probabilities(lm, replace(rome, layer=layer).change(lm, [(case.fact, case.target)], optima), case)
            old = before[place]
            gained = {name: (after[name] - old[name]) / (1 - old[name]) for name in ("rewrite", "paraphrases")}
            marks = {"rewrite": gained["rewrite"].mean(), "paraphrase": gained["paraphrases"].mean()}
            marks["neighbour"] = (after["neighbours"] - old["neighbours"]).mean() if case.neighbours else np.nan
            rows.append({"fact": place, "layer": layer} | marks)
        optima.factors.clear()  # of each layer as large as its C, and not needed again
    return pd.DataFrame(rows)


def probabilities(lm: LanguageModel, change: Change, case: Case) -> dict[str, np.ndarray]:
    """The probability of each text that a case asks about, under a change, by what is asked."""
    texts = {name: case.pairs[name] for name in ("rewrite", "paraphrases", "neighbours")}
    (answers,) = answers_to(lm, change, [texts], "where_to_edit")
    return {name: np.exp([answer.total for answer in part]) for name, part in answers.items()}


def traced_by_layer(
    lm: LanguageModel,
    cases: Sequence[Case],
    samples: int = 10,
    seed: int = 0,
    store: Store | str | Path | None = None,
) -> pd.DataFrame:
    """The indirect effects at the last subject token, a row a fact and layer.

    Returns: DataFrame: fact, layer, state, mlp (runs of ten layers), single (MLP output of one layer), random: the `mlp` of
             a random layer of the same fact, all layers shuffled by the seed, as a control.
    """
    facts = [case.fact for case in cases]
    settings = {"samples": samples, "seed": seed}
    traces = trace_facts(lm, facts, ("state", "mlp"), store, **settings)
    single = trace_facts(lm, facts, ("mlp",), store, window=1, **settings)
    columns = {"state": traces.of("state"), "mlp": traces.of("mlp"), "single": single}
    effects = {
        name: np.stack([x.indirect_effect[x.subject_range[1] - 1] for x in part]) for name, part in columns.items()
    }
    effects["random"] = np.random.default_rng(seed).permuted(effects["mlp"], axis=1)
    fact, layer = np.indices(effects["mlp"].shape).reshape(2, -1)
    return pd.DataFrame({"fact": fact, "layer": layer} | {name: values.ravel() for name, values in effects.items()})


@dataclass(frozen=True)
class Design:
    """The columns of a regression: layers as dummies, effects as numbers."""

    layers: bool = True
    effect: str | None = None

    def explained(self, table: pd.DataFrame, success: str) -> float:
        """R2 of the least squares fit."""
        parts = [np.ones((len(table), 1))]
        parts += [pd.get_dummies(table["layer"], drop_first=True).to_numpy(float)] if self.layers else []
        parts += [table[[self.effect]].to_numpy(float)] if self.effect else []
        columns, y = np.concatenate(parts, axis=1), table[success].to_numpy(float)
        residual = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
        total = ((y - y.mean()) ** 2).sum()
        return float(1 - (residual**2).sum() / total) if total > 0 else np.nan


def regressions(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """R2 of each measure of success on layer, on each effect, and on both; and what the effect adds to the layer.

    Intervals are of a bootstrap over facts, of `DRAWS` draws. A gain is never below zero, so that the control, the effect of
    a random layer, says how large a gain nothing makes.

    Args:    table: of `edits_by_layer` and `traced_by_layer`, merged.
    Returns: DataFrame: success, effect, layer_r2, effect_r2, both_r2, gain, gain_low, gain_high, n_facts.
    """
    rng, rows = np.random.default_rng(seed), []
    for success in SUCCESSES:
        whole = table.dropna(subset=[success])
        by_fact = {fact: part for fact, part in whole.groupby("fact")}
        names = np.array(list(by_fact))
        draws = [
            pd.concat([by_fact[x] for x in rng.choice(names, len(names))], ignore_index=True) for _ in range(DRAWS)
        ]
        for effect in EFFECTS:
            layer, both = Design(), Design(effect=effect)
            gains = [both.explained(x, success) - layer.explained(x, success) for x in draws]
            low, high = np.nanpercentile(gains, [2.5, 97.5])
            r2 = {"layer_r2": layer.explained(whole, success), "both_r2": both.explained(whole, success)}
            r2["effect_r2"] = Design(layers=False, effect=effect).explained(whole, success)
            gain = {"gain": r2["both_r2"] - r2["layer_r2"], "gain_low": low, "gain_high": high}
            rows.append({"success": success, "effect": effect} | r2 | gain | {"n_facts": len(names)})
    return pd.DataFrame(rows)


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlations of success and effect, with intervals over what they are averaged over.

    Returns: DataFrame: success, effect, over ("a fact's layers" or "facts, within a layer"), mean, ci_low, ci_high, n.
    """
    rows = []
    for success in SUCCESSES:
        for effect in EFFECTS:
            for over, by in (("a fact's layers", "fact"), ("facts, within a layer", "layer")):
                parts = [x[[success, effect]].dropna() for _, x in table.groupby(by)]
                mean, low, high, n = mean_ci(np.array([rank_correlation(x) for x in parts]))
                rows.append({"success": success, "effect": effect, "over": over, "mean": float(mean)})
                rows[-1] |= {"ci_low": float(low), "ci_high": float(high), "n": int(n)}
    return pd.DataFrame(rows)


def rank_correlation(pairs: pd.DataFrame) -> float:
    """Of two columns; NaN where one of them does not vary, or there are fewer than three rows."""
    if len(pairs) < 3 or (pairs.nunique() < 2).any():
        return np.nan
    return float(stats.spearmanr(*pairs.to_numpy().T).statistic)


def success_figure(table: pd.DataFrame, note: str) -> Figure:
    """Each measure of success by layer beside the mean effects, and, for the rewrite, success against effect."""
    figure, (left, right) = panel_figure(1, 2, (7, 2.8), note)
    colours = dict(zip(SUCCESSES, (COLOURS["blue"], COLOURS["green"], COLOURS["red"]), strict=True))
    lines = {name: ("solid", colour) for name, colour in colours.items()} | {"mlp": ("dashed", "black")}
    layers = sorted(table["layer"].unique())
    for name, (style, colour) in lines.items():
        values = table.pivot(index="fact", columns="layer", values=name)[layers].to_numpy()
        mean = mean_ci(values)
        label = "tracing: MLP outputs" if name == "mlp" else name
        line_with_band(left, layers, mean, opacity=0.12, color=colour, linestyle=style, linewidth=1.1, label=label)
    left.set(xlabel="edited layer, or middle of the restored ones", ylabel="success, or effect")
    left.set_title(f"By layer (n = {table['fact'].nunique()})")
    right.scatter(table["mlp"], table["rewrite"], c=table["layer"], cmap="viridis", s=6, linewidths=0)
    right.set(xlabel="effect of restoring MLP outputs there", ylabel="success of the rewrite")
    right.set_title("A point a fact and layer; dark: first layers")
    for ax, locator in ((left, layer_ticks()), (right, None)):
        finish(ax, locator)
    left.set_ylim(top=1.2)  # with room for the legend
    left.legend(frameon=False, fontsize=FONT_SIZE - 1, ncols=2, loc="upper right")
    return figure
