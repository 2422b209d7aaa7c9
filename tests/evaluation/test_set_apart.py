"""Cases that are set apart for the search share no subject with those that are reported."""

from __future__ import annotations

import json

import pytest
from bench import case

from rome_lab.evaluation import bystanders, load_cases, text_about_others
from rome_lab.evaluation import cases as sources
from rome_lab.evaluation.cases import set_apart
from rome_lab.facts import build_cases, load_facts
from rome_lab.facts.case import Cases


def counterfact(number: int) -> dict:
    target = {"target_new": {"str": "Tokyo", "id": "Q1"}, "target_true": {"str": "Rome", "id": "Q2"}}
    rewrite = {"prompt": "The city of {} is", "relation_id": "P1", "subject": f"Town {number // 2}"} | target
    texts = {
        "paraphrase_prompts": ["It stands in"],
        "neighborhood_prompts": ["Oslo is"],
        "generation_prompts": ["It is"],
    }
    return {"case_id": number, "requested_rewrite": rewrite, **texts}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps([counterfact(number) for number in range(24)]))  # two cases a subject
    return path


def test_cases_to_search_on_share_no_subject_with_those_reported_and_are_the_same_whatever_is_reported(tiny, file):
    parts = [set_apart(tiny, file, 5, n, known_only=False) for n in (2, 6)]
    assert parts[0][0].cases == parts[1][0].cases
    assert len(parts[0][0]) == 5
    for searched, reported in parts:
        assert not {one.fact.subject for one in searched} & {one.fact.subject for one in reported}
    assert parts[1][1][:2] == parts[0][1].cases
    assert [len(reported) for _, reported in parts] == [2, 6]


def test_cases_to_search_on_are_the_same_by_any_seed_which_orders_the_others(tiny, file):
    parts = [set_apart(tiny, file, 5, 4, seed, known_only=False) for seed in (0, 1, 2)]
    assert len({searched.cases for searched, _ in parts}) == 1
    assert len({reported.cases for _, reported in parts}) == 3
    for searched, reported in parts:
        assert len(reported) == 4
        assert not {one.fact.subject for one in searched} & {one.fact.subject for one in reported}


@pytest.mark.parametrize(
    ("source", "n_search", "warned"), [("embedded", 19, True), ("embedded", 20, False), ("x", 5, False)]
)
def test_a_search_on_fewer_cases_than_the_defaults_were_found_on_is_warned_of(
    tiny, monkeypatch, caplog, source, n_search, warned
):
    monkeypatch.setattr(
        sources, "sampled_cases", lambda *args, **options: Cases(tuple(case(i, f"Town {i}") for i in range(30)))
    )
    set_apart(tiny, source, n_search, 1)
    assert ("defaults were searched on the first 20" in caplog.text) == warned


def test_too_few_cases_are_told_or_refused(tiny, file, caplog):
    _, reported = set_apart(tiny, file, 2, 40, known_only=False)
    assert f"there are {len(reported)} cases besides those of the search, not 40" in caplog.text
    with pytest.raises(ValueError, match="all 24 cases would go to the search"):
        set_apart(tiny, file, 24, 1, known_only=False)


def test_text_for_C_is_about_nobody_whom_the_cases_are_judged_by(tiny, monkeypatch):
    facts = load_facts("embedded")
    cases = build_cases(facts[:40], pool=facts)
    pool = facts[900:910]
    monkeypatch.setattr(bystanders, "facts_said_at_once", lambda *args: pool)
    subjects = {subject for subject, _ in text_about_others(tiny, cases).subjects()}
    judged = {name for one in cases for name in (one.fact.subject, *one.neighbour_subjects)}
    assert judged and not subjects & (judged | {fact.subject for fact in pool})
    assert len(subjects) == len({fact.subject for fact in facts} - judged - {fact.subject for fact in pool})


def test_cases_of_a_file_choose_among_objects_of_their_relation(tmp_path):
    records = [counterfact(number) for number in range(20)]
    for number, record in enumerate(records):
        record["requested_rewrite"]["target_new"]["str"] = f"City {number}"
    path = tmp_path / "set.json"
    path.write_text(json.dumps(records))
    cases = load_cases(path)
    objects = {"Rome", *(f"City {number}" for number in range(20))}
    for one in cases:
        assert len(set(one.choices)) == 6 and set(one.choices) <= objects - {one.target, "Rome"}
    assert len({one.choices for one in cases}) > 10
    assert load_cases(path).cases == cases.cases
