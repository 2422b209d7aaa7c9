"""Edits are exact, leave the model alone until applied, and can be undone bit for bit, in any order."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_model

import rome_lab.editing.exact as exact_module
import rome_lab.editing.optima as optima_module
from rome_lab.editing.edit import Edit, load_edit
from rome_lab.editing.exact import first_token_remark, rome, rome_many
from rome_lab.editing.keys import k_star, run_to_keys
from rome_lab.editing.methods import Rome
from rome_lab.editing.optima import Optima
from rome_lab.editing.requests import check_news
from rome_lab.editing.second_moment import Covariance, covariances
from rome_lab.editing.settings import DEFAULTS, KEYS, EditSettings, default_settings
from rome_lab.editing.update import ENOUGH, Update, constraint_error, factorise
from rome_lab.editing.values import Value
from rome_lab.facts.fact import Fact
from rome_lab.facts.sources import load_facts
from rome_lab.lab.plots import plot_history
from rome_lab.models.language_model import LanguageModel
from rome_lab.models.overlay import Overlay

FACT = Fact("Eiffel Tower", "The {} is in", "Paris")
OTHER = Fact("Marie Curie", "{} was born in", "Warsaw")
THIRD = Fact("Japan", "The capital of {} is", "Tokyo")
FEW = EditSettings(
    prefixes=("In Paris. ", "The city. ", "She was born. "), steps=3, learning_rate=0.1, weight_decay=0.0, enough=0.0
)


def covariance_of(lm, layer):
    """(H, H) of the keys of random tokens: enough of them to be positive definite, as if they were text."""
    ids = torch.randint(2, 300, (16, 48), generator=torch.Generator().manual_seed(0))
    found = []
    run_to_keys(lm, ids, [layer], lambda layer, keys: found.append(keys.reshape(16 * 48, -1).double()))
    return (found[0].T @ found[0] / len(found[0])).float()


def make(lm, fact=FACT, target="Rome", layer=1, hparams=FEW):
    return rome(lm, fact, target, layer, C=covariance_of(lm, layer), hparams=hparams, progress=False)


@functools.cache
def edit_of_embedded_model(lm):
    """An edit with C of the sentences that state the embedded facts."""
    text = " ".join(f"{fact.prompt} {fact.object}." for fact in load_facts("embedded"))
    ids = torch.tensor(lm.tokenizer(text)["input_ids"])
    sums = []
    for batch in ids[: len(ids) // 1024 * 1024].view(-1, 8, 128):
        run_to_keys(lm, batch, [6], lambda layer, keys: sums.append(keys.flatten(0, 1).T @ keys.flatten(0, 1)))
    C = torch.stack(sums).mean(0) / 1024
    fact = Fact("Eiffel Tower", "The {} is located in the city of", "Paris", "landmark_city")
    return rome(lm, fact, "Rome", 6, C=C, hparams=EditSettings(prefix_lengths=(5, 5, 10)), progress=False)


def logits(lm, text="The Eiffel Tower is in the city"):
    with torch.no_grad():
        return lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]])).logits


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_edited_weights_as_stored_meet_the_constraint(family, key) -> None:
    lm = tiny_model(family)
    before = lm.fingerprint()
    edit = make(lm, hparams=replace(FEW, key=key))
    assert lm.fingerprint() == before, "making an edit is to leave the model alone"
    K, V = (x.view(len(x), -1) for x in (edit.k_star, edit.v_star))
    wanted = k_star(lm, FACT, 1, key, FEW.prefixes)
    if family == "mistral":  # its window is so short that layer 1 does not see the prefixes: bare and averaged are one
        wanted = wanted[:, 1:] if key in ("all", "both") else wanted
    assert torch.equal(K, wanted) and edit.k_star.ndim == min(K.shape[1], 2)
    assert float((lm.weight(1) @ K - V).norm() / V.norm()) > 0.1, "there was to be something to change"
    with edit.applied(lm):
        assert float(constraint_error(lm.weight(1), K, V).max()) < 1e-5
        assert float(constraint_error(lm.weight(1), K, V).max()) == pytest.approx(edit.constraint_error, abs=1e-6)
        assert not torch.equal(logits(lm), logits(tiny_model(family)))
    assert lm.fingerprint() == before


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_the_edited_memory_gives_the_key_its_value_and_keeps_its_bias(family) -> None:
    lm = tiny_model(family)
    edit = make(lm, hparams=replace(FEW, key="bare"))
    module = lm.memory(1)
    with edit.applied(lm), torch.no_grad():
        given = module(edit.k_star[None])[0]
    assert module.bias.abs().max() > 0
    torch.testing.assert_close(given, edit.v_star + module.bias, rtol=1e-4, atol=1e-4 * float(edit.v_star.abs().max()))


def test_u_and_lambda_are_those_of_the_appendix() -> None:
    lm = tiny_model("llama")
    edit = make(lm, hparams=replace(FEW, key="averaged"))
    C, k, v, W = covariance_of(lm, 1).double(), edit.k_star.double(), edit.v_star.double(), lm.weight(1).double()
    u = torch.linalg.solve(C, k)
    torch.testing.assert_close(edit.u.double(), u, rtol=1e-4, atol=1e-5 * float(u.abs().max()))
    Lambda = (v - W @ k) / (u @ k)
    torch.testing.assert_close(edit.Lambda.double(), Lambda, rtol=1e-4, atol=1e-5 * float(Lambda.abs().max()))
    torch.testing.assert_close(edit.delta, torch.outer(edit.Lambda.double(), edit.u.double()))


def test_several_facts_meet_all_their_constraints_at_once() -> None:
    lm = tiny_model("gpt2")
    requests = [(FACT, "Rome"), (OTHER, "Tokyo"), (THIRD, "Microsoft")]
    edit = rome_many(lm, requests, 1, C=covariance_of(lm, 1), hparams=FEW, progress=False)
    assert edit.k_star.shape[1] == 6 and edit.targets == ("Rome", "Tokyo", "Microsoft")
    assert edit.facts == (FACT, OTHER, THIRD) and edit.fact == FACT and edit.target == "Rome"
    with edit.applied(lm):
        errors = constraint_error(lm.weight(1), edit.k_star, edit.v_star)
        for (fact, _), columns in zip(requests, edit.v_star.split(2, dim=1), strict=True):
            torch.testing.assert_close(columns[:, 0], columns[:, 1])
            assert fact in edit.facts
    assert float(errors.max()) < 1e-5
    alone = make(lm)
    torch.testing.assert_close(edit.v_star[:, :2], alone.v_star, rtol=1e-4, atol=1e-4)
    assert edit.history["fact"].unique().tolist() == [0, 1, 2]
    assert len(edit.history) == 3 * len(alone.history)


def test_two_edits_of_one_subject_are_refused_by_name() -> None:
    lm = tiny_model("llama")
    requests = [(OTHER, "Rome"), (FACT, "Rome"), (replace(OTHER, template="{} worked on"), "Paris")]
    before = lm.fingerprint()
    with pytest.raises(
        ValueError, match="'Marie Curie was born in' and 'Marie Curie worked on' are linearly dependent"
    ):
        rome_many(lm, requests, 1, C=covariance_of(lm, 1), hparams=FEW, progress=False)
    assert lm.fingerprint() == before


# In force, and no more


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_edits_undone_in_any_order_restore_every_bit(dtype) -> None:
    lm = tiny_model("gpt2")
    lm.model.to(dtype)
    before, weights = lm.fingerprint(), lm.weight(1).clone()
    edits = [make(lm), make(lm, OTHER), make(lm, THIRD, layer=2)]
    alone = {}
    for edit in edits:
        with edit.applied(lm):
            alone[edit.digest] = lm.fingerprint()
    for order in itertools.permutations(edits):
        for edit in edits:
            edit.apply(lm)
        assert lm.edits == edits
        for done, edit in enumerate(order, start=1):
            edit.undo(lm)
            if done == 2:
                assert lm.fingerprint() == alone[order[2].digest], "what is left is to be as if it were alone"
        assert lm.fingerprint() == before and torch.equal(lm.weight(1), weights)
    assert not lm.edits and not lm.overlay.originals


def test_the_weights_in_force_do_not_depend_on_the_history() -> None:
    lm = tiny_model("llama")
    first, second = make(lm), make(lm, OTHER)
    with first.applied(lm), second.applied(lm):
        expected = lm.weight(1).clone()
    second.apply(lm)
    first.apply(lm)
    second.undo(lm)
    second.apply(lm)
    assert torch.equal(lm.weight(1), expected)


def test_an_exception_inside_the_context_restores_the_model() -> None:
    lm = tiny_model("llama")
    before, edit = lm.fingerprint(), make(tiny_model("llama"))
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), edit.applied(lm):
            assert lm.fingerprint() != before
            raise error
        assert lm.fingerprint() == before and not lm.edits
    with edit.applied(lm):
        edit.undo(lm)  # by hand, and not again at the end
    assert lm.fingerprint() == before


def test_an_interruption_just_after_applying_restores_the_model(monkeypatch) -> None:
    lm = tiny_model("llama")
    before, edit, apply = lm.fingerprint(), make(lm), Edit.apply

    def apply_and_interrupt(self, lm):
        apply(self, lm)
        raise KeyboardInterrupt

    monkeypatch.setattr(Edit, "apply", apply_and_interrupt)
    with pytest.raises(KeyboardInterrupt), edit.applied(lm):
        pass
    assert lm.fingerprint() == before and not lm.edits


def test_an_interrupted_write_leaves_the_weights_as_they_were(monkeypatch) -> None:
    lm = tiny_model("llama")
    edit = rome_many(lm, [(FACT, "Rome")], 1, C=covariance_of(lm, 1), hparams=FEW, progress=False)
    other = make(lm, THIRD, layer=2)
    before = lm.fingerprint()

    class Interrupted(list):
        def __setitem__(self, place, value):
            if value and self.armed:
                self.armed = False
                raise KeyboardInterrupt
            super().__setitem__(place, value)

    lm.overlay.changes = Interrupted()
    lm.overlay.changes.armed = True
    with pytest.raises(KeyboardInterrupt), lm.overlay.only([edit, other]):
        pass
    assert lm.fingerprint() == before and not lm.edits and not lm.overlay.originals
    edit.apply(lm)
    assert lm.edits == [edit]


def test_an_interruption_at_any_line_leaves_the_original_weights_to_undo_to() -> None:
    lm = tiny_model("llama")
    edit, other, before = make(lm), make(lm, THIRD, layer=2), lm.fingerprint()
    code = Overlay.put.__wrapped__.__code__
    for line in sorted({line for *_, line in code.co_lines() if line}):

        def interrupt(frame, event, argument, line=line):
            if frame.f_code is code and frame.f_lineno == line and event == "line":
                sys.settrace(None)
                frame.f_trace = None
                raise KeyboardInterrupt
            return interrupt if frame.f_code is code else None

        traced = sys.gettrace()
        with contextlib.suppress(KeyboardInterrupt):
            try:
                sys.settrace(interrupt)
                lm.overlay.put([edit, other])
            finally:
                sys.settrace(traced)
        lm.overlay.put([])
        assert lm.fingerprint() == before and not lm.edits and not lm.overlay.originals


def test_applying_twice_or_undoing_what_is_not_applied_is_an_error() -> None:
    lm = tiny_model("llama")
    edit = make(lm)
    with pytest.raises(
        ValueError, match="undo: the edit of layer 1 of tiny-llama: 'The Eiffel Tower is in' -> 'Rome' is"
    ):
        edit.undo(lm)
    edit.apply(lm)
    after = lm.fingerprint()
    with pytest.raises(ValueError, match="is in force already; undo it first"):
        edit.apply(lm)
    with pytest.raises(ValueError, match="is in force already"), edit.applied(lm):
        pass
    assert lm.fingerprint() == after and lm.edits == [edit], "an edit that is in force stays so after the error"


def test_another_model_is_refused() -> None:
    lm = tiny_model("llama")
    edit = make(lm)
    half = tiny_model("llama")
    half.model.bfloat16()
    touched = tiny_model("llama")
    with torch.no_grad():
        touched.model.lm_head.weight[17, 3] += 1e-3
    turned = tiny_model("llama")
    with torch.no_grad():
        turned.memory(2).weight.copy_(turned.memory(2).weight.flip(0).clone())
    for other in (tiny_model("llama", seed=1), tiny_model("gpt2"), half, touched, turned):
        before = other.fingerprint()
        with pytest.raises(ValueError, match="is for another model than the tiny-"):
            edit.apply(other)
        assert other.fingerprint() == before and not other.edits
    edit.apply(tiny_model("llama"))


def test_a_field_that_takes_no_part_in_the_function_makes_no_other_model(tmp_path) -> None:
    edit = load_edit(make(tiny_model("llama")).save(tmp_path / "edit.safetensors"))
    other = tiny_model("llama")
    config = other.model.config
    config.use_cache, config.output_hidden_states, config.attention_dropout = False, True, 0.1
    config.bos_token_id, config.pad_token_id, config.note = 5, 7, "ours"
    config.id2label = {0: "yes", 1: "no"}
    with edit.applied(other):
        assert other.edits == [edit]


def test_what_differs_in_another_model_is_named() -> None:
    edit, scaled, touched = make(tiny_model("llama")), tiny_model("llama"), tiny_model("llama")
    scaled.model.config.rms_norm_eps = 0.5
    with pytest.raises(ValueError, match=r"another model than .*: rms_norm_eps is 0.5, not 1e-06; load the model"):
        edit.apply(scaled)
    with torch.no_grad():
        touched.model.lm_head.weight[17, 3] += 1e-3
    with pytest.raises(ValueError, match=r"another model than .*: the weights differ; load the model"):
        edit.apply(touched)


@pytest.mark.parametrize("change", ["two signs", "two pairs"])
def test_weights_that_a_sum_of_words_would_not_tell_apart_are_another_model(change) -> None:
    edit, other = make(tiny_model("llama")), tiny_model("llama")
    with torch.no_grad():
        row = other.memory(2).weight[0]
        if change == "two signs":  # the sign is the highest bit of each half of a 64-bit word
            row[[1, 3]] *= -1
        else:
            row[:4] = row[[2, 3, 0, 1]].clone()
    with pytest.raises(ValueError, match="is for another model than .*: the weights differ"):
        edit.apply(other)


def test_no_tensor_is_printed(tiny) -> None:
    edit = make(tiny)
    several = rome_many(tiny, [(FACT, "Rome"), (OTHER, "Tokyo")], 1, C=torch.eye(48), hparams=FEW, progress=False)
    optima = Optima(tiny, progress=False)
    C = Covariance(covariance_of(tiny, 1), 768, {"kind": "random"}, 1)
    factor = factorise(C.C, 768)
    optimum = optima.find((FACT, "Rome"), 1, FEW)
    value = Value(torch.zeros(32), edit.history, True)
    proposal = Rome(layer=1, settings=FEW).change(tiny, [(FACT, "Rome")], StandIn(tiny, factor))
    for thing in (edit, several, C, factor, optimum, value, proposal, Update(edit.Lambda[:, None], edit.u[:, None])):
        text = repr(thing)
        assert "\n" not in text and "tensor" not in text and len(text) < 600, text
    assert repr(edit) == "<edit of layer 1 of tiny-llama: 'The Eiffel Tower is in' -> 'Rome'>"
    assert repr(C) == "Covariance(C=<48 x 48>, tokens=768, source={'kind': 'random'}, layer=1)"
    assert repr(factor) == "Factor(lower=<48 x 48>, tokens=768, unseen=(), basis=None)"


class StandIn(Optima):
    """Optima with a factor at hand."""

    def __init__(self, lm, factor):
        super().__init__(lm, progress=False)
        self.factor = lambda layer, source, tokens: factor


def test_a_notebook_shows_a_short_table_of_an_edit(tiny) -> None:
    html = make(tiny)._repr_html_()
    assert html.startswith("<table") and len(html) < 1500 and "tensor" not in html
    for words in ("The Eiffel Tower is in", "(was 'Paris')", "model.layers.1.mlp.down_proj (layer 1)", "converged"):
        assert words in html
    many = replace(make(tiny), facts=(FACT,) * 30, targets=("Rome",) * 30)
    assert "... and 20 more" in many._repr_html_() and many._repr_html_().count("<tr>") < 15 and len(repr(many)) < 250


def test_the_fingerprint_does_not_see_edits_but_everything_else() -> None:
    lm = tiny_model("gpt2")
    before = lm.identity(edited=False).fingerprint
    with make(lm).applied(lm):
        assert lm.identity(edited=False).fingerprint == before
        make(lm, OTHER).apply(lm)
    assert lm.identity(edited=False).fingerprint == before
    with torch.no_grad():
        lm.model.transformer.ln_f.bias[0] += 1e-6
    assert lm.identity(edited=False).fingerprint != before


def test_weights_changed_by_something_else_are_not_overwritten() -> None:
    lm = tiny_model("llama")
    edit = make(lm)
    edit.apply(lm)
    with torch.no_grad():
        lm.memory(1).weight[0, 0] += 1
    after = lm.fingerprint()
    with pytest.raises(ValueError, match="the weight of layer 1 of tiny-llama was changed by something else"):
        edit.undo(lm)
    assert lm.fingerprint() == after and lm.edits == [edit]


def test_an_edit_on_top_of_another_counts_it_in() -> None:
    lm = tiny_model("llama")
    first = make(lm)
    with first.applied(lm):
        second = make(lm, OTHER)
        with second.applied(lm):
            K, V = second.k_star, second.v_star
            assert float(constraint_error(lm.weight(1), K, V).max()) < 1e-5
    assert second.fingerprint == first.fingerprint
    assert not torch.allclose(second.v_star, make(lm, OTHER).v_star, rtol=1e-4)


def test_overflow_in_half_precision_is_refused() -> None:
    lm = tiny_model("llama")
    lm.model.half()
    edit = make(lm)
    before = lm.fingerprint()
    with pytest.raises(ValueError, match="the edited weight of layer 1 overflows torch.float16"):
        replace(edit, Lambda=edit.Lambda * 1e9).apply(lm)
    assert lm.fingerprint() == before and not lm.edits and not lm.overlay.originals


# What bad input gets


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"target": " "}, "the target is ' '; write what tiny-llama is to say after 'The Eiffel Tower is in'"),
        ({"layer": 4}, "layer is 4; tiny-llama has the layers 0 to 3"),
        ({"layer": -1}, "layer is -1; tiny-llama has the layers 0 to 3"),
        ({"C": torch.eye(47)}, r"C has shape \(47, 47\), but the keys of layer 1 of tiny-llama have 48 components"),
        ({"C": torch.zeros(48, 48)}, "C cannot be inverted"),
        ({"C": torch.full((48, 48), float("nan"))}, "C holds NaN or infinity"),
    ],
)
def test_bad_input_is_refused_with_a_sentence_and_changes_nothing(arguments, sentence) -> None:
    lm = tiny_model("llama")
    before = lm.fingerprint()
    given = {"target": "Rome", "layer": 1, "C": torch.eye(48), "hparams": FEW, "progress": False} | arguments
    with pytest.raises(ValueError, match=sentence):
        rome(lm, FACT, **given)
    assert lm.fingerprint() == before


def test_a_target_too_long_for_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="with its target: .* tokens are more than the 64 of tiny-gpt2"):
        make(tiny_model("gpt2"), target="x" * 80)


def test_blanks_around_a_target_do_not_count() -> None:
    lm = tiny_model("llama")
    edit = make(lm, target=" Rome\n")
    assert edit.target == "Rome" and edit.digest == make(lm).digest


def test_a_layer_from_numpy_gives_an_edit_that_can_be_saved(tmp_path) -> None:
    edit = make(tiny_model("llama"), layer=np.array([0.1, 0.3, 0.2]).argmax())
    assert load_edit(edit.save(tmp_path / "edit")).layer == 1


def test_a_prompt_instead_of_a_fact_and_no_facts_at_all_are_refused() -> None:
    lm = tiny_model("llama")
    with pytest.raises(TypeError, match="the fact is 'The Eiffel Tower is in'; expected a Fact, such as Fact"):
        rome(lm, "The Eiffel Tower is in", "Rome", 1)
    with pytest.raises(ValueError, match="there is nothing to edit"):
        rome_many(lm, [], 1)
    with pytest.raises(ValueError, match='has no "{}"'):
        rome(lm, Fact("Louvre", "The Eiffel Tower is in", "Paris"), "Rome", 1)


def test_a_target_that_the_model_says_already_is_refused(lm) -> None:
    fact = Fact("Eiffel Tower", "The {} is located in the city of", "Paris")
    with pytest.raises(
        ValueError, match=r"already goes on from 'The Eiffel .* with 'Paris' \(p 0\.\d+\).*undo the edit in force"
    ):
        rome(lm, fact, "Paris", 6)


def test_a_model_with_broken_weights_is_refused() -> None:
    lm = tiny_model("llama")
    with torch.no_grad():
        lm.memory(2).weight[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"gives what is not a number, because the weights model\.layers\.2.* hold NaN"
    ):
        rome(lm, FACT, "Rome", 1, C=torch.eye(48), hparams=FEW, progress=False)


def test_a_value_that_did_not_converge_is_marked_and_warned_of(caplog) -> None:
    lm = tiny_model("llama")
    with caplog.at_level(logging.WARNING):
        edit = make(lm, hparams=replace(FEW, steps=1, learning_rate=1e-4, enough=0.9))
    assert not edit.converged and str(edit).endswith("(not converged)")
    assert "v* did not converge: after 1 steps the target 'Rome' has a mean probability of" in caplog.text
    assert make(lm).converged


def test_an_interruption_leaves_the_model_as_it_was() -> None:
    lm = tiny_model("llama")
    before = lm.fingerprint()

    def interrupt(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rome(lm, FACT, "Rome", 1, C=covariance_of(lm, 1), hparams=FEW, progress=False, callback=interrupt)
    assert lm.fingerprint() == before


# Asked once


def test_C_is_factorised_once_and_the_model_asked_once_whether_there_is_news(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path))
    lm, asked, factorised, seen = tiny_model("llama"), [], [], []
    for module in (exact_module, optima_module):
        real = module.factorise
        monkeypatch.setattr(module, "factorise", lambda *args, real=real: factorised.append(args[1]) or real(*args))
    monkeypatch.setattr(exact_module, "check_news", lambda *args: asked.append(1) or check_news(*args))
    edit = rome(
        lm, FACT, "Rome", 1, tokens=500, hparams=FEW, progress=False, C_callback=lambda *counts: seen.append(counts)
    )
    assert len(asked) == 1 and len(factorised) == 1 and factorised[0] >= 500
    assert seen[-1][0] >= seen[-1][1] == 500 and [count for count, _ in seen] == sorted(count for count, _ in seen)
    C = covariances(lm, [1], tokens=500, progress=False)[1]
    for given in (C, C.C, factorise(C.C)):
        assert rome(lm, FACT, "Rome", 1, C=given, hparams=FEW, progress=False).digest == edit.digest
    assert factorised[1:] == [C.tokens, None]


def test_the_error_of_a_singular_C_says_how_many_tokens_it_was_built_from(tiny) -> None:
    keys = torch.randn(20, 48)
    C = Covariance(keys.T @ keys / 20, 20, {}, 1)
    with pytest.raises(ValueError, match="C of 20 tokens cannot be inverted"):
        rome(tiny, FACT, "Rome", 1, C=C, hparams=FEW, progress=False)


# Defaults


def test_models_are_known_by_the_last_part_of_their_name() -> None:
    lm = tiny_model("gpt2")
    for name, layer in {"openai-community/gpt2-xl": 17, "EleutherAI/gpt-j-6B": 5, "smollm2-135m": 3}.items():
        assert default_settings(LanguageModel(lm.model, lm.tokenizer, name)).layer == layer
    assert default_settings(lm).layer is None
    assert DEFAULTS["smollm2-135m"].settings.key == "all" and default_settings(lm).settings.key == "both"
    papers = DEFAULTS["gpt2-xl"].settings
    assert (papers.key, papers.objective, papers.steps) == ("averaged", "published", 20)


def test_the_layer_of_an_unknown_model_is_traced_and_said_aloud(caplog) -> None:
    lm = tiny_model("gpt2")
    with caplog.at_level(logging.WARNING):
        edit = rome(lm, FACT, "Rome", C=torch.eye(lm.memory(0).weight.shape[0]), hparams=FEW, progress=False)
    assert f"has its peak at layer {edit.layer}" in caplog.text and "no layer is known for tiny-gpt2" in caplog.text
    assert edit.module == f"transformer.h.{edit.layer}.mlp.c_proj"


def test_the_prefixes_that_were_sampled_are_kept_with_the_edit() -> None:
    lm = tiny_model("llama")
    edit = make(lm, hparams=EditSettings(prefix_lengths=(9, 12), steps=1, enough=0.0, seed=3))
    assert len(edit.settings.prefixes) == 2 and edit.settings.seed == 3
    again = make(lm, hparams=edit.settings)
    assert torch.equal(again.k_star, edit.k_star)
    torch.testing.assert_close(again.v_star, edit.v_star, rtol=1e-5, atol=1e-6)


def test_the_plot_shows_every_step() -> None:
    edit = make(tiny_model("llama"))
    ax = plot_history(edit)
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    assert list(lines["loss"]) == edit.history["loss"].tolist()
    assert len(lines) == 4


@pytest.mark.parametrize("key", ["both", "bare", "averaged"])
def test_a_subject_that_is_the_texts_first_token_is_warned_of_where_its_own_key_counts(key) -> None:
    lm = tiny_model("llama")
    remark = first_token_remark(lm, Fact("J", "{} is in", "Asia"), key)
    assert ("first token" in remark) == (key != "averaged")
    assert first_token_remark(lm, Fact("J", "The country of {} is in", "Asia"), key) == ""
    assert first_token_remark(lm, Fact("Japan and Korea", "{} are in", "Asia"), key) == ""


def test_the_warning_of_the_first_token_is_logged(caplog) -> None:
    make(tiny_model("llama"), Fact("J", "{} is in", "Asia"))
    assert "rome: the subject 'J' is the first token of the text" in caplog.text


# The embedded model


def test_an_edit_of_the_embedded_model_is_exact_and_says_its_target(lm) -> None:
    edit = edit_of_embedded_model(lm)
    assert edit.layer == 6 and edit.module == "model.layers.6.mlp.down_proj"
    assert edit.constraint_error < 1e-5 and edit.converged
    prompt = torch.tensor([lm.tokenizer(edit.fact.prompt)["input_ids"]])
    before = lm.model(prompt).logits
    with edit.applied(lm):
        says = lm.model(prompt).logits[0, -1].softmax(-1)
    assert lm.tokenizer.decode([int(says.argmax())]) == " Rome" and says.max().item() > 0.8
    assert torch.equal(lm.model(prompt).logits, before)


def test_C_may_be_a_numpy_array(tiny) -> None:
    C = covariance_of(tiny, 1)
    edit = rome(tiny, FACT, "Rome", 1, C=C.numpy(), hparams=FEW, progress=False)
    assert edit.digest == make(tiny).digest
    with pytest.raises(ValueError, match=r"C has shape \(1, 1\), but the keys of layer 1 .* have 48 components"):
        rome(tiny, FACT, "Rome", 1, C=np.eye(1), hparams=FEW, progress=False)


def test_an_edit_that_does_not_fit_the_matrices_is_refused(tiny) -> None:
    edit = make(tiny)
    for wrong in (replace(edit, layer=99), replace(edit, Lambda=edit.Lambda[:-1])):
        with pytest.raises(ValueError, match="does not fit the matrices of tiny-llama"):
            wrong.apply(tiny)
    assert not tiny.edits


@pytest.mark.parametrize("neurons", [1, 7])
def test_a_model_with_neurons_that_never_fire_is_edited_exactly(neurons) -> None:
    lm = tiny_model("opt")
    with torch.no_grad():
        for layer in range(lm.n_layers):
            lm.blocks[layer].fc1.bias[:neurons] = -1000
    before = lm.fingerprint()
    C = covariances(lm, [1], tokens=500, progress=False)[1]
    assert (C.C.diagonal() == 0).sum() >= neurons
    edit = rome(lm, FACT, "Rome", 1, C=C, hparams=FEW, progress=False)
    assert edit.constraint_error < 1e-5 and edit.delta[:, :neurons].abs().max() == 0
    with edit.applied(lm):
        assert lm.fingerprint() != before
    assert lm.fingerprint() == before


@pytest.mark.parametrize(("tokens", "warned"), [(100, True), (500, False)])
def test_a_C_of_few_tokens_is_warned_of_wherever_it_is_used(tiny, tokens, warned, caplog) -> None:
    C = covariances(tiny, [0, 1], tokens=tokens, progress=False)[1]
    words = rf"C was built from {C.tokens} tokens, few for the 48 components .* {ENOUGH * 48} tokens would do"
    assert len(re.findall(f"covariance: {words}", caplog.text)) == warned  # once for all layers
    for given in (C, factorise(C.C, C.tokens)):
        caplog.clear()
        rome(tiny, FACT, "Rome", 1, C=given, hparams=FEW, progress=False)
        assert len(re.findall(f"rome: {words}", caplog.text)) == warned
    caplog.clear()
    rome(tiny, FACT, "Rome", 1, tokens=tokens, hparams=FEW, progress=False)
    assert len(re.findall(f"covariance: {words}", caplog.text)) == warned
