"""Which layer to edit: what a suggestion counts, beside edits in force that are counted one by one, and what is refused."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from families import family_model
from tiny import known, talkative_model

from rome_lab import Fact, LanguageModel, causal_trace, suggest_layer
from rome_lab.editing import METHODS, EditSettings, Proposal, Rome, covariances, layer_search, rome, settle
from rome_lab.facts import Case, completions
from rome_lab.models import Verdict, keep_verdicts

FEW = EditSettings(prefixes=("In Paris. ", "The city. "), steps=3, learning_rate=0.3, enough=0.0)


@dataclass(frozen=True)
class RandomTokens:
    """Passages of random tokens."""

    def describe(self) -> dict:
        return {"tokens": "random"}

    def passages(self, lm, store, begin):
        for number in itertools.count(begin):
            yield torch.randint(2, 300, (24,), generator=torch.Generator().manual_seed(number)).tolist()


QUICK = {"settings": FEW, "source": RandomTokens(), "tokens": 480, "progress": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def lm():
    return talkative_model()


@pytest.fixture(scope="module")
def cases(lm):
    return cases_of(lm)


def cases_of(lm):
    """A case of each fact that the model knows: its target is another's object, its neighbours are the others."""
    facts = known(lm)
    objects = list(dict.fromkeys(fact.object for fact in facts))
    return [
        Case(
            id=fact.subject,
            fact=fact,
            target=next(x for x in objects if x[0] != fact.object[0]),
            paraphrases=(f"We know of {fact.subject} that", f"In {fact.subject} it is"),
            neighbours=tuple(x.prompt for x in facts if x != fact),
            neighbour_answers=tuple(x.object for x in facts if x != fact),
        )
        for fact in facts
    ]


def counted(lm, pairs, others):
    """At how many prompts the first texts are the more probable ones, in %, on the model as it is."""
    own, other = ([x.total for x in completions(lm, asked, "test")] for asked in (pairs, others))
    return [a > b for a, b in zip(own, other, strict=True)]


def test_the_scores_are_those_of_edits_in_force_and_the_model_is_left_as_it_was(lm, cases):
    before = lm.fingerprint()
    found = suggest_layer(lm, cases, layers=[2, 0], n=3, **QUICK)
    assert lm.fingerprint() == before and not lm.edits
    C = covariances(lm, [0, 2], RandomTokens(), 480, progress=False)
    for layer in (0, 2):
        rows = []
        for case in cases[:3]:
            pairs = case.pairs
            right = counted(lm, pairs["neighbours"], pairs["neighbours_target"])
            edit = rome(lm, case.fact, case.target, layer, C=C[layer], hparams=FEW, progress=False)
            with edit.applied(lm):
                rewrite = counted(lm, pairs["rewrite"], pairs["rewrite_true"])
                paraphrase = counted(lm, pairs["paraphrases"], pairs["paraphrases_true"])
                kept = counted(lm, pairs["neighbours"], pairs["neighbours_target"])
            stay = [x for x, was in zip(kept, right, strict=True) if was]
            size = float(edit.delta.norm() / lm.weight(layer).double().norm())
            rows.append(
                [100 * np.mean(rewrite), 100 * np.mean(paraphrase), 100 * np.mean(stay) if stay else np.nan, size]
            )
        row = found.table.set_index("layer").loc[layer]
        np.testing.assert_allclose(
            row[["rewrite", "paraphrase", "neighbour", "change"]].tolist(), np.nanmean(rows, 0), 1e-4
        )
        means = np.mean([x for x in rows if not np.isnan(x[2])], 0)[:3]
        assert row["score"] == pytest.approx(3 / sum(1 / means) if all(means) else 0)
    assert list(found.table["n"]) == [3, 3] and found.facts == tuple(case.fact for case in cases[:3])


