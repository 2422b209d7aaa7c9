"""The room of search.ipynb: settings searched for on cases that are not the ones reported; scores only, no texts.

search_settings(lm, cases)              every configuration of `SEARCH`, with equal effort; configurations_of: a few
best(found)                             the best of each method
sweep_layers(lm, cases, layers)         ROME at several layers, with each choice of the key
rome_at_best(lm, by_layer)              ROME by default, at the best layer of such a sweep where no default is known
sweep_tokens(lm, rome, cases, tokens)   with C of several numbers of tokens, and of other text
sweep_changes(lm, rome, cases, n)       with one of its other settings changed at a time
compare_methods(lm, cases, choices, by) the metrics of some methods by what tells them apart, such as the layer
means, best_layers                      a sweep as a table to read, and its highest scores in words
scores_of, search_figure                the scores that a sweep has, and both sweeps drawn
all_numbers, plotted_numbers            the numbers behind the figure
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from rome_lab.base import Json, Store, canonical_json
from rome_lab.editing import KEYS, METHODS, SEARCH, FolderText, Method, Rome, covariances, default_settings, measured_on
from rome_lab.evaluation import SCORES_ONLY, Case, JudgeSettings, evaluate, summarise
from rome_lab.lab import FONT_SIZE
from rome_lab.models import LanguageModel
from rome_lab.studies.evaluation import PAGE_WIDTH, curves, plotted_numbers, scores_of

PUBLISHED_DECAY = 0.5  # of v*'s weight decay, which the embedded model's defaults depart from
OTHER_SETTINGS: Mapping[str, Mapping[str, float]] = {
    "weight decay 0.5": {"weight_decay": 0.5},
    "weight decay 0.02, clamp 8": {"weight_decay": 0.02, "clamp": 8.0},
    "no KL": {"kl": 0.0},
    "KL 1": {"kl": 1.0},
}


def search_settings(
    lm: LanguageModel,
    cases: Iterable[Case],
    choices: Mapping[str, Sequence[Method]] = SEARCH,
    *,
    store: Store | str | Path | None = None,
    progress: bool = True,
    settings: JudgeSettings = SCORES_ONLY,
) -> pd.DataFrame:
    """The metrics of every configuration of every method, all of them on the same cases.

    Args:
        choices: method -> its configurations, of equal number so that all methods are searched with equal effort.
        store, progress, settings: as in `evaluate`.

    Returns: DataFrame: method, configuration (what tells it from the others, in words), metric, mean, ci_low, ci_high, n.

    Raises: ValueError: the methods have different numbers of configurations; see also `evaluate`.
    """
    if len({len(several) for several in choices.values()}) != 1:
        counted = ", ".join(f"{name}: {len(several)}" for name, several in choices.items()) or "none"
        raise ValueError(
            f"search: the methods' configurations are {counted}; give each method the same number of them."
        )
    named: dict[tuple[str, str], Method] = {}
    for name, several in choices.items():
        settled = [method.settled(lm) for method in several]
        named |= {(name, label): method for label, method in zip(differences(settled), settled, strict=True)}
    return compare_methods(
        lm, cases, named, ["method", "configuration"], store=store, progress=progress, settings=settings
    )


def compare_methods(
    lm: LanguageModel,
    cases: Iterable[Case],
    choices: Mapping[tuple[str | int, ...], Method],
    by: Sequence[str],
    *,
    store: Store | str | Path | None = None,
    progress: bool = True,
    settings: JudgeSettings = SCORES_ONLY,
) -> pd.DataFrame:
    """The metrics of each method of `choices`, whose values under the names `by` tell it from the others.

    Methods of the ROME family share v* where they differ in neither layer nor settings, and start from the same key (see
    `EditSettings.start`), so trying keys or covariances is cheap.

    Returns: DataFrame: the columns `by`, metric, mean, ci_low, ci_high, n.
    """
    methods = [replace(method, name=": ".join(map(str, values))) for values, method in choices.items()]
    table = evaluate(lm, cases, methods, store=store, progress=progress, settings=settings, unrelated=())
    values = {method.name: values for method, values in zip(methods, choices, strict=True)}
    named = pd.DataFrame([values[name] for name in table["method"]], columns=list(by), index=table.index)
    return summarise(pd.concat([table.drop(columns="method"), named], axis=1), by)


def configurations_of(n: int, c_text: str = "sampled", ways: Iterable[str] = SEARCH) -> dict[str, list[Method]]:
    """Method -> its first n configurations of `SEARCH`, those of ROME with C measured on this text.

    Raises: ValueError: one of `ways` is no method of `SEARCH`.
    """
    ways = list(ways)
    if unknown := [name for name in ways if name not in SEARCH]:
        raise ValueError(f"search: {', '.join(unknown)}: nothing to search; ways are {', '.join(SEARCH)}.")
    return {name: [measured_on(method, c_text) for method in SEARCH[name][:n]] for name in ways}


def sweep_layers(
    lm: LanguageModel,
    cases: Iterable[Case],
    layers: Iterable[int],
    c_text: str = "sampled",
    store: Store | str | Path | None = None,
) -> pd.DataFrame:
    """The metrics of ROME by layer and key, everything else as published; layers that the model has not are left out.

    Args: c_text: text that C is measured on, see `measured_on`.
    """
    layers = [layer for layer in layers if layer < lm.n_layers]
    rome = as_published(replace(METHODS["rome"], layer=layers[0]).settled(lm), c_text)
    covariances(lm, layers, rome.source)  # in one pass over the text
    choices = {(layer, key): replace(rome, layer=layer, key=key) for layer in layers for key in KEYS}
    return compare_methods(lm, cases, choices, ["layer", "key"], store=store)


def rome_at_best(lm: LanguageModel, by_layer: pd.DataFrame) -> Rome:
    """ROME as the model's defaults have it; where no layer is known, at the one with the highest score of a sweep."""
    rome, settings = METHODS["rome"], default_settings(lm)
    if settings.layer is None:
        rows = by_layer[(by_layer["metric"] == scores_of(by_layer)[0]) & (by_layer["key"] == settings.settings.key)]
        rome = replace(rome, layer=int(rows.loc[rows["mean"].idxmax(), "layer"]))
    return rome.settled(lm)


