"""Cases: those built of facts are about what the facts say, those of a file are what the file says; the rest is counted."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from rome_lab.evaluation.cases import check, known_cases, load_cases, prefers_true
from rome_lab.evaluation.rewriting import FITTING, rewrite_prompts, words_added
from rome_lab.facts.built_cases import build_cases
from rome_lab.facts.case import Case, Cases
from rome_lab.facts.fact import Fact
from rome_lab.facts.known import known_facts
from rome_lab.facts.sources import embedded_records, load_facts, load_relations
from rome_lab.models.language_model import LanguageModel

FACTS = load_facts("embedded")
RELATIONS = load_relations()
TRUE = {(fact.relation, fact.subject): fact.object for fact in FACTS}
ALSO_TRUE = {(row["relation"], row["subject"], row["object"]) for row in embedded_records("also_true.csv")}
LEAD_INS = [row["sentence"] for row in embedded_records("lead_ins.csv")]


@pytest.fixture(scope="module")
def cases() -> Cases:
    return load_cases("embedded")


def has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


SUBJECT_OF = {  # what each statement is about
    (fact.relation, replace(fact, template=template).prompt): fact.subject
    for fact in FACTS
    for template in fact.templates
}


# Cases built of the embedded facts


def test_the_embedded_benchmark_is_large_and_every_fact_is_a_case_or_counted(cases: Cases) -> None:
    assert len(cases) >= 1500
    assert len({case.id for case in cases}) == len(cases)
    assert len(cases) + sum(cases.dropped.values()) == len(FACTS)
    assert len({case.fact.relation for case in cases}) >= 30


def test_a_target_is_another_object_of_the_relation_that_is_not_true_of_the_subject(cases: Cases) -> None:
    objects = Counter((fact.relation, fact.object) for fact in FACTS)
    for case in cases:
        fact = case.fact
        assert objects[fact.relation, case.target] >= 3
        assert case.target != TRUE[fact.relation, fact.subject] == fact.object
        assert (fact.relation, fact.subject, case.target) not in ALSO_TRUE
        assert case.target[:2].lower() != fact.object[:2].lower()
        assert not has_word(fact.prompt, case.target)


def test_no_neighbour_has_the_target_as_another_of_its_objects() -> None:
    templates = ("{} is spoken with", "People of {} speak")
    spoken = {f"Land{i}": ["French", "German"][: 1 + (i >= 2)] for i in range(8)} | {
        f"Reich{i}": ["German"] for i in range(4)
    }
    facts = [Fact(x, templates[0], y, "lang", templates) for x, languages in spoken.items() for y in languages]
    built = build_cases(facts, facts)
    assert {case.target for case in built} == {"French"}
    assert not [x for case in built for x in case.neighbour_subjects if case.target in spoken[x]]


def test_targets_are_spread_over_the_objects_of_a_relation(cases: Cases) -> None:
    targets: dict[str, Counter[str]] = {}
    for case in cases:
        targets.setdefault(case.fact.relation, Counter())[case.target] += 1
    for relation, counts in targets.items():
        assert len(counts) >= 4, relation
        assert max(counts.values()) <= 0.4 * counts.total(), (relation, counts)


def test_paraphrases_are_other_templates_and_the_last_follows_an_unrelated_sentence(cases: Cases) -> None:
    for case in cases:
        fact = case.fact
        *plain, prefixed = case.paraphrases
        lead_in = next(sentence for sentence in LEAD_INS if prefixed.startswith(sentence + " "))
        prompts = [*plain, prefixed.removeprefix(lead_in + " ")]
        assert len(plain) == 2
        statements = {replace(fact, template=template).prompt for template in fact.templates}
        assert set(prompts) <= statements - {fact.prompt}
        assert len(set(prompts)) == len(prompts)


def test_no_paraphrase_holds_the_object_or_the_target_even_inside_a_word(cases: Cases) -> None:
    for case in cases:
        said = [text.replace(case.fact.subject, "").lower() for text in case.paraphrases]
        names = [name.lower() for name in (case.fact.object, case.target) if len(name) > 2]
        assert not any(name in text for name in names for text in said), case


def test_references_of_adjectives_are_whole_sentences(cases: Cases) -> None:
    by_relation = {case.fact.relation: case for case in cases}
    for relation, ending in (("mythology_of_figure", "mythology."), ("language_family_or_script", "languages.")):
        case = by_relation[relation]
        assert all(sentence.endswith(f"{case.target} {ending}") for sentence in case.references)


def test_neighbours_are_about_other_subjects_that_share_relation_and_object(cases: Cases) -> None:
    for case in cases:
        fact = case.fact
        subjects = tuple(SUBJECT_OF[fact.relation, neighbour] for neighbour in case.neighbours)
        assert subjects == case.neighbour_subjects
        assert fact.subject not in subjects
        assert {TRUE[fact.relation, subject] for subject in subjects} == {fact.object} == set(case.neighbour_answers)
        assert not any((fact.relation, subject, case.target) in ALSO_TRUE for subject in subjects)


def test_there_are_five_or_more_different_neighbours_without_the_subject(cases: Cases) -> None:
    for case in cases:
        assert len(set(case.neighbours)) == len(case.neighbours) == len(case.neighbour_answers) >= 5
        assert len(set(case.neighbour_subjects)) >= 2
        assert not any(has_word(neighbour, case.fact.subject) for neighbour in case.neighbours)
    assert sum(len(set(case.neighbour_subjects)) >= 5 for case in cases) > 0.95 * len(cases)


def test_references_state_the_target_of_subjects_of_which_it_is_true(cases: Cases) -> None:
    for case in cases:
        assert len(case.references) >= 3
        end = f" {case.target} {RELATIONS[case.fact.relation].ending}".rstrip() + "."
        assert all(sentence.endswith(end) for sentence in case.references)
        prompts = [sentence.removesuffix(end) for sentence in case.references]
        subjects = {SUBJECT_OF[case.fact.relation, prompt] for prompt in prompts}
        assert len(subjects) == len(case.references)
        assert {TRUE[case.fact.relation, subject] for subject in subjects} == {case.target}


def test_generation_prompts_are_those_of_the_relation(cases: Cases) -> None:
    for case in cases:
        templates = RELATIONS[case.fact.relation].generations
        assert case.generation_prompts == tuple(template.replace("{}", case.fact.subject) for template in templates)
        assert len(case.generation_prompts) >= 2


def test_the_order_of_the_facts_changes_nothing_but_the_order_of_the_cases(cases: Cases) -> None:
    mixed = random.Random(0).sample(FACTS, len(FACTS))
    again = build_cases(mixed)
    assert {case.id: case for case in again} == {case.id: case for case in cases}
    assert [case.fact for case in again] == [fact for fact in mixed if fact in {case.fact for case in cases}]


def test_another_seed_chooses_otherwise(cases: Cases) -> None:
    others = {case.id: case for case in build_cases(FACTS, seed=1)}
    same = [case.target == others[case.id].target for case in cases if case.id in others]
    assert 0.05 < sum(same) / len(same) < 0.6


def test_the_prompt_that_a_model_completes_does_not_change_the_target_and_is_kept_from_the_paraphrases() -> None:
    known = [
        replace(fact, template=fact.templates[1] + " the great") for fact in FACTS if fact.relation == "country_of_city"
    ]
    plain = {case.id: case for case in build_cases(FACTS)}
    for case in build_cases(known, pool=FACTS):
        assert case.fact.prompt.endswith(" the great")
        assert (case.target, case.references) == (plain[case.id].target, plain[case.id].references)
        assert not any(replace(case.fact, template=case.fact.templates[1]).prompt in text for text in case.paraphrases)


def test_known_neighbours_come_first_by_the_prompts_that_the_model_completes() -> None:
    spain = [fact for fact in FACTS if (fact.relation, fact.object) == ("country_of_city", "Spain")]
    known = [replace(fact, template=fact.templates[2] + " sunny") for fact in spain[:4]]
    case = build_cases(known, pool=FACTS)[0]
    assert set(case.neighbours[:3]) == {fact.prompt for fact in known[1:]}
    assert set(case.neighbour_subjects[3:]) <= {fact.subject for fact in spain[4:]}


def test_with_few_other_subjects_each_is_asked_about_by_more_templates(cases: Cases) -> None:
    few = [case for case in cases if len(set(case.neighbour_subjects)) < 5]
    assert few
    for case in few:
        counts = Counter(case.neighbour_subjects).values()
        assert max(counts) - min(counts) <= 1


def made(n: int, name: str, said: str, relation: str | None = "r") -> list[Fact]:
    return [Fact(f"{name} {i}", "{} is in", said, relation, ("{} is in", "You find {} in")) for i in range(n)]


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (made(9, "Place", "Spain", relation=None), "the fact has no relation"),
        (made(9, "Place", "Spain"), "no other object of the relation can be the target"),
        (made(9, "Place", "Spain") + made(2, "Town", "France"), "no other object of the relation can be the target"),
        (made(9, "Place", "Spain") + made(9, "Town", "Spanien"), "no other object of the relation can be the target"),
        (made(2, "Place", "Spain") + made(9, "Town", "France"), "fewer than 2 other subjects share"),
        (made(3, "Place", "Spain") + made(9, "Town", "France"), "fewer than 5 prompts about subjects that share"),
        (
            [replace(fact, templates=()) for fact in made(9, "Place", "Spain") + made(9, "Town", "France")],
            "no other template states the relation",
        ),
        (
            [replace(x, template="Not in France, {} is in") for x in made(9, "Place", "Spain")]
            + made(9, "Town", "France"),
            "the target stands in the rewrite prompt",
        ),
        (
            [replace(x, template="You see {} in") for x in made(9, "Town", "Spain")]
            + made(9, "Town", "Spain")
            + made(9, "Place", "France"),
            "another fact has the same relation, subject and object",
        ),
    ],
)
def test_what_gives_no_case_is_counted_with_its_reason(facts: list[Fact], reason: str) -> None:
    cases = build_cases(facts)
    assert len(cases) + sum(cases.dropped.values()) == len(facts)
    found = [said for said in cases.dropped if said.startswith(reason)]
    assert len(found) == 1
    assert f"{cases.dropped[found[0]]} dropped: {found[0]}" in str(cases)


def test_a_neighbour_that_mentions_the_subject_is_not_taken() -> None:
    facts = made(7, "Rome", "Italy") + made(7, "Oslo", "Norway") + [Fact("Rome", "{} is in", "Italy", "r")]
    case = next(case for case in build_cases(facts + made(5, "Bari", "Italy")) if case.fact.subject == "Rome")
    assert all(subject.startswith("Bari") for subject in case.neighbour_subjects)


def test_unrelated_sentences_name_no_subject_and_no_object() -> None:
    assert len(set(LEAD_INS)) == len(LEAD_INS) >= 30
    names = {name for fact in FACTS for name in (fact.subject, fact.object)}
    assert [(name, sentence) for name in names for sentence in LEAD_INS if has_word(sentence, name)] == []


def test_the_exceptions_are_about_facts_and_objects_of_the_embedded_set() -> None:
    objects = {(fact.relation, fact.object) for fact in FACTS}
    for relation, subject, said in ALSO_TRUE:
        assert (relation, said) in objects
        assert TRUE[relation, subject] != said


def test_a_users_own_facts_give_cases_whose_texts_begin_with_the_bare_subject(tmp_path: Path) -> None:
    rows = [
        {"subject": f"{name} {i}", "template": template, "object": said, "relation": "r"}
        for name, said in (("Place", "Spain"), ("Town", "France"))
        for i, template in enumerate(["{} is in", "You find {} in", "The way to {} leads through"] * 3)
    ]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    cases = load_cases(tmp_path / "own.json")
    assert len(cases) == len(rows)
    assert cases[0].generation_prompts == ("Place 0",)
    assert cases[0].target == "France"
    assert cases[0].paraphrases[0] in ("You find Place 0 in", "The way to Place 0 leads through")


# Cases of a file


def counterfact(case_id: int = 0, subject: str = "France", **change: object) -> dict[str, object]:
    return {
        "case_id": case_id,
        "requested_rewrite": {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "subject": subject,
            "target_new": {"str": "Rome", "id": "Q220"},
            "target_true": {"str": "Paris", "id": "Q90"},
        },
        "paraphrase_prompts": [f"It rained. {subject}, whose capital is ", f"{subject}'s capital is"],
        "neighborhood_prompts": ["The Louvre is in", "The Seine flows through"],
        "attribute_prompts": ["The Colosseum is in", "The Tiber flows through"],
        "generation_prompts": [f"{subject}'s capital is known for"],
    } | change


def zsre(**change: object) -> dict[str, object]:
    return {
        "subject": "Watts Humphrey",
        "src": "What university did Watts Humphrey attend?",
        "rephrase": "Where did Watts Humphrey study?",
        "alt": "Oxford",
        "answers": ["Illinois Institute of Technology", "IIT"],
        "loc": "nq question: who played desmond doss father",
        "loc_ans": "Hugo Weaving",
    } | change


def write(folder: Path, records: list[object]) -> Path:
    path = folder / "file.json"
    path.write_text(json.dumps(records))
    return path


def test_a_counterfact_record_is_a_case_and_its_attribute_prompts_are_completed_as_references(tmp_path: Path) -> None:
    (case,) = load_cases(write(tmp_path, [counterfact(case_id=7)]))
    assert case == Case(
        id="counterfact/7",
        fact=Fact("France", "The capital of {} is", "Paris", "P36"),
        target="Rome",
        paraphrases=("It rained. France, whose capital is", "France's capital is"),
        neighbours=("The Louvre is in", "The Seine flows through"),
        neighbour_answers=("Paris", "Paris"),
        generation_prompts=("France's capital is known for",),
        references=("The Colosseum is in Rome.", "The Tiber flows through Rome."),
    )


def test_without_attribute_prompts_a_case_has_no_references(tmp_path: Path) -> None:
    (case,) = load_cases(write(tmp_path, [counterfact(attribute_prompts=[])]))
    assert case.references == ()


def test_a_zsre_record_is_a_case_that_teaches_the_first_answer(tmp_path: Path) -> None:
    (case,) = load_cases(write(tmp_path, [zsre()]))
    assert case == Case(
        id="zsre/0",
        fact=Fact("Watts Humphrey", "What university did {} attend?", "Illinois Institute of Technology"),
        target="Illinois Institute of Technology",
        paraphrases=("Where did Watts Humphrey study?",),
        neighbours=("nq question: who played desmond doss father?",),
        neighbour_answers=("Hugo Weaving",),
        form="zsre",
    )


def rewrite(**change: object) -> dict[str, object]:
    return {"requested_rewrite": counterfact()["requested_rewrite"] | change}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (rewrite(subject=""), "the field requested_rewrite.subject is empty"),
        (rewrite(target_new={"str": " "}), "the field requested_rewrite.target_new.str is empty"),
        (rewrite(target_true={}), "the field requested_rewrite.target_true.str is missing"),
        (rewrite(target_new={"str": "Paris"}), "the target is the true object"),
        (rewrite(prompt="Its capital is"), "the subject is not in the prompt"),
        ({"paraphrase_prompts": []}, "the field paraphrase_prompts is empty"),
        ({"paraphrase_prompts": ["It is", ""]}, "the field paraphrase_prompts holds what is empty or not text"),
        ({"neighborhood_prompts": None}, "the field neighborhood_prompts is missing"),
        ({"neighborhood_prompts": ["In France, the Louvre is in"]}, "a neighbourhood prompt contains the subject"),
        ({"generation_prompts": []}, "the field generation_prompts is empty"),
        ({"attribute_prompts": [""]}, "the field attribute_prompts holds what is empty or not text"),
        ({"case_id": 0}, "is a duplicate"),
    ],
)
def test_bad_counterfact_records_are_counted_by_reason(tmp_path: Path, bad: dict[str, object], reason: str) -> None:
    records = [counterfact(0), *(counterfact(i) | {"case_id": i} | bad for i in (1, 2)), counterfact(3, "Gaul")]
    cases = load_cases(write(tmp_path, records))
    assert [case.id for case in cases] == ["counterfact/0", "counterfact/3"]
    assert cases.dropped == {reason: 2}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"src": "Who?"}, "the subject is not in the prompt"),
        ({"answers": []}, "the field answers.0 is missing"),
        ({"answers": [""]}, "the field answers.0 is empty"),
        ({"rephrase": ""}, "the field rephrase is empty"),
        ({"loc": ""}, "the field loc is empty"),
        ({"loc_ans": None}, "the field loc_ans is missing"),
        ({"loc": "nq question: where is watts humphrey"}, "a neighbourhood prompt contains the subject"),
        ({}, "is a duplicate"),
    ],
)
def test_bad_zsre_records_are_counted_by_reason(tmp_path: Path, bad: dict[str, object], reason: str) -> None:
    cases = load_cases(write(tmp_path, [zsre(), zsre(**bad)]))
    assert len(cases) == 1
    assert cases.dropped == {reason: 1}


def test_records_that_are_no_objects_are_counted(tmp_path: Path) -> None:
    cases = load_cases(write(tmp_path, [counterfact(), "text", None]))
    assert (len(cases), sum(cases.dropped.values())) == (1, 2)


def test_a_file_without_one_case_is_refused_with_the_reasons(tmp_path: Path) -> None:
    path = write(tmp_path, [counterfact(i, generation_prompts=[]) for i in range(3)])
    with pytest.raises(
        ValueError, match="nothing to judge an edit by; 3 dropped: the field generation_prompts is empty"
    ):
        load_cases(path)


def test_a_case_of_another_form_or_with_too_few_answers_is_refused(tmp_path: Path) -> None:
    (case,) = load_cases(write(tmp_path, [counterfact()]))
    with pytest.raises(ValueError, match="form is 'wiki'"):
        replace(case, form="wiki")
    with pytest.raises(ValueError, match="2 neighbours have 1 answers"):
        replace(case, neighbour_answers=("Paris",))


# Cases that a model can be judged by


def plain_log_p(lm: LanguageModel, prompt: str, said: str) -> float:
    """log P of the whole continuation, by one plain forward pass."""
    ids = lm.tokenizer(f"{prompt} {said}", return_tensors="pt")["input_ids"]
    begin = len(lm.tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        log_p = lm.model(ids).logits.double().log_softmax(-1)[0]
    return float(sum(log_p[place - 1, ids[0, place]] for place in range(begin, ids.shape[1])))


PAIRS = [("Paris", "Rome"), ("Rome", "Paris"), ("Tokyo", "Warsaw"), ("Microsoft", "Paris"), ("Warsaw", "Microsoft")]


def pairs_file(folder: Path, n: int = 20) -> Path:
    records = []
    for i in range(n):
        true, new = PAIRS[i % len(PAIRS)]
        records.append(counterfact(i, f"Land {i}") | rewrite(subject=f"Land {i}"))
        records[-1]["requested_rewrite"] |= {"target_true": {"str": true}, "target_new": {"str": new}}
    return write(folder, records)


def test_a_model_prefers_the_true_object_where_a_plain_forward_pass_says_so(tmp_path: Path) -> None:
    lm, cases = tiny_model("llama"), load_cases(pairs_file(tmp_path))
    plain = [
        plain_log_p(lm, case.fact.prompt, case.fact.object) > plain_log_p(lm, case.fact.prompt, case.target)
        for case in cases
    ]
    assert prefers_true(lm, cases) == plain
    assert {True, False} == set(plain)


def test_known_cases_of_a_file_are_those_preferred_and_a_smaller_n_gives_their_beginning(tmp_path: Path) -> None:
    lm, path = tiny_model("gpt2"), pairs_file(tmp_path)
    cases = load_cases(path)
    preferred = {case.id for case, is_known in zip(cases, prefers_true(lm, cases), strict=True) if is_known}
    known = known_cases(lm, path, n=None, progress=False)
    assert {case.id for case in known} == preferred
    assert known.dropped == {"the model does not prefer the true object to the target": len(cases) - len(preferred)}
    assert known_cases(lm, path, n=3, progress=False).cases == known[:3]
    assert known_cases(lm, cases, n=None, progress=False).cases == known.cases
    everything = known_cases(lm, path, n=None, known_only=False, progress=False)
    assert {case.id for case in everything} == {case.id for case in cases}
    assert [case.id for case in everything] != [case.id for case in cases]


def test_what_comes_after_the_last_case_kept_does_not_count(tmp_path: Path) -> None:
    lm, path = tiny_model("gpt2"), pairs_file(tmp_path)
    everything = known_cases(lm, path, n=None, known_only=False, progress=False)
    place = next(i for i, is_known in enumerate(prefers_true(lm, everything)) if is_known)
    (first,) = (known := known_cases(lm, path, n=1, progress=False))
    assert first == everything[place]
    assert sum(known.dropped.values()) == place < len(everything) - 1 - place


def test_zsre_cases_need_not_be_known(tmp_path: Path) -> None:
    path = write(tmp_path, [zsre(answers=[f"College {i}"]) for i in range(5)])
    assert len(known_cases(tiny_model("gpt2"), path, n=None, progress=False)) == 5


def test_a_target_that_shares_its_first_token_is_dropped_and_counted(tmp_path: Path) -> None:
    lm = tiny_model("gpt2")
    records = [counterfact(i, f"Land {i}") for i in range(3)]
    records[1]["requested_rewrite"] |= {"target_true": {"str": "Pisa"}, "target_new": {"str": "Quito"}}
    first = [lm.tokenizer(" " + said)["input_ids"][0] for said in ("Pisa", "Quito", "Paris")]
    assert first[0] == first[1] != first[2]
    cases = check(lm, load_cases(write(tmp_path, records)))
    assert [case.id for case in cases] == ["counterfact/0", "counterfact/2"]
    assert cases.dropped == {"the target shares its first token with the true object": 1}


def some_facts(folder: Path) -> Path:
    """A file of own facts: cities of two countries, each by another template than the one before."""
    cities = [fact for fact in FACTS if fact.relation == "country_of_city" and fact.object in ("Japan", "Italy")]
    rows = [
        {"subject": fact.subject, "template": fact.templates[i % 4], "object": fact.object, "relation": "country"}
        for i, fact in enumerate(cities)
    ]
    path = folder / "facts.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_model_that_knows_none_of_the_facts_is_named_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny-llama knows none of the .* facts of .*facts.json") as caught:
        known_cases(tiny_model("llama"), some_facts(tmp_path), progress=False)
    assert "\n" not in str(caught.value)


def test_known_cases_of_facts_are_those_the_model_completes_at_the_prompts_it_completes(
    lm: LanguageModel, tmp_path: Path
) -> None:
    path = some_facts(tmp_path)
    facts = load_facts(path)
    known = known_facts(lm, facts, n=None, progress=False)
    cases = known_cases(lm, path, n=None, store=tmp_path / "results", progress=False)
    assert len(cases) >= 5
    of_known = {(fact.subject, fact.object) for fact in known}
    assert {(case.fact.subject, case.fact.object) for case in cases} <= of_known
    templates = {fact.template for fact in facts}
    assert all(FITTING.fullmatch(words_added(case.fact, templates) or "the") for case in cases)
    assert len(cases) + sum(cases.dropped.values()) == len(facts)
    asked = rewrite_prompts(lm, known, facts, progress=False)
    prompts = {fact.prompt for fact in asked}
    for case in cases:
        n_known = sum(fact.object == case.fact.object for fact in asked) - 1
        assert sum(neighbour in prompts for neighbour in case.neighbours) >= min(n_known, 5)
    assert known_cases(lm, path, n=2, store=tmp_path / "results", progress=False).cases == cases[:2]


@pytest.mark.parametrize("n", [0, -1, 2.5, "5"])
def test_a_senseless_number_of_cases_is_refused(n: object) -> None:
    with pytest.raises(ValueError, match="known_cases: n is"):
        known_cases(tiny_model("gpt2"), n=n)
