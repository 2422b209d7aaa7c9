"""Causal tracing: against one full forward a cell, and the identities that hold whatever the model says."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from oracle import FullForward
from test_memory import device_of
from tiny import FAMILIES, tiny_model, tokenizer

from rome_lab import Fact, FixedNoise, GaussianNoise, LanguageModel, causal_trace
from rome_lab.facts.prompts import read_prompt
from rome_lab.tracing.corruption import noise_key
from rome_lab.tracing.trace import KINDS

EIFFEL = ("The Eiffel Tower is located in the city of", "Eiffel Tower")
PROMPTS = {
    "several tokens": EIFFEL,
    "one token": ("The capital of France is", "of"),
    "subject first": ("Paris is the capital of", "Paris"),
    "subject last": ("They say the capital of France", "France"),
    "two tokens": ("The in", "The"),
    "forty tokens": ("She worked on physics and chemistry in Paris. Marie Curie was born in", "Marie Curie"),
}


def noise_for(lm, prompt, subject, samples, seed=1):
    begin, end = read_prompt(lm, prompt, subject).subject_range
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, end - begin, lm.embedding.weight.shape[1], generator=generator)


@functools.cache
def telling_model(family):
    """The first tiny random model of the family on which noise makes a difference worth tracing."""
    for seed in range(30):
        lm = tiny_model(family, seed)
        read = read_prompt(lm, *EIFFEL)
        forward = FullForward(lm, read.ids, read.subject_range, noise_for(lm, *EIFFEL, samples=3))
        p_clean, p_corrupted = forward.run()[0], forward.run(forward.noise)[0]
        if p_clean.max() - p_corrupted[:, p_clean.argmax()].mean() > 0.1:
            return lm
    raise AssertionError(f"no random model of {family} says anything distinct")


def largest_difference(lm, prompt, subject, kind, severed, window, samples):
    """Largest difference from the oracle in any cell, and the standard deviation of the oracle's table."""
    noise = noise_for(lm, prompt, subject, samples)
    read = read_prompt(lm, prompt, subject)
    p_clean, p_corrupted, table = FullForward(lm, read.ids, read.subject_range, noise).trace(kind, severed, window)
    trace = causal_trace(lm, prompt, subject, kind, FixedNoise(noise), severed=severed, window=window)
    assert trace.p_clean == pytest.approx(p_clean, abs=1e-5)
    assert trace.p_corrupted == pytest.approx(p_corrupted, abs=1e-5)
    return np.abs(trace.p_restored - table).max(), table.std()


