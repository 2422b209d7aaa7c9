"""Paraphrases one by one say what the metric of their case says."""

import pandas as pd
import pytest
from bench import QUICK, UNRELATED, case, small
from tiny import tiny_model

from rome_lab.evaluation.evaluating import evaluate
from rome_lab.studies.evaluation.paraphrases import by_opening, paraphrase_scores

CASES = [case(i, subject) for i, subject in enumerate(("Paris", "Japan", "Warsaw"))]

pytestmark = pytest.mark.usefixtures("shared_cache")


@pytest.mark.parametrize("method", ["none", "ft", "in-context", "rome"])
def test_the_mean_of_a_case_is_its_ps(method):
    lm = tiny_model("llama")
    found = paraphrase_scores(lm, CASES, small(method), progress=False)
    table = evaluate(lm, CASES, small(method), progress=False, settings=QUICK, unrelated=UNRELATED)
    assert found.groupby("case", sort=False)["won"].mean().tolist() == pytest.approx(table["PS"].tolist())
    assert found["paraphrase"].tolist() == [text for one in CASES for text in one.paraphrases]


def test_the_split_is_by_the_first_words_and_counts_cases():
    rows = [("a", True, 100.0), ("a", True, 0.0), ("a", False, 100.0), ("b", True, 0.0), ("b", False, 100.0)]
    split = by_opening(pd.DataFrame(rows, columns=["case", "opens", "won"])).set_index("opens")
    assert split.loc[True, ["mean", "n", "paraphrases"]].tolist() == [25.0, 2, 3]
    assert split.loc[False, ["mean", "ci_low", "ci_high", "n"]].tolist() == [
        100.0,
        pytest.approx(15.8, abs=0.1),
        100.0,
        2,
    ]
