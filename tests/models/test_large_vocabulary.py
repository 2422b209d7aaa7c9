"""Models of many words: logits, a row of which is a megabyte in Gemma 3, are made for few places at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers as tf
from tiny import LLAMA, scaled_up, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from rome_lab import LanguageModel, causal_trace, covariance, known_facts, load_facts, rome, verify
from rome_lab.editing import EditSettings, SampledText
from rome_lab.editing.fine_tuning import Tuning, fine_tune
from rome_lab.facts import Fact
from rome_lab.models import Change, Question, batching, generate, log_p_of, score
from rome_lab.tracing.knocking_out import knockout

VOCABULARY, ROWS = 4099, 8  # no other width of the model is the same; the readout is tried on seven tokens
FACT = Fact("Eiffel Tower", "The {} is in", "Paris")


class LargestLogits(TorchDispatchMode):
    """The most numbers that a tensor over the vocabulary has, of all that are made within the context."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == VOCABULARY:
                weights = tensor.shape == (LLAMA["hidden_size"], VOCABULARY)  # the head's, as its product takes them
                self.most = max(self.most, 0 if weights else tensor.numel())
        return made


@pytest.fixture(scope="module")
def many_words() -> LanguageModel:
    torch.manual_seed(0)
    config = tf.LlamaConfig(**LLAMA | {"vocab_size": VOCABULARY, "max_position_embeddings": 256})
    return LanguageModel(scaled_up(tf.LlamaForCausalLM(config)), tokenizer(), name="many words")


@pytest.fixture
def few(monkeypatch, shared_cache) -> Iterator[LargestLogits]:
    """Room for eight rows of logits; what was made is watched."""
    monkeypatch.setattr(batching, "LOGITS", ROWS * VOCABULARY + 1)
    with LargestLogits() as watched:
        yield watched
    assert VOCABULARY <= watched.most <= ROWS * VOCABULARY


def test_scores(many_words, few) -> None:
    questions = [Question(0, (5, 6, word), (7, 8, 9, 10)) for word in range(10, 20)]
    assert len(score(many_words, [Change()], questions)) == 10


def test_traces_and_knockouts(many_words, few) -> None:
    assert causal_trace(many_words, FACT.prompt, FACT.subject, samples=5).p_restored.shape[1] == 4
    knockout(many_words, FACT.prompt, FACT.subject)


def test_known_facts(many_words, few) -> None:
    known_facts(many_words, load_facts("embedded")[:8], n=None, max_new_tokens=3, progress=False)


def test_sampled_and_generated_texts(many_words, few) -> None:
    covariance(many_words, 1, SampledText(length=8), 300, store=None, progress=False)
    generate(many_words, [Change()], [[f"In {word}" for word in "abcdefghij"]], new_tokens=3)


def test_edits(many_words, few) -> None:
    settings = EditSettings(prefixes=("A. ", "Bb. ", "C. "), steps=2)
    target = "Rome, of all the places"
    rome(many_words, FACT, target, layer=1, C=torch.eye(48), hparams=settings, progress=False)
    fine_tune(many_words, [(FACT, target)], Tuning(1, steps=2))


def test_verification(many_words, few) -> None:
    verify(many_words, store=None)


def test_log_probabilities_and_their_gradients_are_the_same_in_parts(many_words, monkeypatch) -> None:
    states, tokens = torch.randn(20, 32), torch.arange(18)

    def values_and_gradient():
        given = states.clone().requires_grad_()
        of_tokens, whole = log_p_of(many_words, given, tokens)
        (of_tokens.sum() + whole.exp()[1, 5]).backward()
        return of_tokens, whole, given.grad

    together = values_and_gradient()
    assert together[0].shape == (18,) and together[1].shape == (2, VOCABULARY)
    expected = many_words.logits(states).log_softmax(-1)
    torch.testing.assert_close(together[0], expected[range(18), range(18)])
    torch.testing.assert_close(together[1], expected[18:])
    monkeypatch.setattr(batching, "LOGITS", 6 * VOCABULARY)
    for whole, parts in zip(together, values_and_gradient(), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
