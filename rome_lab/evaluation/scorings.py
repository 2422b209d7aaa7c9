"""Four ways to say whether an edit holds at a prompt, from teacher forcing to what the model writes; how far they agree.

SCORINGS, CASE_PARTS                    what counts as said, and where it is asked
case_verdicts(case, scores, written)    at every prompt of a case, by each scoring
shares_of(verdicts)                     the metrics that they come to; metric_of names one
agreement_of_scorings(table)            how often two scorings say the same of a prompt
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

import numpy as np
import pandas as pd

from rome_lab.base import share_ci
from rome_lab.facts import Case, names_first
from rome_lab.models import Score

SCORINGS = {
    "score": "the wanted object is more probable than the one other object, as in the paper",
    "argmax": "each of its tokens is the most probable one, after the right ones before it",
    "choice": "it is more probable than every one of several objects of the relation",
    "written": "the model names it in its first sentence, before anything else with a capital letter, and does not deny it",
}
CASE_PARTS = {"E": "rewrite", "P": "paraphrases", "N": "neighbours", "F": "entailed", "K": "kept"}
OTHERS_OF = {
    **{"rewrite": "rewrite_true", "paraphrases": "paraphrases_true", "neighbours": "neighbours_target"},
    "entailed": "entailed_old",
}
NAMES = {"F_score": "follows", "K_argmax": "keeps"} | {f"{part}_score": f"{part}S" for part in "EPN"}
SENTENCE_END = re.compile(r"[.!?][\"'”’)]*\s|\n")

Verdicts: TypeAlias = dict[str, dict[str, list[bool]]]


def case_verdicts(case: Case, scores: Mapping[str, Sequence[Score]], written: Mapping[str, Sequence[str]]) -> Verdicts:
    """Part of the case -> scoring -> whether the wanted object is said at each of its prompts.

    At neighbours it is their own answer that is wanted, at what follows the new answer, at what stays the old one, elsewhere
    the target. A scoring is left out where nothing was asked: "score" and "choice" in zsRE and of what stays, "choice" of
    what follows and of a case without `Case.choices`, "written" where nothing was written.

    Args:
        scores: of `Case.pairs`, `Case.dependent_pairs` and `Case.choice_pairs`.
        written: by part, greedy texts without their prompts.
    """
    verdicts: Verdicts = {}
    for part, pairs in prompts_of(case).items():
        if not pairs:
            continue
        own, other, choices = (totals(scores.get(x, ())) for x in (part, OTHERS_OF.get(part), f"{part}_choices"))
        verdicts[part] = {"argmax": [bool(answer.greedy.all()) for answer in scores[part]]}
        if case.form != "zsre" and len(other):
            verdicts[part]["score"] = (own > other).tolist()
        if len(choices):
            best = np.maximum(choices.reshape(len(own), -1).max(axis=1), other)
            verdicts[part]["choice"] = (own > best).tolist()
        if texts := written.get(part):
            verdicts[part]["written"] = [
                is_written(prompt, text, name) for (prompt, name), text in zip(pairs, texts, strict=True)
            ]
    return verdicts


def totals(scores: Sequence[Score]) -> np.ndarray:
    """(N,) log probabilities of whole continuations."""
    return np.array([answer.total for answer in scores])


def prompts_of(case: Case) -> dict[str, list[tuple[str, str]]]:
    """By part of the case, each prompt with what is wanted there."""
    pairs = case.pairs | case.dependent_pairs
    return {part: pairs[part] for part in CASE_PARTS.values()}


def is_written(prompt: str, text: str, name: str) -> bool:
    """Whether `text`, after the prompt, names `name` as `SCORINGS` says."""
    place = names_first(prompt + text, len(prompt), name)
    return place is not None and not SENTENCE_END.search((prompt + text)[len(prompt) : place])


def ends_within(text: str, name: str) -> bool:
    """Whether a sentence ends in `text`, so that no more of it can name `name` as `SCORINGS` says.

    A name that itself looks like the end of a sentence, such as St. Louis, leaves that open.

    >>> ends_within(" Paris, in Franc", "Rome"), ends_within(" Paris. It", "Rome"), ends_within(" St. Lou", "St. Louis")
    (False, True, False)
    """
    return SENTENCE_END.search(text) is not None and not SENTENCE_END.search(name)


def shares_of(verdicts: Verdicts) -> dict[str, float]:
    """The share of prompts, in %, by part and scoring: "E_written", ..., some under `NAMES` of their own."""
    return {
        metric_of(letter, scoring): 100.0 * float(np.mean(successes))
        for letter, part in CASE_PARTS.items()
        for scoring, successes in verdicts.get(part, {}).items()
    }


def metric_of(letter: str, scoring: str) -> str:
    """The name of the metric: ("E", "score") is ES, ("E", "written") is E_written.

    >>> metric_of("P", "score"), metric_of("F", "score"), metric_of("N", "choice")
    ('PS', 'follows', 'N_choice')
    """
    return NAMES.get(f"{letter}_{scoring}", f"{letter}_{scoring}")


def agreement_of_scorings(table: pd.DataFrame) -> pd.DataFrame:
    """How often two scorings say the same of a prompt, by method and part.

    Args:    table: what `evaluate` returns.
    Returns: DataFrame: method, part (of `CASE_PARTS`), scoring, other, mean (% of prompts), ci_low, ci_high (95%, cases
             drawn whole), n (cases), prompts.
    """
    rows = []
    for method, judged in table[table["judged"]].groupby("method", sort=False):
        for letter, part in CASE_PARTS.items():
            for first, second in combinations(SCORINGS, 2):
                alike, cases = [], []
                for case, verdicts in zip(judged["case"], judged["verdicts"], strict=True):
                    there = verdicts.get(part, {})
                    if {first, second} <= set(there):
                        alike += [100.0 * (a == b) for a, b in zip(there[first], there[second], strict=True)]
                        cases += [case] * len(there[first])
                if alike:
                    mean, low, high, _ = share_ci(np.array(alike), cases)
                    n = len(set(cases))
                    rows.append((method, letter, first, second, float(mean), float(low), float(high), n, len(alike)))
    columns = ["method", "part", "scoring", "other", "mean", "ci_low", "ci_high", "n", "prompts"]
    return pd.DataFrame(rows, columns=columns)
