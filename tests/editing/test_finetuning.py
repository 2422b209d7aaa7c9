"""Fine-tuning by suffixes finds what a plain loop over the whole model finds, keeps its bound, leaves the model alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, tiny_model

from rome_lab.editing import fine_tuning, target_texts
from rome_lab.editing.fine_tuning import TUNINGS, Tuning, default_tuning, fine_tune
from rome_lab.facts.fact import Fact
from rome_lab.facts.prompts import continuation_ids
from rome_lab.models.changes import Change
from rome_lab.models.language_model import LanguageModel

FACT = Fact("Eiffel Tower", "The {} is in", "Paris")
OTHER = Fact("Marie Curie", "{} was born in", "Warsaw")
THIRD = Fact("Japan", "The capital of {} is", "Tokyo")
ONE = [(FACT, "Rome")]
SEVERAL = [(FACT, "the city of Rome"), (OTHER, "Tokyo"), (THIRD, "Microsoft")]
# Gemma2 computes its norms, and GPT-J its attention scores, in float32, whatever the weights are. So the gradient through
# them is rounded to float32 too, and otherwise where texts share a padded batch than where each is run alone: in GPT-J it
# differs by 5e-9 while the losses are equal. Four steps over 40 random GPT-J make of that up to 3e-10 in the losses and 2e-7
# in the change; with its attention made to compute in float64, twelve of them differ by 5e-16 and 1e-14.
TOLERANCES = {"gemma2": 1e-5, "gptj": 1e-6}


def mean_loss(lm, requests):
    """-log P of all tokens of the target, by one full forward a text."""
    losses = []
    for fact, target in requests:
        prompt, said = lm.tokenizer(fact.prompt)["input_ids"], continuation_ids(lm, fact.prompt, target)
        logits = lm.model(torch.tensor([prompt + said[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
        losses.append(-logits.log_softmax(-1)[range(len(said)), said].sum())
    return torch.stack(losses).mean()


def plain_loop(lm, requests, tuning):
    """The slow way, written independently: Adam on the weight itself, in a model of its own, all of it run each time."""
    W = lm.memory(tuning.layer).weight
    original = W.detach().clone()
    adam = torch.optim.Adam([W], lr=tuning.learning_rate)
    losses = []
    for step in range(tuning.steps + 1):
        loss = mean_loss(lm, requests)
        losses.append(loss.item())
        if losses[-1] < tuning.enough or step == tuning.steps:
            break
        lm.model.zero_grad()
        loss.backward()
        adam.step()
        if tuning.bound is not None:
            with torch.no_grad():
                W.copy_(torch.minimum(torch.maximum(W, original - tuning.bound), original + tuning.bound))
    delta = (W - original).detach()
    return (delta.T if lm.memory_is_transposed(tuning.layer) else delta), losses


@pytest.mark.parametrize("requests", [ONE, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("bound", [None, 2e-3])
@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_by_suffixes_is_that_of_the_whole_model(family, bound, requests) -> None:
    lm, other = tiny_model(family), tiny_model(family)
    lm.model.double()
    other.model.double()
    tuning = Tuning(layer=1, learning_rate=1e-3, steps=4, bound=bound)
    tuned = fine_tune(lm, requests, tuning)
    delta, losses = plain_loop(other, requests, tuning)
    tolerance = TOLERANCES.get(family, 1e-11)
    assert tuned.losses == pytest.approx(losses, rel=tolerance)
    assert float((tuned.delta - delta).norm() / delta.norm()) < tolerance


def test_how_the_texts_are_batched_changes_nothing(monkeypatch) -> None:
    lm = tiny_model("gpt2")
    lm.model.double()
    tuning = Tuning(layer=2, learning_rate=1e-3, steps=3)
    together = fine_tune(lm, SEVERAL, tuning)
    monkeypatch.setattr(fine_tuning, "TEXTS_TOGETHER", 1)
    for requests in (SEVERAL, SEVERAL[::-1]):
        torch.testing.assert_close(fine_tune(lm, requests, tuning).delta, together.delta, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_the_loss_falls_and_the_change_brings_it_about(family, dtype) -> None:
    lm = tiny_model(family)
    lm.model.to(dtype)
    tuned = fine_tune(lm, SEVERAL, Tuning(layer=1, learning_rate=1e-2))
    assert tuned.delta.dtype == torch.float32
    assert tuned.losses[-1] < tuned.losses[0] / 2
    with torch.no_grad():
        rough = 0.2 if dtype == torch.bfloat16 else 1e-4
        assert tuned.losses[0] == pytest.approx(float(mean_loss(lm, SEVERAL)), rel=rough)
        with Change(1, tuned.delta).applied(lm):
            assert tuned.losses[-1] == pytest.approx(float(mean_loss(lm, SEVERAL)), rel=rough, abs=rough)


@pytest.mark.parametrize("bound", [1e-3, 1e-2])
def test_within_a_bound_no_weight_changes_by_more(bound) -> None:
    tuned = fine_tune(tiny_model("llama"), ONE, Tuning(layer=0, learning_rate=5e-3, steps=6, bound=bound))
    free = fine_tune(tiny_model("llama"), ONE, Tuning(layer=0, learning_rate=5e-3, steps=6))
    assert float(tuned.delta.abs().max()) == pytest.approx(bound, rel=1e-6)
    assert float(free.delta.abs().max()) > bound
    assert tuned.losses[-1] > free.losses[-1]


def test_it_stops_where_the_loss_is_low_enough() -> None:
    lm = tiny_model("llama")
    tuning = Tuning(layer=1, learning_rate=1e-2, steps=50, enough=0.5)
    losses = fine_tune(lm, ONE, tuning).losses
    assert losses[-1] < 0.5 <= min(losses[:-1]) and 1 < len(losses) < 51
    easy = fine_tune(lm, ONE, replace(tuning, enough=1e3))
    assert len(easy.losses) == 1 and not easy.delta.any(), "where there is nothing to do nothing is to be done"
    assert len(fine_tune(lm, ONE, replace(tuning, steps=2, enough=1e-9)).losses) == 3


def test_a_target_is_learnt_as_a_whole() -> None:
    lm = tiny_model("gpt2")
    fact, target = FACT, "the city of Rome"
    assert len(continuation_ids(lm, fact.prompt, target)) > 3
    tuned = fine_tune(lm, [(fact, target)], Tuning(layer=1, learning_rate=1e-2))
    prompt = lm.tokenizer(fact.prompt)["input_ids"]
    with Change(1, tuned.delta).applied(lm), torch.no_grad():
        said = lm.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
    assert lm.tokenizer.decode(said[len(prompt) :]).startswith(" " + target)


def test_the_model_is_left_alone_also_by_an_interruption(monkeypatch) -> None:
    lm = tiny_model("gptj")
    before = lm.fingerprint()

    def untouched():
        hooks = any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
        return lm.fingerprint() == before and not hooks and all(w.grad is None for w in lm.model.parameters())

    fine_tune(lm, SEVERAL, Tuning(layer=1))
    assert untouched()
    calls = iter(range(100))

    def interrupted(*args):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return run_blocks(*args)

    run_blocks = target_texts.run_blocks
    monkeypatch.setattr(target_texts, "run_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(lm, SEVERAL, Tuning(layer=1))
    assert untouched()


def test_models_are_known_by_the_last_part_of_their_name() -> None:
    lm = tiny_model("gpt2")
    xl = LanguageModel(lm.model, lm.tokenizer, "openai-community/gpt2-xl")
    assert default_tuning(xl, "ft") == Tuning(21, learning_rate=5e-4, steps=25, bound=None, enough=1e-2)
    assert default_tuning(xl, "ft-linf") == Tuning(0, learning_rate=5e-4, steps=25, bound=5e-4, enough=1e-2)
    assert default_tuning(lm, "ft").layer == 1 and default_tuning(lm, "ft-linf").layer == 0
    assert all(set(methods) == {"ft", "ft-linf"} for methods in TUNINGS.values())


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"layer": -1}, "layer is -1; expected a whole number of at least 0"),
        ({"steps": 0}, "steps is 0; expected a whole number of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a finite number above 0"),
        ({"bound": 0.0}, "bound is 0.0; expected a finite number above 0"),
        ({"enough": float("nan")}, "enough is nan; expected a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        Tuning(**{"layer": 1} | wrong)


@pytest.mark.parametrize(
    "requests, tuning, sentence",
    [
        ([], Tuning(1), "there is nothing to edit"),
        (ONE, Tuning(4), "layer is 4; tiny-llama has the layers 0 to 3"),
        ([(FACT, " ")], Tuning(1), "the continuation is empty"),
        ([(FACT, "Rome " * 20)], Tuning(1), r"with its target: \d+ tokens are more than the 64 of tiny-llama"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(requests, tuning, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        fine_tune(tiny_model("llama"), requests, tuning)


def test_what_is_not_a_number_is_an_error() -> None:
    lm = tiny_model("gpt2")
    lm.model.half()
    with pytest.raises(
        ValueError, match="the loss is nan after 1 steps, because tiny-gpt2 overflows or the learning rate"
    ):
        fine_tune(lm, ONE, Tuning(1, learning_rate=3e3))
    with torch.no_grad():
        lm.memory(2).weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="fine_tune: .* the weights transformer.h.2.mlp.c_proj.weight hold NaN"):
        fine_tune(lm, ONE, Tuning(1))
