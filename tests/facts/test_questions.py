"""Questions made of the embedded facts: each teaches a fact's own object, and asks of others what is theirs."""

from __future__ import annotations

import pytest

from rome_lab.base import mentions
from rome_lab.evaluation import load_cases
from rome_lab.facts import build_questions, embedded_records, load_facts, text_at


@pytest.fixture(scope="module")
def facts():
    return load_facts("embedded")


def test_every_relation_with_questions_has_several_which_ask_about_the_subject(facts):
    rows = [(text_at(x, "relation"), text_at(x, "question")) for x in embedded_records("questions.csv")]
    assert len(rows) == len(set(rows)) and {relation for relation, _ in rows} <= {fact.relation for fact in facts}
    assert len({relation for relation, _ in rows}) >= 38
    for relation, question in rows:
        assert question.count("{}") == 1 and question.endswith("?") and question[0].isupper()
        assert sum(other == relation for other, _ in rows) >= 2


def test_a_case_teaches_the_object_and_asks_of_others(facts):
    cases = build_questions(facts)
    assert len(cases) > 2000 and sum(cases.dropped.values()) == len(facts) - len(cases)
    assert len({case.id for case in cases}) == len(cases)
    for case in cases:
        assert case.form == "zsre" and case.target == case.fact.object and case.fact.subject in case.fact.prompt
        assert case.paraphrases and case.fact.prompt not in case.paraphrases
        assert len(case.neighbours) == 3 and not any(mentions(x, case.fact.subject) for x in case.neighbours)
        assert not {case.fact.subject, case.fact.object} & set(case.neighbour_subjects)


def test_what_is_chosen_depends_on_the_seed_and_not_on_the_order(facts):
    first = {case.id: case for case in build_questions(facts)}
    assert first == {case.id: case for case in build_questions(facts[::-1])}
    other = build_questions(facts, seed=1)
    assert sum(case != first[case.id] for case in other) > len(first) / 2
    assert load_cases("questions").cases == build_questions(facts).cases


def test_the_embedded_model_answers_some_and_an_edit_is_judged_by_the_metrics_of_zsre(lm):
    from rome_lab import evaluate
    from rome_lab.evaluation import SCORES_ONLY, known_cases

    cases = known_cases(lm, "questions", n=4, progress=False)
    table = evaluate(lm, cases, ["none", "in-context"], settings=SCORES_ONLY, unrelated=(), progress=False)
    means = table.groupby("method")[["efficacy", "paraphrase", "specificity"]].mean()
    assert means.loc["in-context", "efficacy"] > means.loc["none", "efficacy"]
    assert (means >= 0).all(axis=None) and (means <= 100).all(axis=None)
