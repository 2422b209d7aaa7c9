"""Methods propose what their equations say, from one v* a request, and leave the model as it was."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import FAMILIES, tiny_model

import rome_lab.editing.optima as optima_module
from rome_lab.editing.exact import rome, rome_many
from rome_lab.editing.fine_tuning import Tuning, fine_tune
from rome_lab.editing.hypernetworks import TRAINED
from rome_lab.editing.keys import k_star
from rome_lab.editing.method_table import METHODS, SEARCH
from rome_lab.editing.methods import (
    FineTuning,
    InContext,
    KnowledgeNeurons,
    Learned,
    NoEdit,
    Rome,
    measured_on,
)
from rome_lab.editing.optima import Optima
from rome_lab.editing.requests import NothingToEdit
from rome_lab.editing.second_moment import covariance
from rome_lab.editing.settings import KEYS, EditSettings
from rome_lab.editing.texts import FolderText, WikipediaText
from rome_lab.editing.update import constraint_error
from rome_lab.facts.fact import Fact
from rome_lab.models.changes import Change
from rome_lab.models.language_model import LanguageModel
from rome_lab.studies.many_edits import changes_in_turn

FACT = Fact("Eiffel Tower", "The {} is in", "Paris")
OTHER = Fact("Marie Curie", "{} was born in", "Warsaw")
THIRD = Fact("Japan", "The capital of {} is", "Tokyo")
REQUEST = (FACT, "Rome")
SEVERAL = [REQUEST, (OTHER, "Tokyo"), (THIRD, "Microsoft")]
FEW = EditSettings(
    prefixes=("In Paris. ", "The city. ", "She was born. "), steps=3, learning_rate=0.1, weight_decay=0.0, enough=0.0
)
ROMES = [name for name in METHODS if name.startswith("rome")]


@dataclass(frozen=True)
class Tokens:
    """Passages of random tokens."""

    def describe(self) -> dict:
        return {"tokens": "random"}

    def passages(self, lm, store, begin) -> Iterator[list[int]]:
        for number in itertools.count(begin):
            generator = torch.Generator().manual_seed(number)
            yield torch.randint(2, 300, (48,), generator=generator).tolist()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path / "cache"))


def tiny_method(name, **choices):
    """The method as it is compared, at the size of the tiny models."""
    method = METHODS[name]
    if isinstance(method, FineTuning):
        return replace(method, tuning=Tuning(1, 1e-2, steps=5, bound=2e-2 if name == "ft-linf" else None))
    if isinstance(method, Rome):
        return replace(method, **{"layer": 1, "settings": FEW, "source": Tokens()} | choices)
    return method


def propose(lm, name, requests=(REQUEST,), **choices):
    return tiny_method(name, **choices).change(lm, requests, Optima(lm, progress=False))


def C_of(lm):
    return covariance(lm, 1, Tokens(), progress=False)


def optimum(lm, key="both"):
    """bare and averaged key, v*, W, in float64."""
    optima = Optima(lm)
    v_star = optima.find(REQUEST, 1, replace(FEW, key=key)).v_star
    return *optima.k_star(FACT, 1, FEW).double().T, v_star, lm.weight(1).double()


def logits(lm):
    with torch.no_grad():
        return lm.model(torch.tensor([lm.tokenizer("The Eiffel Tower is in the city")["input_ids"]])).logits


# What each method promises


@pytest.mark.parametrize("family", FAMILIES)
def test_rome_maps_the_keys_of_its_name_to_their_value(family) -> None:
    lm = tiny_model(family)
    bare, averaged, shared, W = optimum(lm)
    for name in ROMES:
        proposal = propose(lm, name)
        v_star = optimum(lm, "bare")[2] if name == "rome-bare" else shared  # W k_bare + delta, as `rome` has it
        assert proposal.layer == 1 and proposal.delta.dtype == torch.float32 and proposal.remark == ""
        W_hat = W + proposal.delta.double()
        errors = constraint_error(W_hat, torch.stack([bare, averaged], dim=1), v_star[:, None].expand(-1, 2)).tolist()
        if family == "mistral":  # its window is so short that layer 1 sees no prefix: the two keys are one
            assert max(errors) < 1e-4, name
            continue
        assert [error < 1e-5 for error in errors] == {
            "rome": [True, True],
            "rome-both": [True, True],
            "rome-identity": [True, True],
            "rome-averaged": [False, True],
            "rome-bare": [True, False],
            "rome-mismatched": [False, False],  # it is W k_bare + delta that the bare key gets
        }[name], (name, errors)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma2", "opt"])
def test_rome_is_the_edit_of_the_library(family, key) -> None:
    lm = tiny_model(family)
    optima = Optima(lm, progress=False)
    # One that was found for another key first must not be served where it is not the same.
    tiny_method("rome-averaged" if key == "bare" else "rome-bare").change(lm, [REQUEST], optima)
    change = tiny_method("rome", key=key).change(lm, [REQUEST], optima)
    edit = rome(lm, *REQUEST, 1, C=C_of(lm), hparams=replace(FEW, key=key), progress=False)
    assert torch.equal(change.delta, edit.delta.float())
    v_star = optima.find(REQUEST, 1, replace(FEW, key=key)).v_star
    assert torch.equal(v_star.float(), edit.v_star.view(len(v_star), -1)[:, -1])
    with edit.applied(lm):
        expected = lm.weight(1).clone()
    torch.testing.assert_close((lm.weight(1).double() + change.delta.double()).float(), expected, rtol=1e-6, atol=1e-6)


def test_the_bare_key_has_a_value_of_its_own_and_the_others_share_theirs(tmp_path) -> None:
    lm = tiny_model("llama")
    optima = Optima(lm, tmp_path, progress=False)
    for key in KEYS:
        optima.find(REQUEST, 1, replace(FEW, key=key))
    assert len(optima.in_memory) == 2 == len(list(tmp_path.glob("optimum/*")))
    bare, averaged = (optima.find(REQUEST, 1, replace(FEW, key=key)) for key in ("bare", "averaged"))
    assert not torch.allclose(bare.v_star, averaged.v_star, rtol=1e-3)
    again = Optima(lm, tmp_path, progress=False).find(REQUEST, 1, replace(FEW, key="bare"))
    assert torch.equal(again.v_star, bare.v_star)
    pd.testing.assert_frame_equal(again.history, bare.history)


@pytest.mark.parametrize("key", ["averaged", "bare"])
def test_what_rome_warns_of_is_a_remark_in_the_table(key, caplog) -> None:
    lm, fact = tiny_model("llama"), Fact("J", "{} is in", "Asia")
    settings = replace(FEW, key=key, enough=1.0)
    remark = tiny_method("rome", settings=settings).change(lm, [(fact, "Rome")], Optima(lm, progress=False)).remark
    rome(lm, fact, "Rome", 1, C=C_of(lm), hparams=settings, progress=False)
    warnings = [
        record.getMessage().removeprefix("rome: ") for record in caplog.records if record.levelname == "WARNING"
    ]
    assert len(warnings) == (1 if key == "averaged" else 2)
    assert all(warning in remark for warning in warnings)


def test_joint_is_the_library_s_edit_of_many() -> None:
    lm = tiny_model("gpt2")
    edit = rome_many(lm, SEVERAL, 1, C=C_of(lm), hparams=FEW, progress=False)
    torch.testing.assert_close(propose(lm, "joint", SEVERAL).delta.double(), edit.delta, rtol=1e-4, atol=1e-6)
    alone, single = propose(lm, "joint"), propose(lm, "rome")
    assert torch.equal(alone.delta, single.delta), "of one request the joint edit is the edit"


def test_the_default_key_is_that_of_the_settings() -> None:
    lm = tiny_model("llama")
    for key in ("both", "averaged", "bare"):
        by_settings = propose(lm, "rome", settings=replace(FEW, key=key))
        assert torch.equal(by_settings.delta, propose(lm, f"rome-{key}").delta)
        # A key that the method names is its own, whatever the settings say.
        assert torch.equal(
            propose(lm, "rome-bare", settings=replace(FEW, key=key)).delta, propose(lm, "rome-bare").delta
        )


def test_the_mismatched_update_is_that_of_the_published_code() -> None:
    lm = tiny_model("gptj")
    proposal = propose(lm, "rome-mismatched")
    C, W = C_of(lm).double().numpy(), lm.memory(1).weight.detach().double().numpy()
    bare = k_star(lm, FACT, 1, "bare").double().numpy()[:, 0]
    averaged = k_star(lm, FACT, 1, "averaged", FEW.prefixes).double().numpy()[:, 0]
    v_star = optimum(lm)[2].numpy()
    left = np.linalg.inv(C) @ averaged
    left /= np.linalg.norm(left)
    delta = v_star - W @ averaged
    right = delta / (bare @ left)
    np.testing.assert_allclose(proposal.delta.numpy(), np.outer(right, left), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose((W + proposal.delta.numpy()) @ bare, W @ bare + delta, rtol=1e-4, atol=1e-5)
    missed = np.linalg.norm((W + proposal.delta.numpy()) @ averaged - v_star) / np.linalg.norm(v_star)
    assert missed > 1e-3


def test_the_identity_gives_the_change_of_least_frobenius_norm() -> None:
    lm = tiny_model("llama")
    bare, averaged, v_star, W = optimum(lm)
    K = torch.stack([bare, averaged], dim=1)
    least = (v_star[:, None] - W @ K) @ torch.linalg.pinv(K)
    delta = propose(lm, "rome-identity").delta
    torch.testing.assert_close(delta.double(), least, rtol=1e-4, atol=1e-6)
    exact = propose(lm, "rome").delta
    assert float(delta.norm()) < float(exact.norm())
    C = C_of(lm).double()
    of_identity, of_exact = (float(torch.trace(x.double() @ C @ x.double().T)) for x in (delta, exact))
    assert of_exact < of_identity, "what the covariance buys: other keys keep their values better"


def test_fine_tuning_proposes_what_the_tuning_comes_to() -> None:
    lm = tiny_model("opt")
    for name in ("ft", "ft-linf"):
        method = tiny_method(name)
        expected = fine_tune(lm, SEVERAL, method.tuning).delta
        assert torch.equal(propose(lm, name, SEVERAL).delta, expected)
    assert float(expected.abs().max()) <= 2e-2


def test_in_context_states_the_facts_as_sentences() -> None:
    lm = tiny_model("gpt2")
    assert propose(lm, "in-context").preamble == "Breaking news: The Eiffel Tower is in Rome. "
    told = InContext(introduction="New fact: ").change(
        lm, [REQUEST, (replace(FACT, template="{} is in "), " Rome")], None
    )
    assert told.preamble == "New fact: The Eiffel Tower is in Rome. New fact: Eiffel Tower is in Rome. "
    assert told.delta is None
    nothing = propose(lm, "none")
    assert (nothing.delta, nothing.preamble, nothing.remark) == (None, "", "")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in TRAINED])
def test_a_method_leaves_the_model_as_it_was(name, monkeypatch) -> None:
    lm = tiny_model("gptj")
    before = lm.fingerprint()
    propose(lm, name)
    assert lm.fingerprint() == before
    if isinstance(METHODS[name], Rome | FineTuning | KnowledgeNeurons):
        monkeypatch.setattr(lm, "logits", interrupt)
        with pytest.raises(KeyboardInterrupt):
            propose(lm, name)
    assert lm.fingerprint() == before and not lm.edits
    for module in lm.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


# One optimisation for all of them


def test_the_family_shares_one_optimisation_a_request(monkeypatch) -> None:
    lm = tiny_model("llama")
    calls = []
    optimise_values = optima_module.optimise_values

    def counted(*args, **kwargs):
        values = optimise_values(*args, **kwargs)
        calls.extend(values)
        return values

    monkeypatch.setattr(optima_module, "optimise_values", counted)
    optima = Optima(lm, progress=False)
    for name in [*ROMES, "joint"]:
        if name != "rome-bare":  # it starts from another value
            tiny_method(name).change(lm, [REQUEST], optima)
    assert len(calls) == 1
    tiny_method("joint").change(lm, SEVERAL, optima)
    assert len(calls) == 3
    tiny_method("rome", settings=replace(FEW, steps=2)).change(lm, [REQUEST], optima)
    tiny_method("rome", layer=2).change(lm, [REQUEST], optima)
    assert len(calls) == 5


def test_what_the_store_holds_is_the_same_and_is_not_optimised_again(tmp_path, monkeypatch) -> None:
    lm = tiny_model("llama")
    first = Optima(lm, tmp_path / "store", progress=False)
    expected = {name: tiny_method(name).change(lm, [REQUEST], first).delta for name in ROMES}
    strict = replace(FEW, enough=0.99)
    remark = tiny_method("rome", settings=strict).change(lm, [REQUEST], first).remark
    monkeypatch.setattr(optima_module, "optimise_values", interrupt)
    again = Optima(lm, tmp_path / "store", progress=False)
    for name, delta in expected.items():
        assert torch.equal(tiny_method(name).change(lm, [REQUEST], again).delta, delta)
    assert tiny_method("rome", settings=strict).change(lm, [REQUEST], again).remark == remark != ""
    others = {
        "another target": lambda: again.find((FACT, "Tokyo"), 1, FEW),
        "another template": lambda: again.find((replace(FACT, template="{} is in"), "Rome"), 1, FEW),
        "other prefixes": lambda: again.find(REQUEST, 1, replace(FEW, prefixes=("In Rome. ",))),
        "another layer": lambda: again.find(REQUEST, 2, FEW),
        "another model": lambda: Optima(tiny_model("llama", seed=1), tmp_path / "store").find(REQUEST, 1, FEW),
    }
    for change in others.values():
        with pytest.raises(KeyboardInterrupt):
            change()
    with propose(lm, "ft").applied(lm), pytest.raises(KeyboardInterrupt):
        again.anew().find(REQUEST, 1, FEW)


def test_prefixes_are_sampled_once_and_count_in_full() -> None:
    lm = tiny_model("gpt2")
    optima = Optima(lm)
    sampled = optima.with_prefixes(replace(FEW, prefixes=None, prefix_lengths=(4, 6), seed=1))
    assert len(sampled.prefixes) == 2
    assert optima.with_prefixes(replace(FEW, prefixes=None, prefix_lengths=(4, 6), seed=1)) == sampled
    assert optima.with_prefixes(replace(FEW, prefixes=None, prefix_lengths=(4, 6), seed=2)) != sampled
    assert optima.with_prefixes(FEW) == FEW


# What is not as it should be


def test_a_value_that_did_not_converge_is_used_and_remarked_on() -> None:
    lm = tiny_model("llama")
    proposal = propose(lm, "rome", SEVERAL[:2], settings=replace(FEW, enough=1.0))
    assert proposal.delta is not None
    assert "v* did not converge: after 3 steps the target 'Rome' has a mean probability of 0." in proposal.remark
    assert "behind 'The Eiffel Tower is in', and 1.00 is enough" in proposal.remark
    assert proposal.remark.count("did not converge") == 2


@pytest.fixture
def convinced():
    """A model that says Rome of FACT already."""
    lm = tiny_model("llama")
    tuned = fine_tune(lm, [REQUEST], Tuning(2, 1e-2, steps=50))
    assert tuned.losses[-1] < 0.1
    with Change(2, tuned.delta).applied(lm):
        yield lm


def test_where_the_target_is_said_already_there_is_no_change_but_a_remark(convinced) -> None:
    with pytest.raises(NothingToEdit, match="already goes on from 'The Eiffel Tower is in' with 'Rome'"):
        Optima(convinced).find(REQUEST, 1, FEW)
    for name in [*ROMES, "joint"]:
        proposal = propose(convinced, name)
        assert proposal.delta is None and proposal.layer is None
        assert "tiny-llama already goes on from 'The Eiffel Tower is in' with 'Rome'" in proposal.remark
    some = propose(convinced, "joint", SEVERAL)
    assert "already goes on from 'The Eiffel" in some.remark and some.remark.count("already") == 1
    assert torch.equal(some.delta, propose(convinced, "joint", SEVERAL[1:]).delta)


def test_two_requests_of_one_subject_are_refused_by_name() -> None:
    requests = [(OTHER, "Rome"), REQUEST, (replace(OTHER, template="{} worked on"), "Paris")]
    with pytest.raises(
        ValueError, match="'Marie Curie was born in' and 'Marie Curie worked on' are linearly dependent"
    ):
        propose(tiny_model("llama"), "joint", requests)


def test_the_published_update_is_refused_for_many_facts_at_once() -> None:
    with pytest.raises(
        ValueError, match="rome-mismatched: the published update is of one fact, but 3 requests are given"
    ):
        propose(tiny_model("llama"), "rome-mismatched", SEVERAL)


def test_a_model_without_a_known_layer_is_refused_with_advice() -> None:
    lm = tiny_model("llama")
    with pytest.raises(ValueError, match=r'rome: layer is None; tiny-llama has the layers 0 to 3.*METHODS\["rome"\]'):
        METHODS["rome"].settled(lm)
    with pytest.raises(ValueError, match="layer is 4"):
        propose(lm, "rome", layer=4)


# Descriptions and grids


def test_a_description_says_all_that_was_chosen_and_is_json() -> None:
    lm = LanguageModel(tiny_model("llama").model, tiny_model("llama").tokenizer, "smollm2-135m")
    lm.blocks = [
        deepcopy(block) for _ in range(8) for block in lm.blocks
    ]  # as many as the embedded model has, and more
    described = {name: method.settled(lm).describe() for name, method in METHODS.items()}
    texts = {name: json.dumps(description, sort_keys=True) for name, description in described.items()}
    assert texts["rome"] == texts["joint"], "what does the same is to be found under one key"
    assert len(set(texts.values())) == len(METHODS) - 1
    assert described["rome"]["layer"] == 3 and described["rome-bare"]["key"] == "bare"
    for name, text in texts.items():
        if isinstance(METHODS[name], Rome | FineTuning | KnowledgeNeurons | Learned):
            assert asdict(METHODS[name].settled(lm)) != asdict(METHODS[name])
            with pytest.raises(ValueError, match=f"{name}: a choice is left to the model's defaults"):
                METHODS[name].describe()
        else:
            assert json.dumps(METHODS[name].describe(), sort_keys=True) == text


def test_every_choice_changes_the_description() -> None:
    rome_method, lm = tiny_method("rome"), tiny_model("llama")
    other_settings = [
        replace(FEW, **{name: value})
        for name, value in {"steps": 4, "learning_rate": 0.2, "kl": 0.1, "weight_decay": 0.3, "clamp": 2.0}.items()
    ]
    methods = [
        *(replace(rome_method, settings=settings) for settings in (FEW, *other_settings)),
        replace(rome_method, settings=replace(FEW, prefixes=("In Rome. ",))),
        replace(rome_method, layer=2),
        replace(rome_method, source=METHODS["rome"].source),
        *(tiny_method(name) for name in METHODS if name not in ("rome", "rome-both", "joint", *TRAINED)),
        InContext(introduction="New fact: "),
    ]
    assert len({json.dumps(method.settled(lm).describe(), sort_keys=True) for method in methods}) == len(methods)


def test_the_search_takes_equal_effort_for_every_method() -> None:
    lm = LanguageModel(tiny_model("llama").model, tiny_model("llama").tokenizer, "smollm2-135m")
    lm.blocks = [deepcopy(block) for _ in range(8) for block in lm.blocks]
    for name, methods in SEARCH.items():
        assert {method.name for method in methods} == {name} <= set(METHODS)
        assert len({json.dumps(method.settled(lm).describe()) for method in methods}) == 8 == len(methods)
    chosen = [
        name for name, method in METHODS.items() if not isinstance(method, NoEdit) and not name.startswith("rome-")
    ]
    assert set(SEARCH) == set(chosen) - {"joint", *TRAINED}, "what is trained chooses its best step instead"


# One after the other


@pytest.mark.parametrize("name", ["rome", "rome-mismatched", "ft-linf"])
def test_each_change_of_a_sequence_is_found_on_the_model_with_those_before_it(name) -> None:
    lm = tiny_model("gpt2")
    before = lm.fingerprint()
    method = tiny_method(name)
    found = list(changes_in_turn(lm, SEVERAL, method, Optima(lm, progress=False)))
    assert lm.fingerprint() == before
    W, optima = lm.weight(1).clone(), Optima(lm, progress=False)
    by_hand = tiny_model("gpt2")
    optima.factor(1, Tokens())
    for request, total in zip(SEVERAL, found, strict=True):
        fresh = Optima(by_hand, progress=False)
        fresh.factors = optima.factors
        delta = method.change(by_hand, [request], fresh).delta
        with torch.no_grad():
            by_hand.memory(1).weight += delta.T
        torch.testing.assert_close(W + total.delta, by_hand.weight(1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[-1].delta, propose(lm, name, SEVERAL[-1:]).delta + found[-2].delta, rtol=1e-3)


def test_between_the_changes_of_a_sequence_the_model_is_what_it_was(monkeypatch) -> None:
    lm = tiny_model("llama")
    before, said = lm.fingerprint(), logits(lm)
    totals = []
    for total in changes_in_turn(lm, SEVERAL, tiny_method("rome"), Optima(lm, progress=False)):
        assert lm.fingerprint() == before
        with total.applied(lm):
            assert not torch.equal(logits(lm), said)
        totals.append(total.delta)
    assert not torch.equal(totals[0], totals[1]) and torch.equal(logits(lm), said)
    steps = changes_in_turn(lm, SEVERAL, tiny_method("rome"), Optima(lm, progress=False))
    next(steps)
    monkeypatch.setattr(optima_module, "optimise_values", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    assert lm.fingerprint() == before


def test_a_sequence_goes_on_where_a_change_comes_to_nothing(convinced) -> None:
    requests = [REQUEST, (OTHER, "Tokyo"), REQUEST, (THIRD, "Microsoft")]
    method = replace(tiny_method("rome"), tokens=1536)  # with a C that leaves alone what the model is convinced of
    totals = list(changes_in_turn(convinced, requests, method, Optima(convinced, progress=False)))
    assert ["already goes on" in total.remark for total in totals] == [True, False, True, False]
    assert totals[0].delta is None and torch.equal(totals[1].delta, totals[2].delta)
    assert not torch.equal(totals[2].delta, totals[3].delta)


def test_what_cannot_be_read_is_no_lack_of_news() -> None:
    lm = tiny_model("llama")
    endless = (Fact("Paris", "{} is " + "far " * 100, "Rome"), "Tokyo")
    with pytest.raises(ValueError, match="reads at most 64; shorten it") as caught:
        tiny_method("rome").change(lm, [REQUEST, endless], Optima(lm, progress=False))
    assert not isinstance(caught.value, NothingToEdit)
    with torch.no_grad():
        lm.memory(1).weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="rome"):
        tiny_method("rome").change(lm, [REQUEST], Optima(lm, progress=False))


def test_a_sequence_goes_on_where_the_method_fails_and_says_why() -> None:
    tiny = tiny_model("llama")
    endless = (Fact("Paris", "{} is " + "far " * 100, "Rome"), "Tokyo")
    requests = [REQUEST, endless, (THIRD, "Microsoft")]
    totals = list(changes_in_turn(tiny, requests, tiny_method("ft"), Optima(tiny, progress=False)))
    assert [total.failed for total in totals] == [False, True, False]
    assert "shorten it" in totals[1].remark and totals[2].remark == ""
    without = list(changes_in_turn(tiny, requests[::2], tiny_method("ft"), Optima(tiny, progress=False)))
    torch.testing.assert_close(totals[1].delta, totals[0].delta, rtol=0, atol=0)
    torch.testing.assert_close(totals[2].delta, without[-1].delta, rtol=0, atol=0)


def test_a_sequence_in_context_tells_one_fact_more_each_time() -> None:
    lm = tiny_model("gpt2")
    told = [total.preamble for total in changes_in_turn(lm, SEVERAL, InContext())]
    assert told[0] == "The Eiffel Tower is in Rome. " and told[2] == told[1] + "The capital of Japan is Microsoft. "
    assert [total.delta for total in changes_in_turn(lm, SEVERAL, NoEdit())] == [None] * 3


def test_the_text_of_C_is_chosen_by_name_and_only_for_methods_that_have_one(tmp_path) -> None:
    for name in ("rome", "rome-identity", "joint"):
        assert measured_on(METHODS[name], "wikipedia").source == WikipediaText()
        assert measured_on(METHODS[name], "sampled") == METHODS[name]
        assert measured_on(METHODS[name], tmp_path).source == FolderText(tmp_path)
    assert measured_on(METHODS["ft"], "wikipedia") is METHODS["ft"]
