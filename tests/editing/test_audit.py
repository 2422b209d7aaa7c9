"""The audit measures what it says it measures, leaves the model as it was, and warns of what is out of the ordinary."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from test_editing import FACT, FEW, OTHER, THIRD, edit_of_embedded_model, make
from tiny import tiny_model

from rome_lab.editing.auditing import TEXT, audit, neighbours_of
from rome_lab.facts.fact import Fact
from rome_lab.facts.prompts import continuation_ids

NEIGHBOURS = (OTHER, THIRD)


def says(lm, prompt, continuation):
    """Probability of all tokens of the continuation, token by token."""
    ids, p = lm.tokenizer(prompt)["input_ids"], 1.0
    for token in continuation_ids(lm, prompt, continuation):
        with torch.no_grad():
            p *= float(lm.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)[token])
        ids = [*ids, token]
    return p


def test_the_table_says_what_the_model_says_without_and_with_the_edit() -> None:
    lm = tiny_model("gpt2")
    edit = make(lm)
    table = audit(lm, edit, NEIGHBOURS)
    assert list(table.columns) == ["before", "after", "remark"]
    for column in ("before", "after"):
        if column == "after":
            edit.apply(lm)
        prompt = FACT.prompt
        assert table.loc["P[target]", column] == pytest.approx(says(lm, prompt, "Rome"), rel=1e-3)
        assert table.loc["P[original]", column] == pytest.approx(says(lm, prompt, "Paris"), rel=1e-3)
        behind = [says(lm, prefix + prompt, "Rome") for prefix in FEW.prefixes]
        assert table.loc["P[target] behind prefixes", column] == pytest.approx(sum(behind) / len(behind), rel=1e-3)
        own = [says(lm, fact.prompt, fact.object) for fact in NEIGHBOURS]
        assert table.loc["P[own object] of 2 neighbours", column] == pytest.approx(sum(own) / 2, rel=1e-3)
        ids = torch.tensor([lm.tokenizer(TEXT)["input_ids"][: lm.context_length]])
        with torch.no_grad():
            loss = float(lm.model(ids, labels=ids).loss)
        assert table.loc["perplexity of a text", column] == pytest.approx(math.exp(loss), rel=1e-3)


def test_the_norm_is_that_of_the_update_relative_to_the_weight() -> None:
    lm = tiny_model("gpt2")
    edit = make(lm)
    W = lm.memory(1).weight.detach().clone()
    with edit.applied(lm):
        change = float((lm.memory(1).weight.detach() - W).norm() / W.norm())
    table = audit(lm, edit, NEIGHBOURS)
    assert table.loc["|dW| / |W|", "after"] == pytest.approx(change, rel=1e-4)
    assert table.loc["constraint error", "after"] == pytest.approx(edit.constraint_error, abs=1e-7)


def test_the_audit_is_the_same_whether_the_edit_is_in_force_and_leaves_the_model_as_it_was() -> None:
    lm = tiny_model("llama")
    edit, other = make(lm), make(lm, THIRD, layer=2)
    plain = audit(lm, edit, NEIGHBOURS)
    for edits in ([], [edit], [edit, other], [other, edit]):
        for each in edits:
            each.apply(lm)
        before = lm.fingerprint()
        table = audit(lm, edit, NEIGHBOURS)
        assert lm.fingerprint() == before and lm.edits == edits
        if other not in edits:
            assert table.equals(plain)
        for each in edits:
            each.undo(lm)


def test_a_constraint_that_holds_only_on_top_of_another_edit_is_remarked_on_without_it() -> None:
    lm = tiny_model("llama")
    first = make(lm)
    with first.applied(lm):
        second = make(lm, OTHER)
        assert audit(lm, second, NEIGHBOURS).loc["constraint error", "remark"] == ""
    row = audit(lm, second, NEIGHBOURS).loc["constraint error"]
    with second.applied(lm):
        found = lm.weight(1).double() @ second.k_star.double()
    error = float((found - second.v_star).norm(dim=0).max() / second.v_star.norm(dim=0).max())
    assert row["after"] == pytest.approx(error, rel=0.5) and error > 1e-4
    assert "is not met" in row["remark"]


def test_an_edit_that_does_nothing_drifts_nowhere() -> None:
    lm = tiny_model("llama")
    edit = make(lm)
    nothing = replace(edit, Lambda=edit.Lambda * 0)
    table = audit(lm, nothing, NEIGHBOURS)
    assert table.loc["KL of 2 neighbours (nats)", "after"] == 0 and table.loc["|dW| / |W|", "after"] == 0
    assert table.loc["perplexity of a text", "after"] == table.loc["perplexity of a text", "before"]


def test_an_edit_out_of_the_ordinary_is_remarked_on_and_warned_of(caplog) -> None:
    lm = tiny_model("llama")
    edit = make(lm)
    wild = replace(edit, Lambda=edit.Lambda * -50, constraint_error=1e-3, settings=replace(FEW, enough=0.9))
    with caplog.at_level(logging.WARNING):
        table = audit(lm, wild, NEIGHBOURS)
    assert table.loc["|dW| / |W|", "remark"] == "an unusually large update"
    assert table.loc["P[target]", "remark"] == "the edit does not make the target probable"
    assert table.loc["constraint error", "remark"] == "W_hat k* = v* is not met to float32 precision"
    assert "audit: the edit of layer 1 of tiny-llama" in caplog.text and "an unusually large update" in caplog.text


def test_an_ordinary_edit_of_the_embedded_model_gets_no_remark(lm, caplog) -> None:
    edit = edit_of_embedded_model(lm)
    with caplog.at_level(logging.WARNING):
        table = audit(lm, edit)
    assert (table["remark"] == "").all() and not caplog.records
    assert table.loc["P[target]", "before"] < 0.05 < 0.8 < table.loc["P[target]", "after"]
    assert table.loc["P[original]", "after"] < 0.2 * table.loc["P[original]", "before"]


def test_neighbours_share_the_relation_and_come_first_with_the_same_object() -> None:
    edit = make(tiny_model("llama"))
    related = replace(FACT, relation="landmark_city")
    found = neighbours_of(replace(edit, facts=(related,)))
    assert len(found) == 10 and {fact.relation for fact in found} == {"landmark_city"}
    assert {fact.template for fact in found} == {FACT.template}
    objects = [fact.object == "Paris" for fact in found]
    assert objects == sorted(objects, reverse=True) and objects[0]
    assert "Eiffel Tower" not in {fact.subject for fact in found}
    assert len({fact.relation for fact in neighbours_of(edit)}) > 1, "a fact of no relation is compared with all"


def test_bad_requests_for_an_audit_are_refused() -> None:
    lm = tiny_model("llama")
    edit = make(lm)
    with pytest.raises(ValueError, match="audit: there are no neighbours"):
        audit(lm, edit, [])
    with pytest.raises(ValueError, match="is for another model than the tiny-llama"):
        audit(tiny_model("llama", seed=1), edit, NEIGHBOURS)
    assert not lm.edits
    lm.memory(0).weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="is for another model"):
        audit(lm, edit, [Fact("Japan", "In {} is", "Tokyo")])


def test_swapped_arguments_are_refused(lm) -> None:
    with pytest.raises(TypeError, match=r"audit\(lm, edit\)"):
        audit(None, lm)
