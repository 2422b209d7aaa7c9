"""The logit lens: the model's own tail on every state, and its own answer at the last of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import family_model
from tiny import FAMILIES, known, talkative_model, tiny_model

from rome_lab import Fact, logit_lens, plots

PROMPT = "The Eiffel Tower is located in the city of"


def own_logits(lm, text):
    with torch.no_grad():
        return lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]])).logits[0].double()  # (T, V)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_last_layer_the_lens_is_the_model_at_every_token(family):
    lm = tiny_model(family)
    lens, logits = logit_lens(lm, PROMPT), own_logits(lm, PROMPT)
    answer = int(logits[-1].argmax())
    assert lens.answer == lm.tokenizer.decode([answer]) and lens.rank[-1, -1] == 1
    np.testing.assert_allclose(lens.p[:, -1], logits.softmax(-1)[:, answer].numpy(), rtol=2e-3, atol=1e-6)
    assert lens.top[:, -1].tolist() == [lm.tokenizer.decode([x]) for x in logits.argmax(-1).tolist()]
    assert lens.rank.shape == lens.p.shape == (len(lens.tokens), lm.n_layers)


@pytest.mark.parametrize("name", ["Falcon (new blocks)", "Granite (multipliers)"])
def test_families_that_are_found_read_by_their_own_forward(name):
    lm = family_model(name)
    lens, logits = logit_lens(lm, PROMPT), own_logits(lm, PROMPT)
    np.testing.assert_allclose(lens.p[:, -1], logits.softmax(-1)[:, int(logits[-1].argmax())].numpy(), atol=1e-9)


def test_states_in_the_middle_go_through_norm_and_output_embeddings():
    lm = tiny_model("gpt2")
    ids = torch.tensor([lm.tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        states = lm.model(ids, output_hidden_states=True).hidden_states  # number l is what block l was given
        p = lm.model.lm_head(lm.model.transformer.ln_f(torch.stack(states[1:-1]))).softmax(-1)[:, 0]  # (L - 1, T, V)
    lens = logit_lens(lm, PROMPT, answer="Rome")
    answer = lm.tokenizer(" Rome")["input_ids"][0]
    np.testing.assert_allclose(lens.p[:, :-1], p[..., answer].T.numpy(), rtol=1e-4, atol=1e-9)
    rank = 1 + (p > p[..., answer, None]).sum(-1)
    np.testing.assert_array_equal(lens.rank[:, :-1], rank.T.numpy())


def test_no_more_rows_are_read_together_than_a_large_vocabulary_allows(monkeypatch):
    lm = tiny_model("llama")
    lm.model.config.max_position_embeddings = 512
    rows, readout = [], lm.readout
    lm.__dict__["readout"] = lambda hidden: rows.append(len(hidden)) or readout(hidden)
    long = "The city of Paris is in France. " * 12
    lens = logit_lens(lm, long)
    assert len(lens.tokens) > 80 >= max(rows) and sum(rows) >= lens.rank.size


def test_a_facts_subject_is_marked_and_its_object_followed():
    lm = talkative_model()
    fact = known(lm)[0]
    lens = logit_lens(lm, fact)
    assert lens.answer.strip() == fact.object[: len(lens.answer.strip())]
    begin, end = lens.subject_range
    assert fact.subject in "".join(lens.tokens[begin:end])
    assert logit_lens(lm, fact.prompt).subject_range is None
    with pytest.raises(ValueError, match="does not know this fact"):
        logit_lens(lm, Fact(fact.subject, fact.template, "Zanzibar"))
    assert logit_lens(lm, Fact(fact.subject, fact.template, "Zanzibar"), answer="Zanzibar").rank[-1, -1] > 1


def test_the_first_layer_is_that_from_which_on_the_answer_stays_first():
    lm = tiny_model("llama")
    lens = logit_lens(lm, PROMPT)
    for ranks, first in (([5, 1, 2, 1], 3), ([1, 1, 1, 1], 0), ([3, 1, 1, 1], 1), ([1, 1, 1, 2], None)):
        lens.rank[-1] = ranks
        assert lens.first_layer == first
    assert "never first" in repr(lens)


@pytest.mark.parametrize("quantity", ["rank", "p"])
def test_the_lens_is_drawn_with_one_cell_a_state(quantity):
    lens = logit_lens(tiny_model("llama"), PROMPT, "Eiffel Tower")
    ax = plots.lens_heatmap(lens, quantity=quantity)
    (mesh,) = ax.collections
    np.testing.assert_allclose(mesh.get_array(), lens.rank if quantity == "rank" else lens.p)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert [x.endswith("*") for x in names].count(True) == np.ptp(lens.subject_range)


def test_bad_input_is_refused_in_one_sentence():
    lm = tiny_model("llama")
    cases = [
        (lambda: logit_lens(lm, "  "), "prompt is empty"),
        (lambda: logit_lens(lm, PROMPT, "Rome"), "'Rome' is not in the prompt"),
        (lambda: logit_lens(lm, PROMPT, answer=" "), "continuation is empty"),
        (lambda: logit_lens(tiny_model("gpt2"), "word " * 70), "reads at most 64"),
        (lambda: plots.lens_heatmap(logit_lens(lm, PROMPT), quantity="logit"), "quantity is 'logit'"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_embedded_model_knows_the_answer_before_its_last_layer(lm):
    lens = logit_lens(lm, PROMPT, "Eiffel Tower")
    assert lens.answer.strip() == "Paris" and lens.rank[-1, 0] > 100
    assert 15 < lens.first_layer < lm.n_layers