def test_where_no_edit_can_be_made_or_no_harm_would_show_there_is_no_suggestion(lm, cases, tmp_path):
    with pytest.raises(ValueError, match=r"not one of the 4 edits that were tried changes .*; the first: .*24 tokens"):
        suggest_layer(lm, cases, layers=[1, 2], n=2, store=tmp_path / "own", **QUICK | {"tokens": 24})
    assert not list((tmp_path / "own").rglob("*.json")), "nothing is kept"
    wrong = [replace(case, neighbour_answers=("~" * 20,) * len(case.neighbours)) for case in cases]
    with pytest.raises(ValueError, match="is right about no neighbour of the 2 facts"):
        suggest_layer(lm, wrong, layers=[1, 2], n=2, **QUICK)
    assert suggest_layer(lm, cases, layers=np.arange(1, 2), n=1, **QUICK).layer == 1
    with pytest.raises(ValueError, match="layer is True"):
        suggest_layer(lm, cases, layers=[True], n=1, **QUICK)


def test_beside_it_stands_the_peak_of_traces_of_the_same_facts(lm, cases):
    found = suggest_layer(lm, cases, layers=[1], n=3, **QUICK)
    traces = [causal_trace(lm, case.fact, kind="mlp") for case in cases[:3]]
    effects = np.mean([x.indirect_effect[x.subject_range[1] - 1] for x in traces], axis=0)
    assert found.traced == effects.argmax() and found.traced_effect == pytest.approx(effects.max(), abs=1e-6)
    assert found.table["effect"][0] == pytest.approx(effects[1], abs=1e-6)
    assert f"Tracing would have said layer {found.traced}" in str(found) and "same facts" in found._repr_html_()
    assert list(found.for_people().columns)[:5] == ["layer", "rewrite", "paraphrase", "neighbour", "score"]


def test_a_second_call_makes_no_edit_and_anything_that_matters_makes_them_anew(lm, cases, monkeypatch, tmp_path):
    first = suggest_layer(lm, cases, layers=[0, 1], n=2, **QUICK)
    calls = []
    monkeypatch.setattr(layer_search.Trials, "try_layers", lambda *args: calls.append(args))
    again = suggest_layer(lm, cases, layers=[1, 0], n=2, **QUICK)
    assert not calls and again.layer == first.layer and again.table.equals(first.table)
    others = [
        (cases, {"n": 1}),
        (cases, {"layers": [0]}),
        (cases, {"settings": replace(FEW, steps=2)}),
        (cases, {"tokens": 300}),
        (cases, {"store": tmp_path}),
        ([replace(case, target="x") for case in cases], {}),
        (cases, {"without": {cases[0].fact.subject}}),
    ]
    for number, (given, options) in enumerate(others, start=1):
        with pytest.raises(IndexError):  # nothing was tried, so there is no first edit to speak of
            suggest_layer(lm, given, **{"layers": [0, 1], "n": 2, **QUICK, **options})
        assert len(calls) == number


def test_layers_beside_the_best_are_tried_next_and_progress_is_told(lm, cases, monkeypatch):
    monkeypatch.setattr(layer_search, "FIRST_LAYERS", 2)
    told = []
    found = suggest_layer(lm, cases, n=2, tell=lambda doing, done: told.append((doing, done)), **QUICK)
    assert {0, 2} < set(found.table["layer"]) <= {0, 1, 2, 3} and 1 in set(found.table["layer"])
    assert "Trying layer 0: fact 1 of 2" in [doing for doing, _ in told] and all(0 <= x <= 1 for _, x in told)
    assert any("(C) at layers 0, 2" in doing for doing, _ in told), "of both layers in one pass"


def test_edits_in_force_are_put_aside_and_put_back(lm, cases):
    plain = suggest_layer(lm, cases, layers=[1], n=2, store=None, **QUICK)
    edit = rome(lm, cases[0].fact, cases[0].target, 1, C=torch.eye(48), hparams=FEW, progress=False)
    with edit.applied(lm):
        edited = lm.fingerprint()
        assert suggest_layer(lm, cases, layers=[1], n=2, store=None, **QUICK).table.equals(plain.table)
        assert lm.fingerprint() == edited and lm.edits == [edit]


