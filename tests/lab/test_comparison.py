"""The questions asked about an edit are the right ones, and the answers are the model's own."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from test_editing import FACT, FEW, OTHER
from tiny import FAMILIES, tiny_model

from rome_lab.facts.completion import completions, known_among
from rome_lab.facts.fact import Fact
from rome_lab.facts.prompts import continuation_ids
from rome_lab.facts.sources import load_facts
from rome_lab.lab.looks import (
    CONTINUATION_LENGTH,
    CONTINUATIONS,
    Probe,
    look_at,
    probe_of,
)
from rome_lab.lab.page import compared_page
from rome_lab.lab.trials import EditRequest, for_people, make_edit, ten_facts, try_edit, try_facts
from rome_lab.lab.typed_facts import best_known, fact_of
from rome_lab.models.batching import Batching
from rome_lab.models.language_model import LanguageModel

REQUEST = EditRequest(FACT, "Rome", 1, FEW, tokens=256)


def model_of_long_texts() -> LanguageModel:
    """A tiny model that reads the embedded facts' prompts, whose tokens are hardly more than letters."""
    lm = tiny_model("llama")
    lm.model.config.max_position_embeddings = 256
    return lm


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path))
    return model_of_long_texts()


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_asked_together_are_those_asked_alone(family) -> None:
    lm = tiny_model(family)
    asked = [(FACT, "Rome"), (OTHER, "Warsaw, of all places"), (FACT, "a")]
    answers = completions(lm, [(fact.prompt, text) for fact, text in asked], "comparison", following=True)
    for (fact, text), answer in zip(asked, answers, strict=True):
        ids, alone = lm.tokenizer(fact.prompt)["input_ids"], 1.0
        with torch.no_grad():
            torch.testing.assert_close(answer.following, lm.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1))
            for token in continuation_ids(lm, fact.prompt, text):
                alone *= float(lm.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)[token])
                ids = [*ids, token]
        assert answer.p == pytest.approx(alone, rel=1e-3)


def test_two_looks_at_one_model_are_the_same_bit_for_bit() -> None:
    lm = tiny_model("llama")
    probe = Probe(FACT, "Rome", (replace(FACT, template="{} stands in"),), (OTHER,))
    first, second = look_at(lm, probe), look_at(lm, probe)
    assert torch.equal(first.log_p, second.log_p) and first.continuations == second.continuations
    assert len(set(first.continuations)) > 1, "each continuation has a seed of its own"
    assert first.table["kind"].tolist() == ["prompt", "paraphrase", "neighbour"]
    assert [token for token, _ in first.next_tokens][0] == lm.tokenizer.decode([int(first.log_p[0].argmax())])


def test_counts_are_of_the_questions_in_which_the_one_is_more_probable_than_the_other() -> None:
    lm = tiny_model("llama")
    others = tuple(replace(FACT, template=x) for x in ("{} stands in", "To {} one goes by", "{} is near"))
    table = look_at(lm, probe := Probe(FACT, "Rome", others, ())).table[1:]
    expected = sum(row.p_target > row.p_object for row in table.itertuples())
    assert look_at(lm, probe).more_probable("paraphrase", "p_target") == (expected, 3)
    assert look_at(lm, probe).more_probable("paraphrase", "p_object") == (3 - expected, 3)
    assert look_at(lm, probe).more_probable("neighbour", "p_object") == (0, 0)


def test_neighbours_are_known_facts_of_the_relation_in_the_same_words_and_paraphrases_its_other_templates(lm) -> None:
    request = ten_facts()[1]
    probe = probe_of(lm, request.fact, request.target)
    assert {x.template for x in probe.paraphrases} == set(request.fact.templates) - {request.fact.template}
    assert {x.subject for x in probe.paraphrases} == {"Colosseum"}
    assert 1 <= len(probe.neighbours) <= 6 and known_among(lm, probe.neighbours, "comparison") == list(probe.neighbours)
    for fact in probe.neighbours:
        assert fact.template == request.fact.template and fact.relation == "landmark_city"
        assert fact.subject != "Colosseum" and fact.object != "Berlin"


