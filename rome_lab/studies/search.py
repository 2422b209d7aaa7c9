"""Search for the settings of the methods, on cases that are not the ones reported: scores only, no texts.

search(lm, cases)                   every configuration of `methods.SEARCH`, and which is the best of each method
sweep(lm, cases, choices, by)       the metrics of some methods by what tells them apart, such as the layer
MeasuredRome                        ROME with C of a given number of tokens
best(found)                         the best of each method
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from rome_lab.base import Json, Store, canonical_json
from rome_lab.editing import SEARCH, Factor, Method, Optima, Rome
from rome_lab.evaluation import SCORES_ONLY, Case, JudgeSettings, evaluate, summarise
from rome_lab.models import LanguageModel
from rome_lab.studies.evaluation import PAGE_WIDTH, UNITS, curves


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

    Methods of the ROME family share v* where they differ in neither layer nor settings, so trying keys or covariances is
    cheap.

    Returns: DataFrame: the columns `by`, metric, mean, ci_low, ci_high, n.
    """
    methods = [replace(method, name=": ".join(map(str, values))) for values, method in choices.items()]
    table = evaluate(lm, cases, methods, store=store, progress=progress, settings=settings, unrelated=())
    values = {method.name: values for method, values in zip(methods, choices, strict=True)}
    named = pd.DataFrame([values[name] for name in table["method"]], columns=list(by), index=table.index)
    return summarise(pd.concat([table.drop(columns="method"), named], axis=1), by)


def best(found: pd.DataFrame, metric: str = "S") -> pd.DataFrame:
    """The configuration of each method with the highest mean of `metric`, the first of those that share it."""
    rows = found[found["metric"] == metric]
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


@dataclass(frozen=True)
class MeasuredRome(Rome):
    """ROME with C measured on `tokens` tokens of its source."""

    tokens: int = 0

    def describe(self) -> dict[str, Json]:
        return super().describe() | {"tokens": self.tokens}

    def factor(self, lm: LanguageModel, optima: Optima) -> Factor:
        return optima.factor(self.layer, self.source, self.tokens)
