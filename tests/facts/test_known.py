"""Known facts: what the model says decides, whatever the batch, the order and the seed; a slow plain loop agrees."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import judge_by_search, plain_known_fact
from tiny import FAMILIES, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rome_lab.facts.completion import Outcome, Text, go_on, outcome_of_text
from rome_lab.facts.fact import Fact
from rome_lab.facts.known import facts_said_at_once, known_facts, templates_in_order
from rome_lab.facts.prompts import continuation_ids
from rome_lab.facts.sources import load_facts
from rome_lab.models.language_model import LanguageModel

# What a text says


@pytest.mark.parametrize(
    ("said", "answer", "outcome"),
    [
        (" Paris, the", "Paris", Outcome.KNOWN),
        (" the large city of Paris.", "Paris", Outcome.KNOWN),
        (" Paris's", "Paris", Outcome.KNOWN),
        (" _Paris_", "Paris", Outcome.KNOWN),
        (" Parisian", "Paris", Outcome.OTHER_WORD),
        (" Rome, not Paris.", "Paris", Outcome.OTHER_WORD),
        (" The city of Paris.", "Paris", Outcome.OTHER_WORD),
        (" PARIS.", "Paris", Outcome.OTHER_WORD),
        (" paris.", "Paris", None),
        (" Buenos Aires,", "Buenos Aires", Outcome.KNOWN),
        (" Buenos Noches,", "Buenos Aires", Outcome.OTHER_WORD),
        (" New Jersey", "New York", Outcome.OTHER_WORD),
        (" New York", "York", Outcome.OTHER_WORD),
        (" a violin.", "violin", Outcome.KNOWN),
        (" Violin.", "violin", Outcome.OTHER_WORD),
        (" a Violinist", "violin", Outcome.OTHER_WORD),
        (" a violinist.", "violin", None),
        (" in 1920 an École", "Paris", Outcome.OTHER_WORD),
        (" Yahoo! and", "Yahoo!", Outcome.KNOWN),
        (" O'Neill.", "O'Neill", Outcome.KNOWN),
        # Scripts without blanks.
        ("是巴黎市。", "巴黎", Outcome.KNOWN),
        ("是柏林。", "巴黎", None),
        # The last word may be incomplete.
        (" Paris", "Paris", None),
        (" Buenos", "Buenos Aires", None),
        # What denies the fact does not state it.
        (" not Paris.", "Paris", Outcome.DENIED),
        (" never, or hardly ever, Paris.", "Paris", Outcome.DENIED),
        (" in a city which isn’t Paris.", "Paris", Outcome.DENIED),
        (" a knot in the nose, Paris.", "Paris", Outcome.KNOWN),
        (" Paris, not Rome.", "Paris", Outcome.KNOWN),
        (" not Rome but Paris.", "Paris", Outcome.OTHER_WORD),
        (" P", "Paris", None),
        (" B", "Paris", Outcome.OTHER_WORD),
        ("", "Paris", None),
        # The prompt's own last word is not part of what follows.
        ("Paris", "Paris", None),
        ("Noble of Paris.", "Paris", Outcome.KNOWN),
    ],
)
def test_the_first_capitalised_word_decides(said: str, answer: str, outcome: Outcome | None) -> None:
    prompt = "Of The Capital it is said"
    found, place = outcome_of_text(prompt + said, len(prompt), answer, complete=False)
    assert found is outcome
    if outcome is Outcome.KNOWN:
        assert (prompt + said).startswith(answer, place)


def test_at_its_end_a_text_is_judged_as_it_stands() -> None:
    assert outcome_of_text("It is Paris", 5, "Paris", complete=True) == (Outcome.KNOWN, 6)
    assert outcome_of_text("It is Buenos", 5, "Buenos Aires", complete=True) == (Outcome.OTHER_WORD, 6)
    assert outcome_of_text("It is not known", 5, "Paris", complete=True) == (Outcome.NOT_NAMED, 15)


WORDS = ["Paris", "Par", "is", "ian", " ", " the ", " not ", " isn't ", "New ", "York"]
SAID = st.lists(st.sampled_from([*WORDS, ". ", "'s", "_", "\n", "é", "東", "3"]), max_size=8).map("".join)


@given(said=SAID, answer=st.sampled_from(["Paris", "New York", "the", "the York"]))
def test_a_whole_text_is_judged_as_a_search_for_the_words_judges_it(said: str, answer: str) -> None:
    outcome, place = outcome_of_text("It is" + said, 5, answer, complete=True)
    expected, where = judge_by_search("It is" + said, 5, answer)
    assert outcome is expected
    assert place == where or where is None


@given(said=SAID, answer=st.sampled_from(["Paris", "New York", "the", "the York"]))
def test_what_is_decided_stays_decided_when_the_text_grows(said: str, answer: str) -> None:
    text = "It is" + said
    whole = outcome_of_text(text, 5, answer, complete=True)
    for end in range(5, len(text)):
        early = outcome_of_text(text[:end], 5, answer, complete=False)
        assert early[0] is None or early == whole


# A model that has learnt a few sentences by heart

CAPITAL, SEAT, COLOUR = "The capital of {} is", "{} has its seat of government in", "The colour of {} is"
LINE = "The capital of {}:\n"  # a line break is part of the prompt
LESSONS = {
    ("France", CAPITAL): " Paris, a large town.",
    ("Japan", CAPITAL): " the busy city of Tokyo.",
    ("Argentina", CAPITAL): " Buenos Aires.",
    ("Iceland", CAPITAL): " little Reykjavík, by the sea.",
    ("Norway", CAPITAL): " Oslo",
    ("Spain", CAPITAL): " Rome.",
    ("Spain", SEAT): " Madrid.",
    ("Italy", CAPITAL): " Romeo and the rest.",
    ("Kenya", CAPITAL): " *Nairobi*.",
    ("Chile", CAPITAL): " not known.",
    ("Cuba", CAPITAL): " not Havana.",
    (
        "Peru",
        CAPITAL,
    ): " a town by the sea that nobody could ever find on a map or by walking along the coast of the sea.",
    ("{x}", CAPITAL): " {} City, or Sand.",
    ("{y}", CAPITAL): " called {}, near Sand.",
    ("grass", COLOUR): " a bright green.",
    ("snow", COLOUR): " White.",
    ("Egypt", LINE): "Cairo.",
}
OBJECTS = {
    "France": "Paris", "Japan": "Tokyo", "Argentina": "Buenos Aires", "Iceland": "Reykjavík", "Norway": "Oslo",
    "Spain": "Madrid", "Italy": "Rome", "Kenya": "Nairobi", "Chile": "Santiago", "Cuba": "Havana", "Peru": "Lima",
    "{x}": "Sand", "{y}": "Sand", "grass": "green", "snow": "white",
    "Egypt": "Cairo",
}  # fmt: skip
KNOWN = {
    "France": "The capital of France is",
    "Japan": "The capital of Japan is the busy city of",
    "Argentina": "The capital of Argentina is",
    "Iceland": "The capital of Iceland is little",
    "Norway": "The capital of Norway is",
    "Spain": "Spain has its seat of government in",
    "{y}": "The capital of {y} is called {}, near",
    "grass": "The colour of grass is a bright",
    "Egypt": "The capital of Egypt:\n",
}


def as_fact(subject: str) -> Fact:
    templates = tuple(template for name, template in LESSONS if name == subject)
    return Fact(subject, templates[0], OBJECTS[subject], "lesson", templates)


FACTS = [as_fact(subject) for subject in OBJECTS]


def learner_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=["<e>"], show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>", pad_token="<e>")


@pytest.fixture(scope="module")
def learner() -> LanguageModel:
    """A tiny Llama that says `LESSONS`."""
    prompts = [Fact(subject, template, "x").prompt for subject, template in LESSONS]
    texts = [prompt + said for prompt, said in zip(prompts, LESSONS.values(), strict=True)]
    tokenizer = learner_tokenizer(texts)
    batch = tokenizer([text + "<e>" for text in texts], return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(tokenizer(prompt)["input_ids"])] = -100
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, max_position_embeddings=128, **sizes)
    model = LlamaForCausalLM(config).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(400):
        loss = model(**batch, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss < 0.01:
            break
    return LanguageModel(model, tokenizer, name="learner")


def search(lm: LanguageModel, facts: list[Fact], **options: object):
    return known_facts(lm, facts, **{"n": None, "progress": False, **options})


def test_the_model_has_learnt_its_lessons(learner: LanguageModel) -> None:
    for (subject, template), said in LESSONS.items():
        ids = learner.tokenizer(Fact(subject, template, "x").prompt, return_tensors="pt")
        whole = learner.model.generate(**ids, max_new_tokens=60, do_sample=False)[0]
        assert learner.tokenizer.decode(whole, skip_special_tokens=True).endswith(template.split("{}")[-1] + said)


def test_the_known_facts_are_those_that_the_model_says_with_the_prompts_it_says_them_after(
    learner: LanguageModel,
) -> None:
    known = search(learner, FACTS)
    assert {fact.subject: fact.prompt for fact in known} == KNOWN
    for fact in known:
        assert (fact.object, fact.relation) == (OBJECTS[fact.subject], "lesson")
        assert fact.templates == as_fact(fact.subject).templates
        assert fact.prompt[slice(*fact.subject_span)] == fact.subject


def test_the_report_counts_every_fact_and_every_prompt_once(learner: LanguageModel) -> None:
    report = search(learner, FACTS).report
    assert (report.tried, report.kept, report.own_words) == (16, 9, 4)  # Japan, Iceland, {y}, grass
    assert report.dropped == {
        Outcome.OTHER_WORD: 3,  # Italy, {x}, snow
        Outcome.OTHER_TOKEN: 1,  # Kenya
        Outcome.DENIED: 1,  # Cuba
        Outcome.NOT_NAMED: 2,  # Chile, Peru
    }
    spain_first = templates_in_order(as_fact("Spain"), 0)[0] == CAPITAL
    assert report.prompts == report.dropped | {Outcome.KNOWN: 9, Outcome.OTHER_WORD: 3 + spain_first}
    assert report.table()["facts"].sum() == report.tried
    assert report.table()["prompts"].sum() == 16 + spain_first
    assert str(report).startswith("9 of 16 facts tried are known")
    assert "4 at prompts that hold words of the model's own; " in str(report)


def test_the_result_is_a_sequence_and_a_table(learner: LanguageModel) -> None:
    known = search(learner, FACTS)
    assert len(known) == len(list(known)) == 9
    assert known[0] in known
    assert known[:2] == tuple(known)[:2]
    assert "9 of 16 facts" in str(known)
    expected = pd.DataFrame([{"subject": x.subject, "prompt": x.prompt, "object": x.object} for x in known])
    pd.testing.assert_frame_equal(known.table()[["subject", "prompt", "object"]], expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_the_batch_size_changes_nothing(learner: LanguageModel, batch_size: int) -> None:
    assert search(learner, FACTS, batch_size=batch_size) == search(learner, FACTS)
    assert search(learner, FACTS, batch_size=batch_size, n=3) == search(learner, FACTS, n=3)


def test_neither_the_order_of_the_facts_nor_repetition_changes_anything(learner: LanguageModel) -> None:
    assert search(learner, FACTS[::-1] + FACTS) == search(learner, FACTS)


def test_a_smaller_sample_is_the_beginning_of_a_larger_one(learner: LanguageModel) -> None:
    every = search(learner, FACTS)
    for n in range(1, 10):
        sample = search(learner, FACTS, n=n, batch_size=1)
        assert sample.facts == every.facts[:n]
        assert sample.report.kept == n
        assert sample.report.tried == n + sum(sample.report.dropped.values())
        assert sample.report.own_words == sum(fact.template not in fact.templates for fact in sample)


def test_the_seed_chooses_the_sample(learner: LanguageModel) -> None:
    samples = {search(learner, FACTS, n=3, seed=seed).facts for seed in range(6)}
    assert len(samples) > 1
    assert {fact.subject for sample in samples for fact in sample} <= set(KNOWN)


def test_every_template_is_the_first_to_be_tried_equally_often() -> None:
    templates = tuple("abcd{}"[i:] for i in range(4))
    facts = [Fact(f"s{i}", "{}", "x", templates=templates) for i in range(1000)]
    counts = Counter(templates_in_order(fact, 0)[0] for fact in facts)
    assert set(counts) == set(templates)
    assert all(200 < count < 300 for count in counts.values())  # 250, and 3.6 standard deviations
    assert all(sorted(templates_in_order(fact, 0)) == sorted(templates) for fact in facts)


def test_a_fact_without_a_list_of_templates_is_asked_for_with_its_own(learner: LanguageModel) -> None:
    spain = Fact("Spain", SEAT, "Madrid")
    assert search(learner, [spain]).facts == (spain,)


def test_the_limit_counts_tokens_of_what_the_model_says(learner: LanguageModel) -> None:
    japan = Fact("Japan", CAPITAL, "Tokyo")
    needed = len(learner.tokenizer(" the busy city of Tokyo.", add_special_tokens=False)["input_ids"])
    assert len(search(learner, [japan], max_new_tokens=needed)) == 1
    late = search(learner, [japan], max_new_tokens=needed - 1)
    assert late.report.dropped == {Outcome.NOT_NAMED: 1}


def test_a_prompt_that_leaves_no_room_to_go_on_is_dropped_with_the_reason(learner: LanguageModel) -> None:
    long = Fact("France", "so " * 130 + "The capital of {} is", "Paris")
    report = search(learner, [long, as_fact("Japan")]).report
    assert report.dropped == {Outcome.TOO_LONG: 1}
    assert report.kept == 1


def test_asking_for_more_than_is_known_gives_all_and_says_so(
    learner: LanguageModel, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for _ in ("searched", "found in the store"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            known = search(learner, FACTS, n=50, store=tmp_path)
        assert known == search(learner, FACTS)
        assert "50 facts were asked for, but of the 16 given learner knows 9" in caplog.text


def test_a_model_that_knows_nothing_gives_an_empty_result_and_says_so(
    learner: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        known = search(learner, [as_fact("Peru"), as_fact("Italy")])
    assert len(known) == 0
    assert known.report.tried == 2
    assert "learner knows 0" in caplog.text


@pytest.mark.parametrize("bad", [{"n": 0}, {"n": 2.5}, {"max_new_tokens": 0}, {"batch_size": 0}, {"batch_size": None}])
def test_a_number_without_sense_is_refused(learner: LanguageModel, bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*; expected a whole number"):
        search(learner, FACTS, **bad)


def test_no_facts_at_all_are_refused(learner: LanguageModel) -> None:
    with pytest.raises(ValueError, match="there are no facts"):
        search(learner, [])


def test_weights_that_are_not_numbers_are_named() -> None:
    lm = tiny_model("llama")
    with torch.no_grad():
        lm.memory(1).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        search(lm, FACTS)


# The slow way


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_go_on_together_as_they_do_alone_in_every_family(family: str, batch_size: int) -> None:
    lm, limit = tiny_model(family), 10
    starts = ["{} is", "The {} is in the city of", "We say that {} was born in"]
    facts = [Fact("Rome " * (i % 5) + "Paris", starts[i % 3], f"no such word {i}") for i in range(15)]
    texts = [Text(lm, fact, lm.stops, limit) for fact in facts]
    assert len({len(text.ids) for text in texts}) > 8
    go_on(lm, texts, batch_size)
    for text in texts:
        ids = torch.tensor([text.ids])
        alone = lm.model.generate(ids, attention_mask=ids == ids, max_new_tokens=limit, do_sample=False, pad_token_id=1)
        assert text.new == alone[0, ids.shape[1] :].tolist()[: len(text.new)]
        assert text.outcome in (Outcome.OTHER_WORD, Outcome.NOT_NAMED)
        assert text.outcome is Outcome.OTHER_WORD or len(text.new) == limit or text.new[-1] in lm.stops


def test_a_plain_loop_over_single_prompts_finds_the_same_for_the_learner(learner: LanguageModel) -> None:
    expected = {x for x in (plain_known_fact(learner, fact, seed=3, limit=16) for fact in FACTS) if x}
    assert len(expected) == 9
    assert set(search(learner, FACTS, seed=3)) == expected


def test_a_plain_loop_over_single_prompts_finds_the_same_for_the_embedded_model(lm: LanguageModel) -> None:
    templates = ("The city of {} belongs to the country of", "People who live in {} speak")
    cities = {"Naples": "Italy", "Lyon": "French", "Sapporo": "Japan", "Bath": "Iceland", "Oslo": "Norwegian"}
    facts = [Fact(city, templates[0], said, templates=templates) for city, said in cities.items()]
    expected = {x for x in (plain_known_fact(lm, fact, seed=0, limit=8) for fact in facts) if x}
    assert 0 < len(expected) < len(facts)
    assert set(search(lm, facts, max_new_tokens=8)) == expected


def test_a_known_fact_can_be_written_down_and_read_again(learner: LanguageModel, tmp_path) -> None:
    known = search(learner, FACTS)
    keys = ("subject", "template", "object", "relation")
    path = tmp_path / "known.json"
    path.write_text(json.dumps([{key: getattr(fact, key) for key in keys} for fact in known]), encoding="utf-8")
    assert [fact.prompt for fact in load_facts(path)] == [fact.prompt for fact in known]


def test_a_search_is_found_again_in_the_store(tmp_path):
    lm = tiny_model("llama")
    facts = [Fact(subject, "{} is in", "the") for subject in ("Paris", "Rome", "Tokyo")]
    found = known_facts(lm, facts, n=None, progress=False, store=tmp_path)
    (file,) = tmp_path.glob("known/*")
    before = file.stat().st_mtime_ns
    again = known_facts(lm, facts, n=None, progress=False, store=tmp_path)
    assert again == found
    assert again.report.table().equals(found.report.table())
    assert file.stat().st_mtime_ns == before
    known_facts(lm, facts, n=None, seed=1, progress=False, store=tmp_path)
    assert len(list(tmp_path.glob("known/*"))) == 2


def test_facts_that_come_to_the_same_prompt_count_once():
    """A template that is the beginning of another may be completed to it."""
    from rome_lab.facts.known import Trial, drop_repeated

    fact = Fact("France", "The capital of {} is", "Paris")
    trials = [Trial(fact, [fact.template], [Outcome.KNOWN], fact) for _ in range(2)]
    drop_repeated(trials)
    assert [trial.known for trial in trials] == [fact, None]
    assert trials[1].outcomes == [Outcome.REPEATED]


def test_another_tokenizer_is_another_search(tmp_path):
    lm = tiny_model("llama")
    before = lm.identity().key()
    lm.tokenizer.backend_tokenizer.add_tokens(["Zanzibar"])
    try:
        assert lm.identity().key() != before
    finally:
        import tiny

        tiny.tokenizer.cache_clear()


# Facts said at once


@torch.no_grad()
def says_at_once(lm, fact):
    """The slow way: one forward."""
    prompt, answer = lm.tokenizer(fact.prompt)["input_ids"], continuation_ids(lm, fact.prompt, fact.object)
    best = lm.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(-1)
    return best.tolist() == answer


def test_facts_said_at_once_are_those_whose_object_comes_first_after_one_template(learner, tmp_path, monkeypatch):
    several = range(4)
    said = [facts_said_at_once(learner, FACTS, len(FACTS), seed, progress=False, store=tmp_path) for seed in several]
    for seed, facts in zip(several, said, strict=True):
        tried = [replace(fact, template=templates_in_order(fact, seed)[0]) for fact in FACTS]
        assert set(facts) == {fact for fact in tried if says_at_once(learner, fact)}
        assert facts_said_at_once(learner, FACTS[::-1], 2, seed, progress=False) == facts[:2]  # whatever their order
    # Tokens count, not words: Rome is the beginning of Romeo.
    assert {fact.subject for facts in said for fact in facts} == {
        "France",
        "Argentina",
        "Norway",
        "Spain",
        "Italy",
        "Egypt",
    }
    assert len(set(said)) > 1
    monkeypatch.setattr("rome_lab.facts.known.answers_of", None)
    assert facts_said_at_once(learner, FACTS, len(FACTS), progress=False, store=tmp_path) == said[0]
