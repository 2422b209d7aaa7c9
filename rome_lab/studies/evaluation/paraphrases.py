"""Paraphrases one by one: at which of them does an edit not generalise?

paraphrase_scores(lm, cases, method)    a row a paraphrase: whether the edit holds there, and whether the subject opens it
by_opening(scores)                      PS of the paraphrases that the subject opens, and of the others
failures_in_words(scores)               how many fail, and how many of these begin with the subject
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from rome_lab.base import Store, share_ci
from rome_lab.editing import Method, Optima, settle
from rome_lab.evaluation import SCORES_ONLY, Case, methods_of, questions_of
from rome_lab.models import LanguageModel, score


def paraphrase_scores(
    lm: LanguageModel,
    cases: Iterable[Case],
    method: str | Method = "rome",
    *,
    store: Store | str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Every paraphrase of every case under the method's change; what the method cannot edit is left out.

    A subject that opens a text has other keys there than after other words, most of all in a model whose texts do not
    begin with a token of their own.

    Args:
        store: where v* is kept and found again.

    Returns: DataFrame: case, paraphrase, opens (whether it begins with the subject), log_p_target, log_p_true (of the whole
        texts), won (100 where the target is the more probable one, otherwise 0).
    """
    cases = list(cases)
    (chosen,) = settle(lm, methods_of(method), cases, store, progress)
    optima = Optima(lm, store, progress)
    rows: list[dict] = []
    for case in tqdm(cases, desc="paraphrases", unit="case", disable=not progress):
        try:
            change = chosen.change(lm, [(case.fact, case.target)], optima)
        except ValueError:
            continue
        sheet = questions_of(lm, case, 0, change.preamble, SCORES_ONLY)
        # Asked together, both continuations of a paraphrase are read off one text.
        scores = score(lm, [change], sheet["paraphrases"] + sheet["paraphrases_true"])
        n = len(case.paraphrases)
        for text, target, true in zip(case.paraphrases, scores[:n], scores[n:], strict=True):
            place = {"case": case.id, "paraphrase": text, "opens": text.startswith(case.fact.subject)}
            won = 100.0 * (target.total > true.total)
            rows.append(place | {"log_p_target": target.total, "log_p_true": true.total, "won": won})
    return pd.DataFrame(rows)


def by_opening(scores: pd.DataFrame) -> pd.DataFrame:
    """PS of the paraphrases that the subject opens, and of the others: opens, mean, ci_low, ci_high, n, paraphrases.

    Paraphrases are averaged within their case first; n counts cases.
    """
    rows = []
    for opens, group in scores.groupby("opens"):
        mean, low, high, n = share_ci(group.groupby("case")["won"].mean().to_numpy())
        rows.append((bool(opens), float(mean), float(low), float(high), int(n), len(group)))
    return pd.DataFrame(rows, columns=["opens", "mean", "ci_low", "ci_high", "n", "paraphrases"])


def failures_in_words(scores: pd.DataFrame) -> str:
    """How many paraphrases fail, and how many of these begin with the subject."""
    lost = scores[scores["won"] == 0]
    return f"{len(lost)} of {len(scores)} paraphrases fail, {lost['opens'].sum()} of them with the subject in front"
