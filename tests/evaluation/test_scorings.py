"""Scorings: what counts as written, how far they agree, and texts with what differs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from test_judging import TINY

from rome_lab.base import share_ci
from rome_lab.evaluation.scorings import agreement_of_scorings, case_verdicts, is_written, shares_of
from rome_lab.facts import build_cases, load_facts
from rome_lab.models import Score

PROMPT = "The Eiffel Tower is in"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (" Rome, the capital of Italy.", True),
        (" the city of Rome", True),
        (" Romeo", False),
        (" Paris, not in Rome", False),
        (" the north. Rome is", False),  # another sentence
        ("\nRome", False),
        (" a city, not Rome", False),
        (" the middle of nowhere", False),
        ("", False),
    ],
)
def test_what_is_written_is_the_first_name_of_the_first_sentence(text, written):
    assert is_written(PROMPT, text, "Rome") is written


def test_a_name_with_a_full_stop_ends_no_sentence():
    assert is_written(PROMPT, " St. Louis, Missouri", "St. Louis")
    assert not is_written(PROMPT, " St. Louis, Missouri", "Missouri")


def answer(total, greedy=False):
    return Score(np.array([total]), np.array([greedy]))


def test_verdicts_are_at_every_prompt_by_every_scoring_that_was_asked_for():
    scores = {name: [answer(-2.0)] * len(pairs) for name, pairs in TINY.pairs.items()}
    scores |= {name: [answer(-3.0)] * len(pairs) for name, pairs in TINY.choice_pairs.items()}
    scores["paraphrases"] = [answer(-1.0, greedy=True), answer(-1.0)]
    scores["paraphrases_choices"][3] = answer(-0.5)  # the last choice at the second prompt
    verdicts = case_verdicts(TINY, scores, {"paraphrases": [" Paris", " the city."]})
    assert verdicts["rewrite"] == {"argmax": [False], "score": [False], "choice": [False]}  # ties are no success
    assert verdicts["paraphrases"] == {
        "argmax": [True, False],
        "score": [True, True],
        "choice": [True, False],
        "written": [False, True],
    }
    shares = shares_of(verdicts)
    assert shares["PS"] == 100.0 and shares["P_choice"] == shares["P_written"] == shares["P_argmax"] == 50.0
    assert "P_choice" not in shares_of(case_verdicts(TINY, {**scores, "paraphrases_choices": []}, {}))


def test_agreement_counts_prompts_and_draws_cases():
    said = [{"paraphrases": {"score": [True, True], "written": [True, i < 2]}} for i in range(6)]
    table = pd.DataFrame({"case": list("abcdef"), "method": "rome", "judged": True, "verdicts": said})
    (row,) = agreement_of_scorings(table).to_dict("records")
    assert (row["part"], row["scoring"], row["other"], row["n"], row["prompts"]) == ("P", "score", "written", 6, 12)
    assert row["mean"] == pytest.approx(100 * 8 / 12)
    expected = share_ci(np.array([100.0, 100, 100, 100] + [100.0, 0] * 4), np.repeat(range(6), 2))
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((expected.ci_low, expected.ci_high))


def test_choices_are_true_of_nobody_whom_the_case_is_about():
    facts = load_facts("embedded")
    true = {(fact.relation, fact.subject, fact.object) for fact in facts}
    cases = build_cases(facts[:400], pool=facts)
    assert sum(bool(case.choices) for case in cases) > 0.8 * len(cases)
    for case in cases:
        assert not {case.target, case.fact.object} & set(case.choices)
        about = (case.fact.subject, *case.neighbour_subjects)
        assert not any((case.fact.relation, subject, choice) in true for subject in about for choice in case.choices)