def test_an_edit_that_cannot_be_made_counts_as_one_without_effect(lm, cases, monkeypatch):
    edit_of = layer_search.Trials.edit_of
    monkeypatch.setattr(
        layer_search.Trials,
        "edit_of",
        lambda self, layer, case: Proposal(remark="no way", failed=True) if layer == 1 else edit_of(self, layer, case),
    )
    found = suggest_layer(lm, cases, layers=[1, 2], n=2, **QUICK)
    assert found.table["rewrite"][0] == 0 and found.table["score"][0] == 0 and found.layer == 2
    assert found.table["remark"][0] == "2 of 2 edits bear a remark; the first: no way"


def test_what_cannot_be_tried_is_refused_in_a_sentence(lm, cases):
    for error, message, given, options in [
        (ValueError, "layer is 4; .* has the layers 0 to 3", cases, {"layers": [0, 4]}),
        (ValueError, "no layers to try", cases, {"layers": []}),
        (ValueError, "n is 0", cases, {"n": 0}),
        (ValueError, "there are no facts", [], {}),
        (TypeError, "facts and cases are mixed", [cases[0], cases[0].fact], {}),
        (ValueError, "knows none of the 1 facts", [Fact("Rome", "{} is the capital of", "Nowhere")], {}),
        (ValueError, "knows none of the 1 facts", [replace(cases[0], fact=replace(cases[0].fact, object="Zz"))], {}),
        (ValueError, "judged later", cases, {"without": {case.fact.subject for case in cases}}),
    ]:
        with pytest.raises(error, match=message):
            suggest_layer(lm, given, **{"layers": [0], **QUICK, **options})


def test_layers_of_experts_are_left_out_and_refused_where_they_are_named(cases):
    experts = family_model("Mixtral")
    for layers in (None, [1]):
        with pytest.raises(ValueError, match="cannot be edited: no one matrix ends its MLP"):
            suggest_layer(experts, cases, layers=layers, **QUICK)
    mixed = family_model("DeepSeek V3 (first layer dense)")
    assert layer_search.layers_to_try(mixed, None) == [0]


def test_a_model_that_comes_out_wrong_is_not_tried(cases):
    other = talkative_model()
    keep_verdicts(other, [Verdict("trace mlp", 1.0, 0.1, "wrong", "")])
    with pytest.raises(ValueError, match="suggest_layer: rl.verify found that"):
        suggest_layer(other, cases, layers=[0], **QUICK)


def test_methods_without_a_layer_take_the_suggested_one_found_on_other_subjects(lm, cases, monkeypatch, caplog):
    given = {}

    def suggested(lm, facts=None, **options):
        given.update(options)
        return suggest_layer(lm, cases, layers=[2], n=1, without=options["without"], **QUICK)

    monkeypatch.setattr(layer_search, "suggest_layer", suggested)
    with caplog.at_level(logging.WARNING):
        methods = settle(lm, [METHODS["rome"], Rome("mine", layer=1), METHODS["ft"]], cases[:2])
    assert [x.layer for x in methods[:2]] == [2, 1] and methods[2].tuning is not None
    assert given["without"] == {case.fact.subject for case in cases[:2]}
    assert "no layer is known for" in caplog.text and "so rome takes" in caplog.text
    named = LanguageModel(lm.model, lm.tokenizer, "gpt2-medium")  # whose layer is known, and none of this model's
    with pytest.raises(ValueError, match="rome: layer is 8"):
        settle(named, [METHODS["rome"]], cases)


def test_what_could_not_be_suggested_says_how_to_choose(lm, cases, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("suggest_layer: it knows none.")

    monkeypatch.setattr(layer_search, "suggest_layer", refuse)
    with pytest.raises(ValueError, match=r'rome: no layer is known for .*it knows none.*METHODS\["rome"\], layer='):
        settle(lm, [METHODS["rome"]], cases)
