"""Searching settings: on cases of their own, with equal effort, sharing v*, the best one told."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from bench import EDITING, QUICK, case

from rome_lab import covariance, rome
from rome_lab.editing.fine_tuning import Tuning
from rome_lab.editing.method_table import METHODS, SEARCH
from rome_lab.editing.methods import FineTuning, Rome
from rome_lab.editing.optima import Optima
from rome_lab.evaluation.evaluating import evaluate
from rome_lab.studies import search as module
from rome_lab.studies.search import best, compare_methods, configurations_of, differences, search_settings

CASES = [case(i, subject) for i, subject in enumerate(("Paris", "Japan", "Warsaw"))]
OPTIONS = {"progress": False, "settings": QUICK}


pytestmark = pytest.mark.usefixtures("shared_cache")


def rome_at(layer: int, **settings) -> Rome:
    return Rome(layer=layer, settings=replace(EDITING, **settings))


def tuned(**settings) -> FineTuning:
    return FineTuning("ft", Tuning(1, **({"steps": 3} | settings)))


def test_every_configuration_has_the_metrics_that_evaluating_it_alone_gives(tiny):
    choices = {"rome": [rome_at(1), rome_at(2)], "ft": [tuned(steps=2), tuned(steps=3)]}
    found = search_settings(tiny, CASES, choices, **OPTIONS)
    assert list(found.columns) == ["method", "configuration", "metric", "mean", "ci_low", "ci_high", "n", "over"]
    names = list(dict.fromkeys(zip(found["method"], found["configuration"], strict=True)))
    assert names == [("rome", "layer 1"), ("rome", "layer 2"), ("ft", "steps 2"), ("ft", "steps 3")]
    means = found.set_index(["configuration", "metric"])["mean"]
    for label, method in (("layer 2", rome_at(2)), ("steps 2", tuned(steps=2))):
        alone = evaluate(tiny, CASES, method, unrelated=(), **OPTIONS)
        for metric in ("ES", "EM", "PM", "NM", "nll"):
            assert means[label, metric] == pytest.approx(alone[metric].mean(), rel=1e-3), metric
    assert not {"known", "GE", "RS"} & set(found["metric"])


def test_methods_are_searched_with_equal_effort(tiny):
    with pytest.raises(ValueError, match="rome: 2, ft: 1; give each method the same number"):
        search_settings(tiny, CASES, {"rome": [rome_at(1), rome_at(2)], "ft": [tuned()]}, **OPTIONS)
    with pytest.raises(ValueError, match="configurations are none"):
        search_settings(tiny, CASES, {}, **OPTIONS)
    assert len({len(several) for several in SEARCH.values()}) == 1


def test_some_methods_are_searched_alone_and_unknown_ones_refused():
    assert set(configurations_of(2)) == set(SEARCH)
    chosen = configurations_of(2, ways=["ft", "rome"])
    assert list(chosen) == ["ft", "rome"] and chosen["ft"] == list(SEARCH["ft"][:2])
    with pytest.raises(ValueError, match="search: none, ftt: nothing to search; ways are rome, memit"):
        configurations_of(2, ways=["none", "rome", "ftt"])


def test_configurations_are_told_apart_by_what_differs_in_any_of_them():
    settled = [replace(rome_at(1, kl=kl), key="bare") for kl in (0.1, 0.2)]
    assert differences(settled) == ["kl 0.1", "kl 0.2"]
    assert differences([tuned(learning_rate=0.1, bound=1.0), tuned()]) == [
        "learning rate 0.1, bound 1.0",
        "learning rate 0.0005, bound None",
    ]


def test_the_best_is_the_first_with_the_highest_mean():
    rows = [
        ("a", "x", "S", 1.0),
        ("a", "y", "S", 3.0),
        ("a", "z", "S", 3.0),
        ("a", "x", "ES", 9.0),
        ("b", "x", "S", 2.0),
    ]
    found = pd.DataFrame(rows, columns=["method", "configuration", "metric", "mean"]).assign(n=2)
    chosen = best(found)
    assert list(zip(chosen["method"], chosen["configuration"], strict=True)) == [("a", "y"), ("b", "x")]
    assert best(found, "ES")["configuration"].tolist() == ["x"]


@pytest.mark.parametrize(("keys", "times"), [(("averaged", "both", "all"), 1), (("bare", "both"), 2)])
def test_a_sweep_finds_v_star_once_for_all_keys_of_one_start_and_covariances(tiny, monkeypatch, keys, times):
    found = []
    real = Optima.optimise
    monkeypatch.setattr(Optima, "optimise", lambda *args: found.extend(args[1]) or real(*args))
    choices = {(key, n): Rome(layer=1, settings=EDITING, key=key, tokens=n) for key in keys for n in (300, 600)}
    table = compare_methods(tiny, CASES, choices, ["key", "tokens"], **OPTIONS)
    assert len(found) == times * len(CASES)
    assert set(zip(table["key"], table["tokens"], strict=True)) == set(choices)
    assert set(table["n"]) == {len(CASES)}
    assert table[table["metric"] == "NM"]["mean"].nunique() == len(choices)


def test_the_covariance_of_so_many_tokens_is_the_one_that_is_used(tiny):
    method = Rome(layer=1, settings=EDITING, key="both", tokens=300)
    request = (CASES[0].fact, CASES[0].target)
    delta = method.change(tiny, [request], Optima(tiny, progress=False)).delta
    C = covariance(tiny, 1, tokens=300, progress=False)
    edit = rome(tiny, *request, layer=1, C=C, hparams=EDITING, progress=False)
    torch.testing.assert_close(delta.double(), edit.delta, rtol=1e-4, atol=1e-7)
    assert method.describe() != replace(method, tokens=600).describe()


def test_interrupted_it_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    choices = {"ft": [tuned(steps=2), tuned(steps=3)]}
    first = search_settings(tiny, CASES, choices, store=tmp_path, **OPTIONS)
    monkeypatch.setattr(FineTuning, "change", lambda *args: pytest.fail("tuned again"))
    pd.testing.assert_frame_equal(search_settings(tiny, CASES, choices, store=tmp_path, **OPTIONS), first)


@pytest.fixture
def rome_here(monkeypatch) -> Rome:
    """A tiny model has no defaults; this ROME stands for them."""
    monkeypatch.setitem(METHODS, "rome", replace(rome_at(1), key="bare"))
    return METHODS["rome"]


def means_of(swept: pd.DataFrame, **where) -> pd.Series:
    rows = swept
    for name, value in where.items():
        rows = rows[rows[name] == value]
    return rows.set_index("metric")["mean"]


def alone(lm, method: Rome) -> pd.Series:
    return compare_methods(lm, CASES[:2], {("x",): method}, ["it"], progress=False).set_index("metric")["mean"]


def test_sweeps_change_one_thing_and_leave_the_rest_as_published_or_as_it_is(tiny, rome_here):
    published = replace(rome_here, settings=replace(rome_here.settings, weight_decay=module.PUBLISHED_DECAY))
    layers = module.sweep_layers(tiny, CASES[:2], [2, 0, 99])
    assert list(dict.fromkeys(layers["layer"])) == [2, 0]
    pd.testing.assert_series_equal(
        means_of(layers, layer=2, key="averaged"), alone(tiny, replace(published, layer=2, key="averaged"))
    )
    tokens = module.sweep_tokens(tiny, rome_here, CASES[:2], [600, 300])
    assert list(dict.fromkeys(tokens["tokens"])) == [300, 600]
    measured = Rome(key="bare", layer=1, settings=published.settings, tokens=600)
    pd.testing.assert_series_equal(means_of(tokens, tokens=600), alone(tiny, measured))
    changes = module.sweep_changes(tiny, rome_here, CASES[:2], 1)
    assert list(dict.fromkeys(changes["change"])) == ["as it is", "weight decay 0.5"]
    pd.testing.assert_series_equal(means_of(changes, change="as it is"), alone(tiny, rome_here))
    pd.testing.assert_series_equal(means_of(changes, change="weight decay 0.5"), alone(tiny, published))


def swept(along: str, by: str, values: dict, names=("S", "ES", "PS", "NS")) -> pd.DataFrame:
    rows = [
        {along: at, by: name, "metric": metric, "mean": mean, "ci_low": mean, "ci_high": mean, "n": 2, "over": "cases"}
        for (at, name), mean in values.items()
        for metric in names
    ]
    return pd.DataFrame(rows)


def test_where_a_model_has_no_default_the_best_layer_of_the_sweep_is_taken(tiny):
    by_layer = swept("layer", "key", {(layer, key): 10.0 * layer for layer in (1, 2, 0) for key in module.KEYS})
    rome = module.rome_at_best(tiny, by_layer)
    assert rome.layer == 2 and rome.key == rome.settings.key == "both"


def test_a_configuration_that_failed_at_some_cases_is_not_the_best():
    rows = [("kn", "a", 90.0, 1), ("kn", "b", 50.0, 2), ("ft", "c", 40.0, 1)]
    found = pd.DataFrame(rows, columns=["method", "configuration", "mean", "n"]).assign(metric="S")
    assert module.best(found)["configuration"].tolist() == ["b", "c"]


def test_the_layer_with_the_highest_score_is_named_for_each_key():
    by_layer = swept("layer", "key", {(layer, key): 10.0 * layer for layer in (3, 1, 2) for key in module.KEYS})
    lines = module.best_layers(by_layer).splitlines()
    assert lines == [f"{key}: highest S 30.0, at layer 3" for key in module.KEYS]
    zsre = swept("layer", "key", {(1, key): 5.0 for key in module.KEYS}, ("efficacy", "paraphrase", "specificity"))
    assert module.best_layers(zsre).startswith(f"{next(iter(module.KEYS))}: highest efficacy 5.0, at layer 1")


def test_means_stand_in_the_order_in_which_they_were_tried():
    table = module.means(swept("layer", "key", {(3, "bare"): 1.0, (1, "bare"): 2.0}), "layer")
    assert list(table.index) == [3, 1]
    assert list(table.columns) == ["S", "ES", "PS", "NS"]
    two = module.means(swept("layer", "key", {(3, "b"): 1.0, (1, "a"): 2.0}), ["layer", "key"])
    assert list(two.index) == [(3, "b"), (1, "a")]


def test_the_figure_has_a_column_a_score_and_its_numbers_name_their_panel(tiny):
    by_layer = swept("layer", "key", {(1, "bare"): 10.0, (2, "bare"): 20.0})
    by_tokens = swept("tokens", "source", {(100, "sampled"): 10.0, (1000, "sampled"): 20.0})
    figure = module.search_figure(by_layer, by_tokens, "about")
    assert [ax.get_title() for ax in figure.axes[:4]] == ["S", "ES", "PS", "NS"]
    assert len(figure.axes) == 8
    numbers = module.all_numbers(tiny, "embedded", layer=by_layer, tokens=by_tokens, configuration=by_layer.head(0))
    assert numbers.groupby("panel").size().to_dict() == {"layer": 8, "tokens": 8}
    assert set(numbers["unit"]) == {"%"}
