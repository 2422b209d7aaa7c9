"""What follows from an edit: the rules are the project's own facts, and prompts are asked where their conditions are met."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rome_lab.base import mentions
from rome_lab.facts import Case, Cases, Fact, build_cases, embedded_records, load_facts, text_at
from rome_lab.facts import dependents as module
from rome_lab.facts.dependents import candidates, read_knowledge, with_dependents


@pytest.fixture(scope="module")
def knowledge():
    return read_knowledge()


def case(fact: Fact, target: str) -> Case:
    return Case("1", fact, target, (), ("a", "b"), ("c", "d"))


TOWER = Fact("Eiffel Tower", "The {} is in the city of", "Paris", "landmark_city")


def test_every_rule_leads_from_a_relation_to_facts_about_its_objects(knowledge) -> None:
    for relation, rules in knowledge.through.items():
        objects = {fact.object for fact in knowledge.relations[relation].facts}
        assert len(rules) == len({template for _, template in rules})
        for through, template in rules:
            assert template.count("{}") == 1 and template == template.strip()
            assert len(objects & set(knowledge.objects[through])) >= 2, f"{relation} -> {through} leads nowhere"
            assert template not in knowledge.relations[relation].statements


def test_bridges_say_nothing_that_the_facts_say_already_or_otherwise() -> None:
    stated = {(fact.relation, fact.subject) for fact in load_facts("embedded")}
    rows = [(text_at(x, "relation"), text_at(x, "subject")) for x in embedded_records("bridges.csv")]
    assert len(rows) == len(set(rows)) and not stated & set(rows)


def test_what_follows_from_a_moved_tower_is_its_country(knowledge) -> None:
    moved = candidates(case(TOWER, "Rome"), knowledge)
    answers = {(x.prompt, x.old, x.new) for x in moved}
    assert ("To see the Eiffel Tower, tourists travel to the country of", "France", "Italy") in answers
    (condition, *_) = moved[0].conditions
    assert condition[1] == "Italy" and "Rome" in condition[0]


def test_what_is_the_same_before_and_after_stays(knowledge) -> None:
    dependents = candidates(case(TOWER, "Nice"), replace(knowledge, objects=countries(knowledge, Nice="France")))
    assert dependents and all(x.new is None and x.old == "France" for x in dependents)


def countries(knowledge, **more: str):
    return {**knowledge.objects, "country_of_city": {**knowledge.objects["country_of_city"], **more}}


def test_another_fact_about_the_subject_stays_unless_it_is_entangled(knowledge) -> None:
    country = Fact("Kenya", "{} is on the continent of", "Africa", "continent_of_country")
    kept = candidates(case(country, "Asia"), knowledge)
    assert {x.old for x in kept if x.new is None} >= {"Nairobi"}
    company = Fact("Adidas", "{} comes from", "Germany", "country_of_company")
    assert not any("headquarters" in x.prompt for x in candidates(case(company, "Japan"), knowledge))


def test_no_prompt_holds_its_own_answer_and_no_case_of_the_embedded_facts_depends_on_itself(knowledge) -> None:
    facts = load_facts("embedded")
    several = [(case, candidates(case, knowledge)) for case in build_cases(facts, pool=facts)]
    assert sum(bool(own) for _, own in several) > 300
    for built, own in several:
        for x in own:
            assert not mentions(x.prompt, x.old) and built.fact.subject in x.prompt and x.old != x.new
            assert (x.new is None) == (not x.conditions)


def test_other_relations_and_questions_have_none(knowledge) -> None:
    assert candidates(case(replace(TOWER, relation="of my own"), "Rome"), knowledge) == []
    assert candidates(replace(case(TOWER, "Paris"), form="zsre"), knowledge) == []


def test_only_what_the_model_answers_right_is_asked(lm) -> None:
    (asked,) = with_dependents(lm, Cases((case(TOWER, "Rome"),)))
    assert {(new, old) for _, new, old in asked.entailed} == {("Italy", "France")}
    nowhere = case(replace(TOWER, object="Rome"), "Paris")  # the model denies that it was in Italy
    assert with_dependents(lm, Cases((nowhere,)))[0].entailed == ()


def test_a_new_answer_has_to_be_known_of_the_target(lm, monkeypatch) -> None:
    knowledge = read_knowledge()
    monkeypatch.setattr(module, "read_knowledge", lambda: replace(knowledge, objects=countries(knowledge, Rome="Peru")))
    (asked,) = with_dependents(lm, Cases((case(TOWER, "Rome"),)))
    assert asked.entailed == ()
