"""Knowledge neurons against whole forwards of the model: what they add, which count, and how they are rewritten."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, tiny_model

from rome_lab.editing import METHODS, Neurons
from rome_lab.editing import knowledge_neurons as module
from rome_lab.editing.knowledge_neurons import knowledge_attributions, neurons_that_matter, rewrite_neurons
from rome_lab.editing.optima import Optima
from rome_lab.facts import Fact, continuation_ids
from rome_lab.models import Batching, input_changed

# A norm behind the MLP makes the same of activations however small; all that they do happens at once, next to 0.
NORMED = ("gemma2", "gemma3", "olmo2")
FACT = Fact("Marie", "{} was born in the city of", "Paris")


def p_with(lm, ids, token, layer, scale):
    """P[token] by one whole forward, the activations of a layer at the last token scaled."""

    def scaled(k):
        k = k.clone().view(1, len(ids), -1)
        k[:, -1] = k[:, -1] * scale
        return k

    with torch.no_grad(), input_changed(lm.memory(layer), scaled):
        return lm.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().softmax(-1)[token]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NORMED])
def test_attributions_of_a_layer_add_up_to_what_its_activations_do(family):
    lm = tiny_model(family)
    lm.model.double()
    ids, token = lm.tokenizer(FACT.prompt)["input_ids"], 7
    found, activations = knowledge_attributions(lm, ids, token, steps=100)
    assert found.shape == activations.shape == (lm.n_layers, lm.weight(0).shape[1])
    for layer in range(lm.n_layers):
        whole = p_with(lm, ids, token, layer, 1.0) - p_with(lm, ids, token, layer, 0.0)
        assert float(found[layer].sum()) == pytest.approx(float(whole), rel=5e-3, abs=5e-8)
    assert not any(block.training for block in lm.blocks) and lm.model.lm_head.weight.grad is None


def test_one_neuron_is_the_slope_along_its_own_activation(monkeypatch):
    lm = tiny_model("llama")
    lm.model.double()
    ids, token, layer = lm.tokenizer(FACT.prompt)["input_ids"], 7, 1
    found, activations = knowledge_attributions(lm, ids, token, steps=1)  # the slope half way
    neuron, h = 3, 1e-4

    def moved(by):
        def change(k):
            k = k.clone()
            k[:, -1] = k[:, -1] / 2
            k[:, -1, neuron] += by
            return k

        with torch.no_grad(), input_changed(lm.memory(layer), change):
            return float(lm.model(torch.tensor([ids])).logits[0, -1].softmax(-1)[token])

    slope = (moved(h) - moved(-h)) / (2 * h)
    assert float(found[layer, neuron]) == pytest.approx(slope * float(activations[layer, neuron]), rel=1e-5)


def test_attributions_stay_where_memory_has_room_for_few_layers():
    lm = tiny_model("llama")
    ids = lm.tokenizer(FACT.prompt)["input_ids"]
    whole, _ = knowledge_attributions(lm, ids, 7)
    Batching.learned[lm] = 1  # byte: one layer at a time
    apart, _ = knowledge_attributions(lm, ids, 7)
    torch.testing.assert_close(apart, whole, atol=1e-7, rtol=1e-4)


def test_those_count_that_are_above_the_threshold_at_enough_prompts(monkeypatch):
    lm = tiny_model("llama")
    several = iter([[[1.0, 0.3, 0.1]], [[0.9, 0.1, 0.3]], [[0.8, 0.5, 0.0]]])
    k = torch.tensor([[2.0, -1.0, 1.0]])
    monkeypatch.setattr(module, "knowledge_attributions", lambda *args: (torch.tensor(next(several)), k))
    settings = Neurons(threshold=0.2, share=0.6, prompts=3)
    assert neurons_that_matter(lm, FACT, ("One. ", "Two. ", "Three. "), settings) == [(0, 0, 1), (0, 1, -1)]


def test_value_vectors_say_the_target_instead_of_the_object(monkeypatch):
    lm = tiny_model("llama")
    monkeypatch.setattr(module, "neurons_that_matter", lambda *args: [(2, 5, -1), (0, 1, 1), (2, 6, 1)])
    deltas = rewrite_neurons(lm, [(FACT, "Rome")], (), Neurons(erase=0.5, write=3.0))
    old, new = (continuation_ids(lm, FACT.prompt, text)[0] for text in ("Paris", "Rome"))
    step = (3.0 * lm.embedding.weight[new] - 0.5 * lm.embedding.weight[old]).detach()
    assert list(deltas) == [0, 2]
    torch.testing.assert_close(deltas[2][:, 5], -step)
    torch.testing.assert_close(deltas[2][:, 6], step)
    assert int((deltas[2] != 0).any(0).sum()) == 2 and int((deltas[0] != 0).any(0).sum()) == 1


def test_the_method_proposes_all_layers_at_once_and_leaves_the_model_as_it_is():
    lm = tiny_model("gpt2")
    before = lm.fingerprint()
    method = METHODS["kn"].settled(lm)
    proposal = method.change(lm, [(FACT, "Rome")], Optima(lm, progress=False))
    assert proposal.deltas and lm.fingerprint() == before
    assert method.describe()["threshold"] == 0.2
    with proposal.applied(lm):
        assert lm.fingerprint() != before
    assert lm.fingerprint() == before


def test_nothing_that_matters_is_an_error_that_says_what_to_lower(monkeypatch):
    lm = tiny_model("llama")
    nothing = torch.zeros(lm.n_layers, 8), torch.zeros(lm.n_layers, 8)
    monkeypatch.setattr(module, "knowledge_attributions", lambda *args: nothing)
    with pytest.raises(ValueError, match="kn: no neuron matters to 'Paris' at 50% of 1 prompts.*lower threshold, 0.2"):
        rewrite_neurons(lm, [(FACT, "Rome")], ())


@pytest.mark.parametrize(
    "setting", [{"threshold": 0.0}, {"share": 1.5}, {"prompts": 0}, {"steps": 0.5}, {"write": -1.0}]
)
def test_settings_of_neurons_that_cannot_be_are_refused(setting):
    with pytest.raises(ValueError, match="Neurons"):
        Neurons(**setting)


def test_embeddings_of_another_size_are_refused():
    with pytest.raises(ValueError, match="kn: word embeddings of tiny-opt have 16 components"):
        rewrite_neurons(tiny_model("opt"), [(FACT, "Rome")], ())
