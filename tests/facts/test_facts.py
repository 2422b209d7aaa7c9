"""Facts, the embedded set, and files of facts: what is loaded is what the file says, or the file is refused."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rome_lab.base import without_end
from rome_lab.facts.fact import Fact
from rome_lab.facts.sources import embedded_records, load_facts, load_relations

TEXT = st.text(min_size=1, max_size=12).filter(lambda text: text == text.strip())
PIECE = st.text(alphabet="ab {}'\"é東\n", max_size=10)


@given(subject=TEXT, before=PIECE, after=PIECE)
def test_the_prompt_holds_the_subject_as_plain_text_in_the_first_place(subject: str, before: str, after: str) -> None:
    assume("{}" not in before and not before.endswith("{"))
    fact = Fact(subject, before + "{}" + after, "Paris")
    begin, end = fact.subject_span
    assert fact.prompt == before + subject + without_end(after)
    assert fact.prompt[:begin] == before
    assert fact.prompt[begin:end] == subject


@pytest.mark.parametrize(
    "subject", ["{}", "{0}", "{subject}", "}{", "100%", "\\1", "Ångström", "東京", "🗼", "O'Neill"]
)
def test_braces_and_other_signs_in_a_subject_are_plain_text(subject: str) -> None:
    assert Fact(subject, "The {} is in {} of", "Paris").prompt == f"The {subject} is in {{}} of"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subject": ""}, "subject is empty"),
        ({"subject": " \n"}, "subject is empty"),
        ({"object": ""}, "object is empty"),
        ({"object": " Paris"}, "begins or ends with a blank"),
        ({"subject": "Louvre "}, "begins or ends with a blank"),
        ({"template": "The Louvre is in"}, "has no"),
        ({"template": ""}, "template is empty"),
        ({"templates": ("The {} is in", "no place")}, "'no place' has no"),
    ],
)
def test_a_fact_without_sense_is_refused_in_one_sentence(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        Fact(**{"subject": "Louvre", "template": "The {} is in", "object": "Paris", **change})
    assert "\n" not in str(caught.value)


def test_a_fact_that_is_not_text_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="object is None"):
        Fact("Louvre", "The {} is in", None)


# The embedded set


def test_the_embedded_set_is_large_and_has_no_duplicates() -> None:
    facts = load_facts("embedded")
    assert len(facts) >= 1200
    assert len(load_relations()) >= 25
    assert not [key for key, count in Counter((x.relation, x.subject) for x in facts).items() if count > 1]
    assert not [key for key, count in Counter((x.prompt, x.object) for x in facts).items() if count > 1]


@pytest.mark.parametrize("name", sorted(load_relations()))
def test_a_relation_has_facts_objects_and_templates_enough(name: str) -> None:
    relation = load_relations()[name]
    assert len(relation.facts) >= 20
    assert len({fact.object for fact in relation.facts}) >= 4
    assert len(set(relation.statements)) == len(relation.statements) >= 4
    assert len(set(relation.generations)) == len(relation.generations) >= 2
    assert sum(not template.startswith("{}") for template in relation.statements) >= 2
    for template in (*relation.statements, *relation.generations):
        assert template.count("{}") == 1
        assert template == template.strip()
    for fact in relation.facts:
        assert fact.relation == name
        assert fact.template == relation.statements[0]
        assert fact.templates == relation.statements


def test_no_embedded_object_stands_in_a_prompt_of_its_own() -> None:
    given_away = [
        (fact.object, prompt)
        for fact in load_facts("embedded")
        for prompt in (Fact(fact.subject, template, fact.object).prompt for template in fact.templates)
        if re.search(rf"\b{re.escape(fact.object)}\b", prompt, re.IGNORECASE)
    ]
    assert given_away == []


def test_no_sentence_opens_with_a_small_letter_but_in_names_written_so() -> None:
    prompts = [
        Fact(fact.subject, template, fact.object).prompt
        for relation in load_relations().values()
        for fact in relation.facts
        for template in (*relation.statements, *relation.generations)
    ]
    assert {prompt.split()[0] for prompt in prompts if prompt[0].islower()} == {"iMac", "iPad", "iPhone", "iPod"}


PLACES = {"city": "city", "country": "country", "newspaper": "country", "university": "country", "landmark": "city"}
PLACES |= {"headquarters": "city", "birthplace": "city", "state": "state"}


@pytest.mark.parametrize("name", [x for x in sorted(load_relations()) if x.split("_")[0] in PLACES])
def test_a_template_about_a_place_says_of_which_sort_it_is(name: str) -> None:
    """Where "is based in" goes on with a city, a country is as true."""
    sort = PLACES[name.split("_")[0]]
    for template in load_relations()[name].statements:
        # The guide, the lessons and the notebook of edits show this one, and their numbers are of it.
        shown = template == "If you want to visit the {}, you must first travel to"
        assert shown or re.search(rf"\b{sort}\b", template), template


def test_no_nickname_that_several_clubs_share_stands_alone() -> None:
    shared = "Bears Bruins Bulls Capitals Cowboys Eagles Falcons Hawks Lions Mariners Pirates Ramblers Rams Saints"
    assert not {fact.subject for fact in load_facts("embedded")} & set(shared.split())


def test_what_is_also_true_is_said_of_a_fact_and_an_object_of_its_relation_once() -> None:
    relations, rows = load_relations(), embedded_records("also_true.csv")
    for row in rows:
        facts = relations[row["relation"]].facts
        (own,) = [fact.object for fact in facts if fact.subject == row["subject"]]
        assert own != row["object"] and row["object"] in {fact.object for fact in facts}, row
    assert len({tuple(row.values()) for row in rows}) == len(rows)
    soccer = [x for x in load_facts("embedded") if x.object == "soccer"]
    also = {(row["subject"], row["object"]) for row in rows}
    assert soccer and all((fact.subject, "football") in also for fact in soccer)


def test_the_embedded_set_holds_every_row_of_its_file() -> None:
    with (Path(__file__).parents[2] / "rome_lab/facts/data/facts.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["relation"], row["subject"], row["object"]) for row in csv.DictReader(file)]
    assert sorted(rows) == sorted((fact.relation, fact.subject, fact.object) for fact in load_facts("embedded"))
    assert len(rows) == len(load_facts("embedded"))


# A user's own files

OWN = [
    Fact("Louvre", "The {} is in the city of", "Paris", "landmark"),
    Fact('The "Big" {Ben}, London', "{} stands in", "England"),
    Fact("Ōsaka", "{} lies in", "Japan"),
]


def write_csv(path: Path, rows: list[dict[str, str | None]], encoding: str = "utf-8", newline: str = "\n") -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator=newline)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, records: object, encoding: str = "utf-8") -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding=encoding)
    return path


def as_record(fact: Fact, *, prompt: bool = False) -> dict[str, str | None]:
    asked = {"prompt": fact.prompt} if prompt else {"template": fact.template}
    return {"subject": fact.subject, **asked, "object": fact.object, "relation": fact.relation}


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["own.csv", "own.json", "own.txt", "own"])
def test_a_users_file_gives_the_facts_it_states(tmp_path: Path, kind: str, encoding: str, prompt: bool) -> None:
    records = [as_record(fact, prompt=prompt) for fact in OWN]
    write = write_csv if kind in ("own.csv", "own.txt") else write_json
    path = write(tmp_path / kind, records, encoding)
    assert load_facts(path) == load_facts(str(path)) == tuple(OWN)


def test_windows_line_ends_and_blank_lines_change_nothing(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "own.csv", [as_record(fact) for fact in OWN], newline="\r\n")
    path.write_bytes(path.read_bytes() + b"\r\n\r\n")
    assert load_facts(path) == tuple(OWN)


def test_the_subject_of_a_prompt_is_its_first_whole_word(tmp_path: Path) -> None:
    record = {"subject": "Rome", "prompt": "Romeo, who was born in Rome, liked", "object": "Juliet"}
    (fact,) = load_facts(write_json(tmp_path / "own.json", [record]))
    assert fact.template == "Romeo, who was born in {}, liked"
    assert fact.prompt == record["prompt"]


GOOD = {"subject": "Louvre", "template": "The {} is in", "object": "Paris"}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"subject": ""}, "record 2: the field subject is empty"),
        ({"subject": "  "}, "record 2: the field subject is empty"),
        ({"subject": None}, "record 2: the field subject is missing"),
        ({"object": 7}, "record 2: the field object is 7, not text"),
        ({"object": "Paris "}, "record 2: the object 'Paris ' begins or ends with a blank"),
        ({"template": "The museum is in"}, "record 2: the template 'The museum is in' has no"),
        ({"template": None, "prompt": "The museum is in"}, "record 2: the subject 'Louvre' is not in the prompt"),
        ({"template": None, "prompt": "In {} the Louvre is in"}, "record 2: the prompt .* before its subject"),
        ({"template": None}, "record 2: the field template is missing"),
        ({"relation": 5}, "record 2: the field relation is 5, not text"),
        ({}, "record 2: is a duplicate of record 1"),
        ({"relation": "landmark"}, "record 2: is a duplicate of record 1"),
    ],
)
def test_a_bad_record_is_named_by_number_and_field(tmp_path: Path, record: dict[str, object], said: str) -> None:
    path = write_json(tmp_path / "own.json", [GOOD, GOOD | record])
    with pytest.raises(ValueError, match=said) as caught:
        load_facts(path)
    assert str(path) in str(caught.value)
    assert "1 of 2 records" in str(caught.value)


def test_all_bad_records_are_counted_and_the_first_ten_listed(tmp_path: Path) -> None:
    records = [GOOD] + [GOOD | {"subject": f"Museum {i}", "object": ""} for i in range(25)] + ["text", None]
    with pytest.raises(ValueError, match="27 of 28 records") as caught:
        load_facts(write_json(tmp_path / "own.json", records))
    assert re.findall(r"record (\d+):", str(caught.value)) == [str(number) for number in range(2, 12)]


def test_a_record_that_is_no_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="record 2: is str, not an object"):
        load_facts(write_json(tmp_path / "own.json", [GOOD, "text"]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"subject,template,object\nLouvre,The {} is in,Paris, France\n", "record 1: has more cells than the header"),
        (b"subject,template,object\nLouvre,The {} is in\n", "record 1: the field object is missing"),
        (b'subject,template,object\nLouvre,"The {} is in,Paris\n', "not valid CSV"),
        (b"subject,template,object,subject\nLouvre,The {} is in,Paris,x\n", "has a column twice"),
        (b"subject|template|object\nLouvre|The {} is in|Paris\n", "has the fields 'subject|template|object'; expected"),
        (b"subject,template,object\n", "holds no records"),
        (b"", "holds no records"),
        ("subject,template,object\nMusée,{} is in,Paris\n".encode("latin-1"), "byte 27 is 0xe9"),
        ("subject,template,object\nLouvre,{} is in,Paris\n".encode("utf-16"), "is not UTF-8"),
    ],
)
def test_a_bad_csv_file_is_refused_with_the_reason(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said)):
        load_facts(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"subject": "Louvre"', "is not valid JSON"),
        ('{"facts": []}', "holds a JSON dict; expected a list"),
        ("[]", "holds no records"),
        ("[" * 100_000, "is not valid JSON"),
        ("subject,template,object\n", "is not valid JSON"),
        ('[{"name": "Louvre"}]', "has the fields 'name'; expected subject, object and"),
        ("[1, 2]", "has the fields (none); expected"),
    ],
)
def test_a_bad_json_file_is_refused_with_the_reason(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "own.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(said)):
        load_facts(path)


@pytest.mark.parametrize("name", ["no_such_set", "missing.csv", "."])
def test_what_is_neither_a_set_nor_a_file_is_named_with_the_sets(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"'{re.escape(name)}' is neither a data set .*'counterfact'"):
        load_facts(name)


# The published forms

KNOWN_1000 = [
    {
        "known_id": 0,
        "subject": "Vinson Massif",
        "attribute": "Antarctica",
        "template": "{} is located in the continent",
        "prediction": " of Antarctica. It is the largest",
        "prompt": "Vinson Massif is located in the continent of",
        "relation_id": "P30",
    },
    {
        "known_id": 1,
        "subject": "Rome",
        "attribute": "Italy",
        "template": "In Rome, {} is the capital of",
        "prediction": " Italy",
        "prompt": "In Rome, Rome is the capital of",
        "relation_id": "P36",
    },
]


def counterfact(case: int, subject: str, prompt: str, true: str, new: str, relation: str = "P36") -> dict[str, object]:
    rewrite = {
        "prompt": prompt,
        "relation_id": relation,
        "subject": subject,
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": true, "id": "Q2"},
    }
    prompts = ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts")
    return {"case_id": case, "requested_rewrite": rewrite, **{name: [] for name in prompts}}


COUNTERFACT = [
    counterfact(0, "France", "The capital of {} is", "Paris", "Rome"),
    counterfact(1, "Japan", "{}, whose capital is", "Tokyo", "Rome"),
    counterfact(2, "France", "The capital of {} is", "Paris", "Oslo"),
    counterfact(3, "Louvre", "{} is in", "Paris", "Rome", relation="P131"),
]
ZSRE = [
    {
        "subject": "Watts Humphrey",
        "src": "What university did Watts Humphrey attend?",
        "rephrase": "Where did Watts Humphrey study?",
        "alt": "Oxford",
        "answers": ["Illinois Institute of Technology"],
        "loc": "nq question: who played desmond doss father",
        "loc_ans": "Hugo Weaving",
    }
]
PUBLISHED = {"known_1000": KNOWN_1000, "counterfact": COUNTERFACT, "zsre": ZSRE}


def test_a_known_1000_file_gives_its_prompts_which_may_be_longer_than_its_templates(tmp_path: Path) -> None:
    first, second = load_facts(write_json(tmp_path / "file.json", KNOWN_1000))
    assert first == Fact("Vinson Massif", "{} is located in the continent of", "Antarctica", "P30")
    assert first.prompt == KNOWN_1000[0]["prompt"]
    # The template says which of the two is the subject.
    assert second.template == "In Rome, {} is the capital of"


def test_a_counterfact_file_gives_true_facts_once_with_all_templates_of_their_relation(tmp_path: Path) -> None:
    facts = load_facts(write_json(tmp_path / "file.json", COUNTERFACT))
    assert [(fact.subject, fact.prompt, fact.object) for fact in facts] == [
        ("France", "The capital of France is", "Paris"),
        ("Japan", "Japan, whose capital is", "Tokyo"),
        ("Louvre", "Louvre is in", "Paris"),
    ]
    assert facts[0].templates == facts[1].templates == ("The capital of {} is", "{}, whose capital is")
    assert facts[2].templates == ("{} is in",)


def test_a_zsre_file_gives_questions_with_their_first_answer(tmp_path: Path) -> None:
    (fact,) = load_facts(write_json(tmp_path / "file.json", ZSRE))
    assert fact == Fact("Watts Humphrey", "What university did {} attend?", "Illinois Institute of Technology")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("known_1000", {"attribute": ""}, "the field attribute is empty"),
        ("known_1000", {"prompt": "It is located in"}, "the subject 'Vinson Massif' is not in the prompt"),
        ("known_1000", {"known_id": 1}, "record 3: is a duplicate of record 2"),
        ("counterfact", {"requested_rewrite": {"subject": "Peru"}}, "the field requested_rewrite.prompt is missing"),
        ("counterfact", {"requested_rewrite": "Peru"}, "the field requested_rewrite.subject is missing"),
        ("counterfact", {"case_id": 3}, "record 5: is a duplicate of record 4"),
        ("zsre", {"answers": []}, "the field answers.0 is missing"),
        ("zsre", {"src": "Who?"}, "the subject 'Watts Humphrey' is not in the prompt"),
        ("zsre", {}, "record 2: is a duplicate of record 1"),
    ],
)
def test_a_bad_record_of_a_published_form_is_named(
    tmp_path: Path, name: str, change: dict[str, object], said: str
) -> None:
    records = PUBLISHED[name]
    with pytest.raises(ValueError, match=said):
        load_facts(write_json(tmp_path / "file.json", [*records, records[0] | change]))


def fill_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, n_good: int, n_bad: int) -> None:
    monkeypatch.setenv("ROME_LAB_CACHE", str(folder))
    records = [counterfact(i, f"Country {i}", "The capital of {} is", "Paris", "Rome") for i in range(n_good + n_bad)]
    for record in records[n_good:]:
        record["requested_rewrite"]["subject"] = ""
    (folder / "datasets").mkdir()
    write_json(folder / "datasets/counterfact.json", records)


def test_a_published_set_put_into_the_cache_by_hand_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_cache(tmp_path, monkeypatch, n_good=10, n_bad=0)
    assert len(load_facts("counterfact")) == 10


def test_up_to_one_in_a_hundred_bad_records_of_a_published_set_are_left_out_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill_cache(tmp_path, monkeypatch, n_good=198, n_bad=2)
    with caplog.at_level(logging.WARNING):
        facts = load_facts("counterfact")
    assert len(facts) == 198
    assert "2 of 200 records are at fault: record 199: the field requested_rewrite.subject is empty" in caplog.text


def test_more_than_one_in_a_hundred_bad_records_refuse_a_published_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(tmp_path, monkeypatch, n_good=197, n_bad=3)
    with pytest.raises(ValueError, match="3 of 200 records are at fault"):
        load_facts("counterfact")


def test_half_a_character_is_refused_where_it_stands(tmp_path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(r'[{"subject": "\ud83d\uddfc", "template": "{} is", "object": "x"}]')
    assert load_facts(path)[0].subject == "\N{TOKYO TOWER}", "two halves are a character"
    path.write_text(r'[{"subject": "Lima", "template": "{} is", "object": "\ud83d"}]')
    with pytest.raises(ValueError, match=r"facts\.json: record 1 holds half a character, .*d83d"):
        load_facts(path)
    with pytest.raises(ValueError, match=r"Fact: the object holds half a character"):
        Fact("Lima", "{} is", "\ud83d")


def test_a_name_that_no_file_can_have_is_no_file() -> None:
    with pytest.raises(FileNotFoundError, match="neither a data set"):
        load_facts("a" * 5000)


ROWS = [["Louvre", "Paris", "The {} is in, say,"], ["Colosseum", "Rome", "The {} stands in"]]
TABLES = {
    "semicolons": "Subject;Object;Template\n" + "".join(";".join(row) + "\n" for row in ROWS),
    "tabs": "subject\tobject\ttemplate\n" + "".join("\t".join(row) + "\n" for row in ROWS),
    "empty rows": "SUBJECT,object,template\n" + "".join('"{}","{}","{}"\n'.format(*row) for row in ROWS) + ",,\n , ,\n",
}


@pytest.mark.parametrize("kind", TABLES)
def test_the_tables_that_spreadsheets_write_are_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / "facts.csv").write_text(TABLES[kind], encoding="utf-8")
    assert [[x.subject, x.object, x.template] for x in load_facts(tmp_path / "facts.csv")] == ROWS


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json"])
def test_json_lines_are_read(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"subject": s, "object": o, "template": t}) for s, o, t in ROWS]
    (tmp_path / name).write_text("\n".join([*lines, ""]), encoding="utf-8")
    assert [[x.subject, x.object, x.template] for x in load_facts(tmp_path / name)] == ROWS


def test_a_single_line_is_a_record_too(tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").write_text(json.dumps({"subject": "Louvre", "object": "Paris", "template": "{} is in"}))
    assert load_facts(tmp_path / "facts.jsonl") == (Fact("Louvre", "{} is in", "Paris"),)


@pytest.mark.parametrize(
    "record",
    [
        {"subject": "Louvre", "prompt": "The Louvre is in", "attribute": "Paris"},  # known_1000 without its template
        {"subject": "Louvre", "prompt": "The Louvre is in", "target_new": "Rome", "ground_truth": "Paris"},
        {"subject": "Louvre", "prompt": "The Louvre is in", "target_new": "Rome", "ground_truth": ["Paris", "France"]},
    ],
)
def test_a_prompt_and_its_subject_suffice_in_the_forms_of_others(tmp_path: Path, record: dict) -> None:
    (tmp_path / "facts.json").write_text(json.dumps([record]), encoding="utf-8")
    assert load_facts(tmp_path / "facts.json") == (Fact("Louvre", "The {} is in", "Paris"),)
