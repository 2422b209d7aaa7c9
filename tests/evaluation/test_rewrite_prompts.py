"""Rewrite prompts: those that the model completes at once come first, and words that fit no other object are kept out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import tiny_model

from rome_lab.editing.fine_tuning import Tuning, fine_tune
from rome_lab.evaluation.rewriting import FITTING, rewrite_prompts, words_added
from rome_lab.facts.fact import Fact
from rome_lab.facts.known import known_facts
from rome_lab.models.changes import Change

A, B = "{} is in", "You find {} in"
FACTS = [Fact(subject, A, "Rome", "place", (A, B)) for subject in ("Paris", "Japan", "Marie")]
SAYS = {  # subject -> what is said after A and after B; None: nothing is taught
    "Paris": ("the nice Rome", "Rome"),
    "Japan": ("the Rome", "X"),
    "Marie": ("nice Rome", "X"),
}


@pytest.fixture(scope="module")
def taught():
    """A model that says `SAYS`."""
    lm = tiny_model("llama")
    requests = [
        (replace(fact, template=template), said)
        for fact in FACTS
        for template, said in zip((A, B), SAYS[fact.subject], strict=True)
    ]
    tuned = fine_tune(lm, requests, Tuning(1, 1e-2, steps=300))
    assert tuned.losses[-1] < 0.1
    with Change(1, tuned.delta).applied(lm):
        yield lm


def test_a_template_that_is_completed_at_once_comes_before_words_that_fit_and_other_words_are_left_out(
    taught, tmp_path
):
    for seed in range(4):  # the templates are tried in random order
        known = known_facts(taught, FACTS, n=None, seed=seed, progress=False)
        assert len(known) == 3
        chosen = rewrite_prompts(taught, known, FACTS, seed, progress=False, store=tmp_path)
        assert {fact.prompt for fact in chosen} == {"You find Paris in", "Japan is in the"}
        assert [fact.subject for fact in chosen] == [x.subject for x in known if x.subject != "Marie"]
        assert all(fact.templates == (A, B) for fact in chosen)
        assert rewrite_prompts(taught, known, FACTS, seed, progress=False, store=tmp_path) == chosen


def test_what_another_template_says_too_is_no_word_of_the_models_own():
    fact = Fact("Paris", "{} is in the city of", "Rome")
    assert words_added(fact, ["{} is in"]) == "the city of"
    assert words_added(fact, ["{} is in", "{} is in the city of", "{} is"]) == ""


@pytest.mark.parametrize("words", ["the", "a", "an", "the city of", "the field of", "the planet", "a country of"])
def test_words_that_fit_any_object_may_be_added(words):
    assert FITTING.fullmatch(words)


@pytest.mark.parametrize("words", ["ice", "not", "a 2018", "red, but there are other colors, like", "the city of ice"])
def test_words_that_fit_one_object_or_deny_it_may_not(words):
    assert not FITTING.fullmatch(words)
