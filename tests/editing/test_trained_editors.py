"""MEND and KE: gradients against those of the weights, networks against their formulas, training on tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, tiny_model

import rome_lab.editing.trained_editors as module
from rome_lab.base import Basket
from rome_lab.editing import METHODS, Learned, Training, methods_for, own_facts, train_editor
from rome_lab.editing.hypernetworks import network_of, request_ids, slopes_of
from rome_lab.editing.optima import Optima
from rome_lab.editing.target_texts import record_texts
from rome_lab.editing.trained_editors import NotTrainedError, split_cases, trained_editor
from rome_lab.facts import Fact, continuation_ids, load_facts, question

FACT, TARGET = Fact("Marie", "{} was born in the city of", "Paris"), "Rome"
QUICK = Training(facts=40, steps=6, batch=2, rank=4, learning_rate=1e-3, layers=(1,))
SOME = tuple(load_facts("embedded"))[::2]


def dense(family):
    """A tiny model, and its layers that one matrix ends."""
    lm = tiny_model(family)
    return lm, tuple(layer for layer in range(lm.n_layers) if layer not in lm.sparse)


@pytest.fixture
def tiny_llama():
    lm = tiny_model("llama")
    lm.model.config.max_position_embeddings = 256  # its tokenizer makes many tokens of a sentence
    return lm


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_products_of_keys_and_slopes_are_the_gradient_of_each_weight(family):
    lm, layers = dense(family)
    if not layers:
        pytest.skip("no one matrix ends an MLP")
    texts = record_texts(lm, [question(lm, 0, FACT.prompt, TARGET)], layers[0], "test")
    slopes = slopes_of(lm, texts, layers)
    prompt, target = lm.tokenizer(FACT.prompt)["input_ids"], continuation_ids(lm, FACT.prompt, TARGET)
    weights = [lm.memory(layer).weight.requires_grad_() for layer in layers]
    with torch.enable_grad():
        logits = lm.model(torch.tensor([prompt + target[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
        loss = -logits.float().log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum()
        gradients = torch.autograd.grad(loss, weights)
    for layer, gradient in zip(layers, gradients, strict=True):
        k, d = slopes[layer]
        expected = gradient.T if lm.memory_is_transposed(layer) else gradient
        torch.testing.assert_close(d.T @ k, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def example(lm, layers):
    texts = record_texts(lm, [question(lm, 0, FACT.prompt, TARGET)], layers[0], "test")
    ids = torch.tensor(request_ids(lm, (FACT, TARGET)))
    return slopes_of(lm, texts, layers), lm.embedding.weight.detach()[ids]


def test_an_untrained_mend_passes_normalised_keys_and_slopes_on(tiny_llama):
    network = network_of(tiny_llama, replace(QUICK, layers=(0, 1)))
    slopes, request = example(tiny_llama, (0, 1))
    network.normalise_by([slopes])
    with torch.no_grad():
        network.bias -= 1  # below 0, where the rectifier leaves the identity alone
        deltas = network(slopes, request)
    for place, layer in enumerate((0, 1)):
        k, d = ((x - x.mean(0)) / x.std(0).clamp_min(1e-7) for x in slopes[layer])
        torch.testing.assert_close(deltas[layer], -network.log_rates[place].exp() * d.T @ k, rtol=1e-4, atol=1e-7)


def test_ke_masks_the_gradient_and_shifts_it(tiny_llama):
    network = network_of(tiny_llama, replace(QUICK, name="ke"))
    slopes, request = example(tiny_llama, (1,))
    k, d = slopes[1]
    gradient = (d.T @ k) / (d.T @ k).square().mean().sqrt()
    with torch.no_grad():
        delta = network(slopes, request)[1]
        turned = network({1: (k, -d)}, request)[1]
    # The half that is odd in the gradient is a mask of rank one, the other half a shift of rank one.
    mask, shift = (delta - turned) / (2 * gradient), (delta + turned) / 2
    for part in (mask, shift):
        values = torch.linalg.svdvals(part)
        assert values[1] < 1e-3 * values[0]
    other = network(slopes, request.flip(0))[1]
    assert not torch.allclose(other, delta)


@pytest.mark.parametrize("name", ["mend", "ke"])
def test_training_lowers_the_loss_and_the_best_step_is_kept(tiny_llama, name):
    before = tiny_llama.fingerprint()
    # All facts in every step, so that losses of different steps are of the same facts.
    training = replace(QUICK, name=name, rank=16, facts=24, batch=23, steps=10, learning_rate=3e-2)
    editor = train_editor(tiny_llama, training, SOME, store=None, progress=False)
    losses = editor.history["loss"]
    assert editor.best in set(editor.history["step"]) and losses.iloc[-1] < losses.iloc[1] - 0.1
    assert tiny_llama.fingerprint() == before and name in str(editor)
    assert all(weight.grad is None for weight in tiny_llama.model.parameters())
    change = editor.change(tiny_llama, (FACT, TARGET))
    assert set(change.deltas) == {1} and torch.isfinite(change.delta[0]).all()


def test_an_interrupted_training_goes_on_to_the_same_editor(tiny_llama, monkeypatch):
    whole = train_editor(tiny_llama, QUICK, SOME, store=None, progress=False)
    monkeypatch.setattr(module, "KEPT_EVERY_S", 0.0)
    store = Basket()

    def stop(doing, done):
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_editor(tiny_llama, QUICK, SOME, store=store, progress=False, tell=stop)
    steps = []
    again = train_editor(
        tiny_llama, QUICK, SOME, store=store, progress=False, tell=lambda doing, done: steps.append(done)
    )
    assert min(steps) > 0.5 and again.best == whole.best
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name
    unmeasured = ["step", "loss", "efficacy", "divergence"]
    assert whole.history[unmeasured].equals(again.history[unmeasured])
    found = train_editor(
        tiny_llama, QUICK, SOME, store=store, progress=False, tell=lambda doing, done: pytest.fail("anew")
    )
    assert found.history.equals(again.history) and found.subjects == again.subjects


def test_facts_kept_aside_share_no_subject_with_those_that_are_learnt_from(tiny_llama):
    taught, aside = split_cases(tiny_llama, SOME, QUICK)
    subjects = {case.fact.subject for case in taught} | {x for case in taught for x in case.neighbour_subjects}
    kept = {case.fact.subject for case in aside}
    assert len(taught) == 38 and len(aside) == 2 and not subjects & kept


def test_no_own_fact_is_about_a_subject_that_the_model_knows(tiny_llama, monkeypatch):
    known = load_facts("embedded")[:3]
    monkeypatch.setattr(module, "known_facts", lambda *args, **options: known)
    facts = own_facts(tiny_llama)
    assert facts and not {fact.subject for fact in facts} & {fact.subject for fact in known}


def test_as_a_method_it_adds_up_and_says_whom_it_was_trained_on(tiny_llama):
    editor = train_editor(tiny_llama, QUICK, SOME, store=None, progress=False)
    method, optima = Learned("mend", QUICK), Optima(tiny_llama, progress=False)
    optima.editors[QUICK] = editor
    seen = next(fact for fact in SOME if fact.subject in editor.subjects)
    requests = [(FACT, TARGET), (seen, TARGET)]
    single = [method.change(tiny_llama, [request], optima) for request in requests]
    together = method.change(tiny_llama, requests, optima)
    torch.testing.assert_close(together.deltas[1], single[0].deltas[1] + single[1].deltas[1])
    assert single[0].remark == "" and repr(seen.subject) in single[1].remark
    assert optima.anew().editor(QUICK) is editor


def test_an_editor_that_is_not_trained_names_the_command(tiny_llama):
    with pytest.raises(NotTrainedError, match=r"make editors.*rome_lab train --model"):
        trained_editor(tiny_llama, QUICK)
    with pytest.raises(NotTrainedError):
        METHODS["ke"].change(tiny_llama, [(FACT, TARGET)], Optima(tiny_llama, progress=False))
    names = methods_for(tiny_llama)
    assert "rome" in names and not {"mend", "ke"} & set(names)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"name": "serac"}, "expected one of 'mend', 'ke'"),
        ({"facts": 3}, "facts"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"margin": float("inf")}, "finite"),
    ],
)
def test_a_training_out_of_range_is_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(QUICK, **wrong)


def test_bad_input_is_refused_with_a_sentence(tiny_llama):
    with pytest.raises(ValueError, match="0 to learn from|give facts of relations"):
        train_editor(tiny_llama, QUICK, SOME[:2], store=None, progress=False)
    with pytest.raises(ValueError, match="layers 0 to"):
        train_editor(tiny_llama, replace(QUICK, layers=(7,)), SOME, store=None, progress=False)


def test_a_training_that_diverges_says_what_to_do(tiny_llama, monkeypatch):
    monkeypatch.setattr(module.Course, "loss", lambda self, edits, divergence: edits * float("inf"))
    with pytest.raises(ValueError, match="diverges at step 0.*learning_rate"):
        train_editor(tiny_llama, QUICK, SOME, store=None, progress=False)
