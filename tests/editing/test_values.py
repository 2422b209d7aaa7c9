"""v*: the loop over suffixes finds what a plain loop of full forwards finds, and the loss is what it says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, tiny_model

from benchmarks.plain import plain_loop
from rome_lab.editing.keys import k_star, sample_prefixes
from rome_lab.editing.settings import EditSettings
from rome_lab.editing.values import Objective, optimise_values
from rome_lab.facts.fact import Fact
from rome_lab.facts.prompts import continuation_ids

FACT = Fact("Eiffel Tower", "The {} is in", "Paris")
PREFIXES = ("In Paris. ", "The city. ", "She was born. ", "A tower in Rome. ")
FEW = EditSettings(prefixes=PREFIXES, steps=6)


def original_value(lm, layer, fact):
    """(D,) W k, by one product."""
    W = lm.memory(layer).weight.detach()
    W = W.T if lm.memory_is_transposed(layer) else W
    return W @ k_star(lm, fact, layer, "bare").to(W)[:, 0]


def objective(lm, layer=1, fact=FACT, target="Rome", settings=FEW):
    return Objective(lm, layer, [(fact, target)], original_value(lm, layer, fact)[None], settings)


def optimise_value(goal, **options):
    """Of an objective of one request."""
    (value,) = optimise_values(goal, **options)
    return value


CASES = {
    "subject in the middle": (FACT, "Rome", 1),
    "subject first, target of many tokens": (Fact("Marie Curie", "{} was born in", "Warsaw"), "the city of Rome", 2),
    "subject at the end": (Fact("Japan", "The capital of {}", "Tokyo"), " is", 0),
    "last layer": (Fact("Tokyo", "The capital of Japan is not {}", "x"), "Rome", 3),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_over_suffixes_finds_what_the_plain_loop_finds(family, case) -> None:
    lm = tiny_model(family)
    lm.model.double()
    fact, target, layer = CASES[case]
    settings = replace(FEW, learning_rate=0.1, weight_decay=0.01, clamp=0.8 if case == "last layer" else 4.0)
    value = optimise_value(objective(lm, layer, fact, target, settings), progress=False)
    delta, history = plain_loop(lm, layer, (fact, target), original_value(lm, layer, fact), settings)
    # In float64, but Llama's kin compute their norms in float32, where a difference in the last place grows step by step.
    assert history == pytest.approx(value.history["loss"].tolist(), rel=1e-5)
    assert float((value.delta - delta).norm()) <= 1e-4 * float(delta.norm())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_the_published_objective_is_that_of_the_plain_loop_and_another_one(family) -> None:
    lm = tiny_model(family)
    lm.model.double()
    fact, target, layer = CASES["subject first, target of many tokens"]
    settings = replace(FEW, learning_rate=0.1, weight_decay=0.5, kl=0.5, objective="published")
    value = optimise_value(objective(lm, layer, fact, target, settings), progress=False)
    delta, history = plain_loop(lm, layer, (fact, target), original_value(lm, layer, fact), settings)
    assert history == pytest.approx(value.history["loss"].tolist(), rel=1e-5)
    assert float((value.delta - delta).norm()) <= 1e-4 * float(delta.norm())
    ours = optimise_value(objective(lm, layer, fact, target, replace(settings, objective="scale-free")), progress=False)
    assert float((value.delta - ours.delta).norm()) > 1e-2 * float(delta.norm())
    with pytest.raises(ValueError, match="objective is 'mine'; expected one of 'scale-free', 'published'"):
        replace(settings, objective="mine")


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_side_by_side_find_what_each_finds_alone(family) -> None:
    lm = tiny_model(family)
    lm.model.double()
    requests = [CASES[case][:2] for case in ("subject in the middle", "subject first, target of many tokens")]
    settings = replace(FEW, learning_rate=0.1, weight_decay=0.01, clamp=0.8, early_stop=True)
    for objective in ("scale-free", "published"):
        chosen = replace(settings, objective=objective)
        originals = torch.stack([original_value(lm, 1, fact) for fact, _ in requests])
        several = optimise_values(Objective(lm, 1, requests, originals, chosen), progress=False)
        for request, original, value in zip(requests, originals, several, strict=True):
            (alone,) = optimise_values(Objective(lm, 1, [request], original[None], chosen), progress=False)
            assert value.history["loss"].tolist() == pytest.approx(alone.history["loss"].tolist(), rel=1e-5)
            assert float((value.delta - alone.delta).norm()) <= 1e-4 * float(alone.delta.norm())
            assert value.converged == alone.converged


def test_a_request_that_is_stopped_leaves_the_others_going() -> None:
    lm = tiny_model("llama")
    requests = [CASES[case][:2] for case in ("subject in the middle", "subject first, target of many tokens")]
    originals = torch.stack([original_value(lm, 1, fact) for fact, _ in requests])
    rows = []
    first, second = optimise_values(
        Objective(lm, 1, requests, originals, FEW),
        progress=False,
        callback=lambda row: rows.append(row) or len(rows) == 3,
    )
    assert first.history["step"].tolist() == [0, 1] and second.history["step"].tolist() == list(range(FEW.steps + 1))
    (alone,) = optimise_values(Objective(lm, 1, requests[:1], originals[:1], replace(FEW, steps=1)), progress=False)
    torch.testing.assert_close(first.delta, alone.delta, rtol=1e-4, atol=1e-6)


def test_the_embedded_model_gives_the_plain_loops_value(lm) -> None:
    fact = Fact("Eiffel Tower", "The {} is located in the city of", "Paris")
    settings = EditSettings(prefixes=sample_prefixes(lm, EditSettings().prefix_lengths), steps=3)
    value = optimise_value(objective(lm, 6, fact, "Rome", settings), progress=False)
    delta, _ = plain_loop(lm, 6, (fact, "Rome"), original_value(lm, 6, fact), settings)
    assert float((value.delta - delta).norm() / delta.norm()) < 1e-4


def test_the_history_starts_at_the_model_as_it_is_and_its_terms_add_up() -> None:
    lm = tiny_model("gpt2")
    value = optimise_value(objective(lm), progress=False)
    history = value.history
    assert list(history) == ["step", "loss", "nll", "kl", "weight_decay", "p_target", "norm"]
    assert history["step"].tolist() == list(range(FEW.steps + 1))
    assert (history["loss"] - history[["nll", "kl", "weight_decay"]].sum(axis=1)).abs().max() < 1e-5
    assert history.loc[0, ["kl", "weight_decay", "norm"]].tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    nll, p = [], []
    for prefix in ("", *PREFIXES):
        ids = lm.tokenizer(prefix + FACT.prompt)["input_ids"]
        target = continuation_ids(lm, FACT.prompt, "Rome")
        logits = lm.model(torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1]
        nll.append(-float(logits.log_softmax(-1)[range(len(target)), target].sum().detach()))
        p.append(math.exp(-nll[-1]))
    assert history.loc[0, "nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert history.loc[0, "p_target"] == pytest.approx(sum(p) / len(p), rel=1e-4)
    assert history["nll"].iloc[-1] < history["nll"].iloc[0]


def test_the_value_is_the_step_with_the_least_loss() -> None:
    lm = tiny_model("llama")
    wild = replace(FEW, learning_rate=30.0, clamp=50.0)  # overshoots, so that the last step is not the best
    goal = objective(lm, settings=wild)
    value = optimise_value(goal, progress=False)
    best = value.history["loss"].idxmin()
    assert best < len(value.history) - 1, "the optimisation was to overshoot here"
    with torch.no_grad():
        assert float(goal(value.delta[None])["loss"]) == pytest.approx(value.history["loss"][best], rel=1e-5)


def test_the_change_stays_within_the_clamp() -> None:
    lm = tiny_model("opt")
    value = optimise_value(objective(lm, settings=replace(FEW, clamp=0.1)), progress=False)
    assert value.history["norm"].max() == pytest.approx(0.1, rel=1e-5)
    unclamped = optimise_value(objective(lm), progress=False)
    assert unclamped.history["norm"].max() > 0.2


def test_where_the_change_cannot_reach_the_target_nothing_is_changed() -> None:
    value = optimise_value(objective(tiny_model("gpt2"), layer=3), progress=False)  # last layer, subject not at the end
    assert float(value.delta.norm()) == 0 and not value.converged
    assert value.history["loss"].max() == pytest.approx(value.history["loss"].min(), rel=1e-6)


def test_a_value_that_leaves_the_target_improbable_is_marked() -> None:
    lm = tiny_model("llama")
    weak = optimise_value(objective(lm, settings=replace(FEW, steps=1, learning_rate=1e-4)), progress=False)
    assert weak.history["p_target"].max() < 0.5 and not weak.converged
    lenient = replace(FEW, steps=1, learning_rate=1e-4, enough=0.0)
    assert optimise_value(objective(lm, settings=lenient), progress=False).converged


def test_the_callback_sees_every_step_and_may_stop() -> None:
    lm = tiny_model("llama")
    rows = []
    value = optimise_value(objective(lm), progress=False, callback=lambda row: rows.append(row) or len(rows) == 3)
    assert [row["step"] for row in rows] == [0, 1, 2] == value.history["step"].tolist()
    assert rows == value.history.to_dict("records")


def test_an_interrupted_optimisation_leaves_the_model_as_it_was() -> None:
    lm = tiny_model("gptj")
    before = lm.fingerprint()

    def interrupt(row):
        if row["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimise_value(objective(lm), progress=False, callback=interrupt)
    assert lm.fingerprint() == before
    for module in lm.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(weight.grad is None and weight.requires_grad for weight in lm.model.parameters())


def test_bfloat16_optimises_in_float32() -> None:
    lm = tiny_model("llama")
    lm.model.bfloat16()
    value = optimise_value(objective(lm), progress=False)
    assert value.delta.dtype == torch.float32
    assert value.history["nll"].iloc[-1] < value.history["nll"].iloc[0]


def test_a_loss_that_is_not_a_number_is_an_error() -> None:
    lm = tiny_model("llama")
    goal = objective(lm)
    with torch.no_grad():
        lm.memory(2).weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="the loss is nan at step 0 of v"):
        optimise_value(goal, progress=False)
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        objective(lm)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"key": "mean"}, "key is 'mean'; expected one of"),
        ({"steps": 0}, "steps is 0; expected a whole number of at least 1"),
        ({"steps": 2.5}, "steps is 2.5; expected a whole number"),
        ({"prefix_lengths": (5, 0)}, r"prefix_lengths\[1\] is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a finite number above 0"),
        ({"kl": -1.0}, "kl is -1.0; expected a finite number of at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"clamp": float("inf")}, "clamp is inf"),
        ({"seed": "0"}, "seed is '0'"),
        ({"prefixes": "In Paris. "}, "prefixes is 'In Paris. '; expected a list of texts"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        EditSettings(**wrong)


def test_a_text_that_is_too_long_with_its_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"with its prefix and its target: \d+ tokens are more than the 64 of tiny-"):
        objective(tiny_model("llama"), target="of Rome " * 12)