def sweep_tokens(
    lm: LanguageModel,
    rome: Rome,
    cases: Iterable[Case],
    tokens: Iterable[int],
    c_text: str = "sampled",
    texts: str | None = None,
    store: Store | str | Path | None = None,
) -> pd.DataFrame:
    """The metrics of ROME by the number of tokens and the text that C is measured on, everything else as published.

    Args:
        rome: settled, at the layer and with the key that are meant.
        c_text: the text, see `measured_on`.
        texts: a folder of other text files to measure C on, beside it.
    """
    rome = as_published(rome, c_text)
    chosen = {"layer": rome.layer, "key": rome.key, "settings": rome.settings}
    sources = {Path(c_text).name: rome.source} | ({"folder": FolderText(texts)} if texts else {})
    choices = {
        (n, name): Rome(**chosen, source=source, tokens=n) for n in sorted(tokens) for name, source in sources.items()
    }
    return compare_methods(lm, cases, choices, ["tokens", "source"], store=store)


def sweep_changes(
    lm: LanguageModel,
    rome: Rome,
    cases: Iterable[Case],
    n: int,
    c_text: str = "sampled",
    store: Store | str | Path | None = None,
) -> pd.DataFrame:
    """The metrics of a settled ROME ("as it is"), and with each of the first n of `OTHER_SETTINGS`."""
    rome = measured_on(rome, c_text)
    changes = {"as it is": {}} | dict(list(OTHER_SETTINGS.items())[:n])
    choices = {(name,): replace(rome, settings=replace(rome.settings, **change)) for name, change in changes.items()}
    return compare_methods(lm, cases, choices, ["change"], store=store)


def as_published(rome: Rome, c_text: str = "sampled") -> Rome:
    """A settled ROME with the published weight decay."""
    rome = measured_on(rome, c_text)
    return replace(rome, settings=replace(rome.settings, weight_decay=PUBLISHED_DECAY))


def means(
    swept: pd.DataFrame, rows: str | Sequence[str], columns: str | Sequence[str] = "metric", metrics: Sequence[str] = ()
) -> pd.DataFrame:
    """A sweep as a table to read: the means, by default of its scores, with rows in the order in which they were tried."""
    metrics = metrics or scores_of(swept)
    kept = swept[swept["metric"].isin(metrics)]
    wide = kept.pivot(index=rows, columns=columns, values="mean")
    order = pd.MultiIndex.from_frame(kept[rows]).unique() if isinstance(rows, list) else kept[rows].unique()
    return wide.loc[order, metrics] if columns == "metric" else wide.loc[order]


def best_layers(by_layer: pd.DataFrame) -> str:
    """A line for each key: the highest score, and the layer where it is."""
    score = scores_of(by_layer)[0]
    table = means(by_layer, "layer", "key", [score])
    lines = [f"{key}: highest {score} {table[key].max():.1f}, at layer {table[key].idxmax()}" for key in KEYS]
    return "\n".join(lines)


def search_figure(by_layer: pd.DataFrame, by_tokens: pd.DataFrame, about: str) -> Figure:
    """A column for each score: above along the layers, below along the tokens behind C; one scale for all."""
    scores = scores_of(by_layer)
    figure, axes = plt.subplots(2, len(scores), figsize=(PAGE_WIDTH, 3.6), sharey=True, layout="constrained")
    for score, upper, lower in zip(scores, *axes, strict=True):
        curves(by_layer, score, "layer", upper, by="key")
        curves(by_tokens, score, "tokens", lower, by="source", log=True, label="tokens behind C")
    for ax in axes[:, 0]:
        ax.legend(fontsize=FONT_SIZE - 1, frameon=False)
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    figure.suptitle(about, fontsize=FONT_SIZE)
    return figure


def all_numbers(lm: LanguageModel, dataset: str | Path, **parts: pd.DataFrame) -> pd.DataFrame:
    """All sweeps in one table, each with its name in the column panel; those without rows are left out."""
    panels = [part.assign(panel=name) for name, part in parts.items() if len(part)]
    return plotted_numbers(pd.concat(panels, ignore_index=True), lm.name, dataset)


def best(found: pd.DataFrame, metric: str = "S") -> pd.DataFrame:
    """The configuration of each method with the highest mean of `metric`, the first of those that share it.

    A configuration that failed at cases which others of the method could edit does not count: its mean is over easier ones.
    """
    rows = found[found["metric"] == metric]
    rows = rows[rows["n"] == rows.groupby("method")["n"].transform("max")]
    return rows.loc[rows.groupby("method", sort=False)["mean"].idxmax()].reset_index(drop=True)


def differences(methods: Sequence[Method]) -> list[str]:
    """What tells each method from the others, in words: the items of its description that are not the same in all."""
    flat = [flattened(method.describe()) for method in methods]
    varying = [key for key in flat[0] if len({canonical_json(one.get(key)) for one in flat}) > 1]
    return [", ".join(f"{key.replace('_', ' ')} {one.get(key)}" for key in varying) for one in flat]


def flattened(description: Mapping[str, Json]) -> dict[str, Json]:
    """A description without its nesting; keys keep their last part."""
    flat: dict[str, Json] = {}
    for key, value in description.items():
        flat |= flattened(value) if isinstance(value, Mapping) else {key: value}
    return flat
