"""The one scorer: its numbers are those of the model's own forward, and where memory runs out it halves its batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from test_memory import device_of, warnings
from tiny import FAMILIES, SIZE, known, talkative_model, tiny_model, tokenizer

from rome_lab.facts.completion import completions, known_among, object_token
from rome_lab.facts.fact import Fact
from rome_lab.models import scoring
from rome_lab.models.changes import Change
from rome_lab.models.language_model import LanguageModel
from rome_lab.models.sampling import generate
from rome_lab.models.scoring import (
    PASS,
    Question,
    by_shared_length,
    of_one_length,
    score,
    shared_contexts,
    shared_rows,
)

PAIRS = [
    ("The Eiffel Tower is in", "Paris"),
    ("The Eiffel Tower is in", "Rome, Italy"),
    ("Marie Curie was born in the city of", "Warsaw"),
    ("The capital of Japan is", "Tokyo"),
    ("Windows 95", "is developed by Microsoft"),
    ("The", "city"),
]


@torch.no_grad()
def by_forward(lm, question: Question) -> torch.Tensor:
    """(tokens of the continuation, V) log probabilities, by one forward of the model itself."""
    logits = lm.model(torch.tensor([[*question.context, *question.continuation[:-1]]])).logits[0]
    return logits[len(question.context) - 1 :].log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_those_of_the_model_s_own_forward(family: str) -> None:
    lm = tiny_model(family)
    for (prompt, text), answer in zip(PAIRS, completions(lm, PAIRS, "test", following=True), strict=True):
        ids = tuple(lm.tokenizer(prompt)["input_ids"])
        whole = tuple(lm.tokenizer(f"{prompt} {text}")["input_ids"])
        question = Question(0, ids, whole[len(ids) :])
        plain = by_forward(lm, question)
        wanted = plain[range(len(question.continuation)), list(question.continuation)]
        np.testing.assert_allclose(answer.log_p, wanted, atol=2e-4, rtol=1e-5)
        np.testing.assert_array_equal(answer.greedy, plain.argmax(-1) == torch.tensor(question.continuation))
        torch.testing.assert_close(answer.following, plain[0], atol=2e-4, rtol=1e-5)
        assert answer.p == pytest.approx(float(wanted.sum().exp()), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_contexts_that_go_on_in_several_ways_are_read_once_and_scored_as_the_model_s_own_forward_has_it(
    family: str, monkeypatch
) -> None:
    lm = tiny_model(family)
    torch.manual_seed(1)
    contexts = [tuple(range(3, 3 + length)) for length in (2, 9, 9, 12)]
    contexts[2] = contexts[2][::-1]
    endings = [(5,), (5, 6), (5, 7, 8), (9, 3, 4, 6), (9,), (4, 4)]
    questions = [Question(owner, context, end) for owner in (0, 1) for context in contexts for end in endings]
    questions.append(Question(0, contexts[3][:4], contexts[3][4:6]))  # within what others share
    passes, run = [], scoring.last_states
    monkeypatch.setattr(scoring, "last_states", lambda *args: passes.append(args[3]) or run(*args))
    changes = [Change(), Change(1, 0.1 * torch.randn(lm.weight(1).shape))]
    answers = score(lm, changes, questions, following=True)
    assert {9, 12} <= set(passes) and 0 in passes  # what is read once, and what would not be worth it
    for question, answer in zip(questions, answers, strict=True):
        with changes[question.owner].applied(lm) as changed:
            plain = by_forward(changed, question)
        expected = plain[range(len(question.continuation)), list(question.continuation)]
        np.testing.assert_allclose(answer.log_p, expected, atol=2e-4, rtol=1e-5)
        np.testing.assert_array_equal(answer.greedy, plain.argmax(-1) == torch.tensor(question.continuation))
        torch.testing.assert_close(answer.following, plain[0], atol=2e-4, rtol=1e-5)


def test_contexts_are_read_apart_only_where_that_saves_more_than_a_pass_costs() -> None:
    long, short = tuple(range(PASS)), (1, 2)
    questions = [
        Question(owner, context, end) for owner in (0, 1) for context in (long, short) for end in ((7, 8), (9, 8))
    ]
    questions += [Question(1, long + (3,), (4,)), Question(1, long[:-3], long[-3:])]
    rows, row_of = shared_rows(questions)
    shared = shared_contexts(questions, row_of)
    assert {rows[row][1][:length] for row, length in shared.items()} == {long, short}
    groups = by_shared_length(rows, shared)
    assert sorted(row for some in groups.values() for row in some) == list(range(len(rows)))
    assert {rows[row] for row in groups[PASS]} == {(owner, long + (end,)) for owner in (0, 1) for end in (7, 9)}
    assert PASS in groups and len(short) not in groups


@pytest.mark.parametrize("seed", range(5))
def test_groups_hold_every_row_once_and_little_padding(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 200, 40)
    rows = [(number % 3, (number,) * int(length)) for number, length in enumerate(lengths)]
    groups = list(of_one_length(rows, range(0, 40, 2)))
    assert sorted(row for group in groups for row in group) == list(range(0, 40, 2))
    for group in groups:
        texts = [len(rows[row][1]) for row in group]
        assert sum(max(texts) - length for length in texts) <= PASS
        assert [rows[row][0] for row in group] == sorted(rows[row][0] for row in group)


@pytest.mark.parametrize("most", [1, 2])
def test_completions_stay_the_same_where_memory_runs_out(most: int, caplog) -> None:
    lm = tiny_model("gpt2")
    whole = completions(lm, PAIRS, "audit", following=True)
    with device_of(lm, most) as seen:
        halved = completions(lm, PAIRS, "audit", following=True)
    for one, other in zip(whole, halved, strict=True):
        np.testing.assert_allclose(one.log_p, other.log_p, atol=1e-4)
        np.testing.assert_array_equal(one.greedy, other.greedy)
        torch.testing.assert_close(one.following, other.following, atol=1e-4, rtol=1e-5)
    assert min(seen) <= most
    assert [message.partition(":")[0] for message in warnings(caplog)] == ["audit"]


def test_the_distribution_behind_a_text_is_kept_only_where_it_is_asked_for() -> None:
    lm = tiny_model("llama")
    assert all(answer.following is None for answer in completions(lm, PAIRS, "test"))
    assert completions(lm, [], "test", following=True) == []
    assert score(lm, [Change()], [], following=True) == []


def test_a_fact_is_known_where_the_first_token_of_its_object_comes_next() -> None:
    lm = talkative_model()
    facts = known(lm)
    others = [replace(fact, object="Zanzibar") for fact in facts]
    assert facts and known_among(lm, [*others, *facts], "test") == facts
    for fact in facts:
        ids = tuple(lm.tokenizer(fact.prompt)["input_ids"])
        assert object_token(lm, fact) == int(by_forward(lm, Question(0, ids, (5,)))[0].argmax())


def test_what_is_not_a_number_or_too_long_is_refused_in_the_words_of_who_asks() -> None:
    lm = tiny_model("gpt2")
    with pytest.raises(ValueError, match=r"audit: \d+ tokens are more than the 64 of tiny-gpt2; shorten it\."):
        completions(lm, [("very " * 70, "long")], "audit")
    with torch.no_grad():
        lm.memory(0).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="tiny-gpt2 gives what is not a number"):
        completions(lm, PAIRS, "audit")


@pytest.mark.parametrize("family", ["Granite", "Cohere"])
def test_models_that_scale_their_logits_are_scored_as_their_own_forward_has_it(family: str) -> None:
    scale = {"Granite": {"logits_scaling": 8.0}, "Cohere": {"logit_scale": 0.0625}}[family]
    config = getattr(tf, f"{family}Config")(**SIZE, intermediate_size=48, max_position_embeddings=64, **scale)
    torch.manual_seed(0)
    model = getattr(tf, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(200)  # so that another scale gives other probabilities
    lm = LanguageModel(model, tokenizer(), name=family)
    (answer,) = completions(lm, PAIRS[:1], "test", following=True)
    ids = torch.tensor([lm.tokenizer(PAIRS[0][0])["input_ids"]])
    with torch.no_grad():
        plain = lm.model(ids).logits[0, -1]
    torch.testing.assert_close(answer.following, plain.log_softmax(-1), atol=2e-4, rtol=1e-5)


def test_an_object_too_long_to_be_read_is_no_reason_to_refuse_its_prompt() -> None:
    lm = talkative_model()
    fact = known(lm)[0]
    long = Fact("Paris", fact.template, "Rome " * 60 + "Rome")
    assert known_among(lm, [long, fact], "test")[-1] == fact


def test_prompts_that_are_not_a_list_for_each_change_are_refused() -> None:
    for changes, prompts in ([Change()], ["Paris"]), ([Change(), Change()], [["Paris"]]):
        with pytest.raises(ValueError, match="need as many lists of prompts"):
            generate(tiny_model("llama"), changes, prompts)