@pytest.mark.parametrize("label", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_full_forward_a_cell(family, label):
    error, spread = largest_difference(telling_model(family), *EIFFEL, *KINDS[label], window=2, samples=3)
    assert spread > 1e-3, "the oracle's table is flat: it could not show an error"
    assert error <= 1e-3 * spread


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_full_forward_a_cell_to_double_precision(family):
    lm = LanguageModel(copy.deepcopy(telling_model(family).model).double(), tokenizer())
    tolerance = 1e-6 if family == "gptj" else 1e-9  # GPT-J always computes its attention in float32
    for label in KINDS:
        error, spread = largest_difference(lm, *EIFFEL, *KINDS[label], window=3, samples=2)
        assert error <= tolerance * spread, label


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize(("samples", "window"), [(1, 1), (10, 10)])
def test_equals_one_full_forward_a_cell_for_every_shape_of_prompt(name, samples, window):
    lm = tiny_model("llama", seed=2)
    lm.model.double()
    for kind in ("state", "mlp", "attn"):
        error, spread = largest_difference(lm, *PROMPTS[name], kind, None, window, samples)
        assert error <= 1e-9 * spread, kind


@pytest.mark.parametrize("label", ["state", "attn", "severed-mlp"])
def test_equals_one_full_forward_a_cell_on_the_embedded_model(lm, label):
    """With the paper's noise; the noise of the other tests is three times as large as that, and so are rounding errors."""
    read = read_prompt(lm, "Paris is in", "Paris")
    noise = GaussianNoise().noise(lm, (2, 1, lm.embedding.weight.shape[1]), "any")
    kind, severed = KINDS[label]
    *_, table = FullForward(lm, read.ids, read.subject_range, noise).trace(kind, severed, 10)
    trace = causal_trace(lm, "Paris is in", "Paris", kind, FixedNoise(noise), severed=severed)
    assert np.abs(trace.p_restored - table).max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_restoring_the_last_state_of_the_last_token_gives_the_clean_probability(family):
    lm = tiny_model(family)
    lm.model.double()  # in float32 products of other shapes round otherwise, by 1.3e-6 on some processors
    trace = causal_trace(lm, *EIFFEL, samples=2)
    assert trace.p_restored[-1, -1] == pytest.approx(trace.p_clean, abs=1e-12)


@pytest.mark.parametrize("label", KINDS)
def test_without_noise_nothing_has_an_effect(label):
    kind, severed = KINDS[label]
    trace = causal_trace(tiny_model("gpt2"), *EIFFEL, kind, GaussianNoise(std=0.0), samples=2, severed=severed)
    assert trace.total_effect == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(trace.indirect_effect, 0, atol=1e-5)


@pytest.mark.parametrize("label", KINDS)
def test_tokens_left_of_the_subject_give_exactly_the_corrupted_probability(label):
    kind, severed = KINDS[label]
    trace = causal_trace(tiny_model("llama"), *EIFFEL, kind, samples=2, severed=severed)
    assert trace.subject_range[0] > 0
    assert (trace.p_restored[: trace.subject_range[0]] == trace.p_corrupted).all()


def test_splitting_the_batch_changes_nothing():
    lm = tiny_model("llama")
    with device_of(lm) as rows:
        whole = causal_trace(lm, *EIFFEL, "mlp", GaussianNoise(std=0.5), samples=3, window=3)
    assert max(rows) > 4, "there is something to split"
    for most in range(1, max(rows)):
        split = causal_trace(lm, *EIFFEL, "mlp", GaussianNoise(std=0.5), samples=3, window=3, max_rows=most)
        np.testing.assert_allclose(split.p_restored, whole.p_restored, atol=1e-6)


def test_results_depend_on_the_seed_and_not_on_what_ran_before():
    lm = tiny_model("qwen2")
    first = causal_trace(lm, *EIFFEL, samples=2)
    causal_trace(lm, "Paris is the capital of", "Paris", samples=2)
    torch.rand(3)
    again = causal_trace(lm, *EIFFEL, samples=2)
    np.testing.assert_array_equal(first.p_restored, again.p_restored)
    assert causal_trace(lm, *EIFFEL, samples=2, seed=1).p_corrupted != first.p_corrupted


def test_facts_of_one_shape_have_noise_of_their_own():
    noise = GaussianNoise(std=1.0)
    one, other = (noise.noise(None, (2, 3, 4), noise_key(0, text, (1, 4))) for text in ("a b c", "a b d"))
    assert not torch.equal(one, other)


def test_window_is_the_papers_and_clipped_at_the_ends():
    from rome_lab.tracing.sweep import columns_of

    columns = columns_of("mlp", 30, 10)
    assert [(c.first, c.last) for c in (columns[0], columns[15], columns[29])] == [(0, 5), (11, 20), (25, 29)]


def test_a_trace_leaves_the_model_as_it_was():
    lm = tiny_model("gemma2")
    before = lm.fingerprint()
    causal_trace(lm, *EIFFEL, "attn", samples=2)
    assert lm.fingerprint() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_a_prompt_on_its_own_is_answered_by_the_model():
    lm = tiny_model("llama")
    lm.model.double()  # in float32 texts in one batch round otherwise than one alone, on some processors by 2e-6
    trace = causal_trace(lm, *EIFFEL, samples=1)
    with torch.no_grad():
        ids = torch.tensor([lm.tokenizer(EIFFEL[0])["input_ids"]])
        logits = lm.model(ids).logits[0, -1]
    assert trace.answer == lm.tokenizer.decode([int(logits.argmax())])
    assert trace.p_clean == pytest.approx(float(logits.softmax(-1).max()), abs=1e-6)
    assert "".join(trace.tokens) == EIFFEL[0]


def test_a_known_fact_is_traced_to_its_object(lm):
    fact = Fact(subject="Eiffel Tower", template="The {} is located in the city of", object="Paris")
    trace = causal_trace(lm, fact, samples=1, kind="attn")
    assert trace.answer.strip() == "Paris"
    assert trace.p_clean > 0.5 > trace.p_corrupted


def test_bad_input_is_refused_in_one_sentence(lm):
    unknown = Fact(subject="Eiffel Tower", template="The {} is located in the city of", object="Rome")
    broken = tiny_model("gpt2")
    with torch.no_grad():
        broken.mlp(1).c_proj.weight[0, 0] = float("nan")
    long = "word " * 70
    cases = [
        (lambda: causal_trace(lm, unknown), "does not know this fact.* ' Paris'.*not ' Rome'"),
        (lambda: causal_trace(lm, "", "x"), "prompt is empty"),
        (lambda: causal_trace(lm, "Paris is", ""), "subject is empty"),
        (lambda: causal_trace(lm, "Paris is", "Rome"), "'Rome' is not in the prompt"),
        (lambda: causal_trace(lm, *EIFFEL, "hidden"), "kind='hidden'"),
        (lambda: causal_trace(lm, *EIFFEL, "mlp", severed="attn"), "severed"),
        (lambda: causal_trace(lm, *EIFFEL, samples=0), "samples is 0"),
        (lambda: causal_trace(lm, *EIFFEL, corruption=FixedNoise(torch.zeros(2, 9, 4))), "noise has shape"),
        (lambda: causal_trace(tiny_model("gpt2"), long, "word"), "reads at most 64"),
        (lambda: causal_trace(broken, *EIFFEL), r"transformer\.h\.1\.mlp\.c_proj\.weight hold NaN"),
        (lambda: GaussianNoise(std=-1), "std is -1"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