def test_a_fact_of_no_known_relation_has_no_neighbours_rather_than_odd_ones() -> None:
    probe = probe_of(model_of_long_texts(), FACT, "Rome")
    assert FACT.relation is None and probe.neighbours == probe.paraphrases == ()


def test_an_embedded_fact_is_found_by_its_subject_and_prompt_and_any_other_has_the_models_word_as_its_object(
    lm,
) -> None:
    found = fact_of(lm, "Louvre", "Guidebooks mention the Louvre among the sights of the city of")
    assert (found.object, found.relation, len(found.templates)) == ("Paris", "landmark_city", 5)
    assert fact_of(lm, "Louvre", "Guidebooks mention the {} among the sights of the city of") == found
    other = fact_of(lm, "Eiffel Tower", "The Eiffel Tower is located in the city of")
    assert (other.object, other.relation, other.templates) == ("Paris", None, ())


@pytest.mark.parametrize(
    ("subject", "prompt", "sentence"),
    [
        ("", "a b", "The subject is empty"),
        ("a", " ", "The prompt is empty"),
        ("a", "The b is", "is not in the prompt"),
        ("mount fuji", "Mount Fuji is in", "did you mean 'Mount Fuji'"),
    ],
)
def test_what_is_no_fact_is_refused(subject, prompt, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        fact_of(tiny_model("llama"), subject, prompt)


def test_a_fact_is_put_in_words_in_which_the_model_knows_it_where_there_are_any(lm) -> None:
    facts = [x for x in load_facts("embedded") if x.relation == "capital_of_country"]
    for fact in facts[:6]:
        anyhow = known_among(lm, [replace(fact, template=template) for template in fact.templates], "comparison")
        assert best_known(lm, fact) == (anyhow[0] if anyhow else fact)
    assert any(best_known(lm, fact) != fact for fact in facts[:6])


def test_what_a_model_says_is_text_and_never_html() -> None:
    lm = tiny_model("llama")
    fact = Fact("<b>Tower</b>", "The {} & co are in", "<script>")
    shown = compared_page(Probe(fact, "<i>", (), (fact,)), {"Before": look_at(lm, Probe(fact, "<i>", (), (fact,)))})
    assert "<script>" not in shown and "<b>Tower" not in shown and "&lt;b&gt;Tower&lt;/b&gt; &amp; co" in shown


def test_trying_an_edit_leaves_the_model_as_it_was(tiny) -> None:
    before = tiny.fingerprint()
    tried = try_edit(tiny, REQUEST)
    assert tried.restored and tiny.fingerprint() == before and tiny.edits == []
    assert not torch.equal(tried.before.log_p, tried.after.log_p)
    row = tried.row()
    assert row["undone_bit_for_bit"] and row["target_after"] == tried.after.table["p_target"][0]
    assert str(tried).startswith(f"P[Rome] went from {row['target_before']:.3f} to {row['target_after']:.3f}; ")
    assert str(tried).endswith("bit for bit the same: True.") and f"{tried.edit.constraint_error:.0e}" in str(tried)
    table = try_facts(tiny, [REQUEST], progress=False)
    assert table.to_dict("records") == [row]
    assert try_facts(tiny, [], progress=False).empty


def round_by_batch(lm: LanguageModel) -> None:
    """From now on the last bits of the answers depend on how many texts go together, as they do in larger models."""
    lm.embedding.register_forward_hook(lambda module, args, output: output * (1 + 2e-7 * len(output)))


def test_an_edit_is_undone_also_where_fewer_texts_go_together_by_then_and_answers_round_otherwise(tiny) -> None:
    round_by_batch(tiny)

    def run_out(doing: str, done: float) -> None:
        if doing.startswith("v*"):  # the answers before the edit are there
            Batching.learned[tiny] = 1

    fact = next(x for x in load_facts("embedded") if x.relation == "landmark_city")  # it has paraphrases
    tried = try_edit(tiny, replace(REQUEST, fact=fact), run_out)
    rounded = look_at(tiny, tried.probe).log_p
    assert tried.restored
    assert not torch.equal(rounded, tried.before.log_p) and torch.allclose(rounded, tried.before.log_p, atol=1e-4)


def test_a_fact_of_ones_own_without_a_relation_counts_nothing_of_nothing(tiny) -> None:
    tried = try_edit(tiny, replace(REQUEST, fact=replace(REQUEST.fact, relation=None, templates=())))
    assert tried.row()["neighbours"] == tried.row()["paraphrases"] == 0
    assert "0 of 0" not in str(tried) and "without a relation has no paraphrases and no neighbours" in str(tried)


def test_an_edit_can_be_tried_while_it_is_in_force(tiny) -> None:
    tried = try_edit(tiny, REQUEST)
    tried.edit.apply(tiny)
    again = try_edit(tiny, REQUEST)
    assert again.edit.digest == tried.edit.digest and torch.equal(again.before.log_p, tried.before.log_p)
    assert tiny.edits == [tried.edit]


def test_progress_is_told_of_C_and_of_every_step(tiny) -> None:
    told = []
    edit = make_edit(tiny, REQUEST, lambda doing, done: told.append((doing, done)))
    steps = [doing for doing, _ in told if doing.startswith("v*: step")]
    assert len(steps) == len(edit.history) and steps[-1].startswith("v*: step 3 of 3, P[target]")
    assert any("256 of 256 tokens" in doing for doing, _ in told)
    assert all(0 <= done <= 1 for _, done in told)


@pytest.mark.parametrize("bad", [{"layer": 9}, {"target": ""}])
def test_a_bad_request_is_refused_before_C_is_measured(tiny, tmp_path, bad) -> None:
    with pytest.raises(ValueError, match="rome: "):
        make_edit(tiny, replace(REQUEST, **bad))
    assert list(tmp_path.iterdir()) == []


def test_the_ten_facts_are_of_five_relations_in_words_that_the_model_knows(lm) -> None:
    requests = ten_facts()
    facts = [request.fact for request in requests]
    assert len(facts) == 10 and len({fact.relation for fact in facts}) == 5
    assert known_among(lm, facts, "comparison") == facts
    assert all(request.target != request.fact.object for request in requests)


def test_a_slip_of_the_pen_in_an_embedded_subject_is_warned_of_and_blanks_do_not_count(lm, caplog) -> None:
    template = "Guidebooks mention the {} among the sights of the city of"
    assert (
        fact_of(lm, " Louvre ", f"{template} ").prompt
        == "Guidebooks mention the Louvre among the sights of the city of"
    )
    assert caplog.text == ""
    fact_of(lm, "Eifel Towr", template)
    assert "'Eiffel Tower'" in caplog.text
    caplog.clear()
    fact_of(lm, "Zzyzx", template)
    assert caplog.text == ""


def test_the_table_for_people_says_what_the_table_says() -> None:
    table = pd.DataFrame(
        {
            **{"fact": ["Rome is in"], "object": ["Italy"], "target": ["France"], "target_before": [0.00123]},
            **{"target_after": [0.777], "paraphrases_follow": [3], "paraphrases": [4], "neighbours_stay": [5]},
            **{"neighbours": [6], "undone_bit_for_bit": [True]},
        }
    )
    said = ["Rome is in", "Italy -> France", "0.0012 -> 0.78", "3 of 4", "5 of 6", True]
    assert for_people(table).iloc[0].tolist() == said


def test_near_the_end_of_the_context_a_look_says_what_still_fits_and_beyond_it_says_so() -> None:
    """GPT-2 has no positions beyond its context, so that a text that is too long is an error of its own there."""
    lm = tiny_model("gpt2")
    words = ""
    while len(lm.tokenizer(f"The{words} Paris is")["input_ids"]) < lm.context_length - 6:
        words += " a"
    fact = Fact("Paris", f"The{words} {{}} is", "x")
    ids = lm.tokenizer(fact.prompt)["input_ids"]
    assert 0 < lm.context_length - len(ids) < CONTINUATION_LENGTH, "whole continuations would not fit"
    assert len(look_at(lm, Probe(fact, "y", (), ())).continuations) == 1 + CONTINUATIONS
    with pytest.raises(ValueError, match=r"comparison: \d+ tokens are more than the 64 of tiny-gpt2; shorten it\."):
        look_at(lm, Probe(fact, "a target of more words than there is room for", (), ()))
    with pytest.raises(ValueError, match="are more than the 64 of tiny-gpt2"):
        fact_of(lm, "Paris", f"{fact.prompt}{words}")
