"""Finding the subject's tokens, and the tokens with which a prompt goes on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import tiny_model
from tokenizers import Tokenizer, normalizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from rome_lab import Fact
from rome_lab.facts.prompts import continuation_ids, find_subject, question, read_prompt


def subject_text(lm, prompt, subject):
    """The subject's tokens, decoded together."""
    read = read_prompt(lm, prompt, subject)
    begin, end = read.subject_range
    return lm.tokenizer.decode(read.ids[begin:end].tolist())


@pytest.mark.parametrize(
    "subject",
    [
        "Beyoncé",
        "東京タワー",
        "🗼 tower 🙂",
        "O'Neill's",
        "New  York",
        "{}",
        "{name}",
        '"Heroes"',
        "São Paulo",
        "naïve",
    ],
)
@pytest.mark.parametrize("template", ["{} is in", "In {}", "They said that {} was born in", "“{}” is a work by"])
def test_subject_tokens_are_those_that_hold_its_characters(lm, subject, template):
    before, _, after = template.partition("{}")
    prompt = before + subject + after
    assert subject in subject_text(lm, prompt, subject)
    assert subject in subject_text(lm, Fact(subject, template, "Paris"), None)
    begin, end = read_prompt(lm, prompt, subject).subject_range
    ids = read_prompt(lm, prompt, subject).ids.tolist()
    # No token too many: without its outer tokens the range no longer spells the subject.
    assert subject not in lm.tokenizer.decode(ids[begin + 1 : end])
    assert subject not in lm.tokenizer.decode(ids[begin : end - 1])


@given(st.text(max_size=5), st.text(min_size=1, max_size=5), st.text(max_size=5))
def test_any_unicode_subject_is_found(before, subject, after):
    assume(subject.strip())
    lm = tiny_model("llama")
    fact = Fact(subject.strip(), before.replace("{}", "") + "{}" + after, "Paris")
    begin, end = read_prompt(lm, fact).subject_range
    text = lm.tokenizer.decode(read_prompt(lm, fact).ids[begin:end].tolist())
    assert subject.strip() in text


def test_special_tokens_do_not_shift_the_subject():
    lm = tiny_model("llama")
    plain = read_prompt(lm, "The Eiffel Tower is", "Eiffel Tower")
    tokenizer = lm.tokenizer
    from tokenizers.processors import TemplateProcessing

    before = tokenizer._tokenizer.post_processor
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    try:
        with_bos = read_prompt(lm, "The Eiffel Tower is", "Eiffel Tower")
        assert with_bos.ids[0] == 0
        assert with_bos.subject_range == tuple(i + 1 for i in plain.subject_range)
        assert 0 not in continuation_ids(lm, "The Eiffel Tower is", "in Paris")
    finally:
        tokenizer._tokenizer.post_processor = before


def test_of_several_occurrences_the_first_whole_word_counts():
    assert find_subject("The artist made art and art", "art") == 16
    assert find_subject("Partisan", "art") == 1


def test_a_fact_says_itself_which_occurrence_is_its_subject(lm):
    fact = Fact("Paris", "Paris Hilton never lived in {} or", "London")
    read = read_prompt(lm, fact)
    assert lm.tokenizer.decode(read.ids[: read.subject_range[0]].tolist()) == "Paris Hilton never lived in"


@pytest.mark.parametrize("target", ["Rome", "New York City", "東京"])
def test_the_continuation_spells_the_target(lm, target):
    prompt = "The Eiffel Tower is located in the city of"
    ids = lm.tokenizer(prompt)["input_ids"] + continuation_ids(lm, prompt, target)
    assert lm.tokenizer.decode(ids) == f"{prompt} {target}"


@pytest.mark.parametrize("end", [" ", "  ", "\u00a0"])
def test_a_blank_at_the_end_of_a_prompt_belongs_to_the_word_that_follows(end):
    """However it is handed over: what is read, what follows, and how probable that is are those without the blank."""
    lm = tiny_model("llama")
    plain, blank = Fact("Rome", "The city of {} is in", "Italy"), Fact("Rome", "The city of {} is in" + end, "Italy")
    assert blank == plain
    for prompt in (blank, plain.prompt + end):
        read = read_prompt(lm, prompt, "Rome")
        assert read.text == plain.prompt and torch.equal(read.ids, read_prompt(lm, plain).ids)
    assert continuation_ids(lm, plain.prompt + end, "Italy") == continuation_ids(lm, plain.prompt, "Italy")
    assert question(lm, 0, plain.prompt + end, "Italy") == question(lm, 0, plain.prompt, "Italy")


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [
        ("法国的首都是", "巴黎", "法国的首都是巴黎"),
        ("the place called “", "Rome", "the place called “Rome"),
        ("the Franco-", "Prussian", "the Franco-Prussian"),
        ("the city of", "Rome", "the city of Rome"),
        ("the city of ", "Rome", "the city of Rome"),
        ("It is:\n", "Rome", "It is:\nRome"),
    ],
)
def test_a_prompt_goes_on_as_it_would_be_written(prompt, target, text):
    lm = tiny_model("llama")
    asked = question(lm, 0, prompt, target)
    assert lm.tokenizer.decode([*asked.context, *asked.continuation]) == text


def test_a_blank_that_the_tokenizer_puts_before_a_text_is_no_token_of_its_subject() -> None:
    raw = Tokenizer(tokenizer_models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<s>"], show_progress=False)
    raw.train_from_iterator(["Paris is a city in France", "a\u5317x a\u4eacx"], trainer)
    lm = tiny_model("llama")
    lm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    subject = "\u5317\u4eac"
    prompts = [read_prompt(lm, text, subject) for text in (f"{subject} is a", f"a city {subject} is")]
    parts = [lm.tokenizer.convert_ids_to_tokens(x.ids.tolist())[slice(*x.subject_range)] for x in prompts]
    assert parts[0][0] != "\u2581" and "".join(parts[0]) == subject
    assert "".join(parts[1]).replace("\u2581", "") == subject


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="the prompt '' has no tokens for tiny-llama"):
        question(tiny_model("llama"), 0, "", "Paris")
