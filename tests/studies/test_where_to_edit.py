"""The regressions of where_to_edit.ipynb on made-up facts whose truth is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rome_lab.studies.where_to_edit import EFFECTS, SUCCESSES, correlations, regressions

N_FACTS, N_LAYERS = 60, 6


def made_up(of_layer: float, of_effect: float, seed: int = 0) -> pd.DataFrame:
    """Success made of a part that depends on the layer, one that depends on the `mlp` effect, and noise."""
    rng = np.random.default_rng(seed)
    fact, layer = np.indices((N_FACTS, N_LAYERS)).reshape(2, -1)
    table = pd.DataFrame({"fact": fact, "layer": layer} | {name: rng.normal(size=fact.size) for name in EFFECTS})
    success = of_layer * (layer - layer.mean()) + of_effect * table["mlp"] + rng.normal(size=fact.size)
    return table.assign(**dict.fromkeys(SUCCESSES, success))


def test_what_tracing_adds_to_the_layer_is_found_and_nothing_is_made_of_nothing():
    found = regressions(made_up(of_layer=1.0, of_effect=1.0)).set_index(["success", "effect"])
    mlp, state = found.loc[("rewrite", "mlp")], found.loc[("rewrite", "state")]
    total = 35 / 12 + 1 + 1  # variance of the layer's part, of the effect's and of the noise
    assert mlp["layer_r2"] == pytest.approx(35 / 12 / total, abs=0.07)
    assert mlp["gain"] == pytest.approx(1 / total, abs=0.05) and mlp["gain_low"] > 0.1
    assert mlp["both_r2"] == pytest.approx(mlp["layer_r2"] + mlp["gain"])
    assert state["gain"] < 0.01 and found.loc[("rewrite", "random"), "gain"] < 0.01
    assert state["gain_high"] < mlp["gain_low"] and (found["n_facts"] == N_FACTS).all()


def test_r2_is_that_of_a_simple_regression_where_one_number_explains():
    table = made_up(of_layer=0.0, of_effect=2.0)
    found = regressions(table).set_index(["success", "effect"])
    expected = stats.linregress(table["mlp"], table["rewrite"]).rvalue ** 2
    assert found.loc[("rewrite", "mlp"), "effect_r2"] == pytest.approx(expected)


def test_correlations_are_over_a_facts_layers_and_over_facts_within_a_layer():
    table = made_up(of_layer=0.0, of_effect=3.0)
    found = correlations(table).set_index(["success", "effect", "over"])
    over_layers = found.loc[("rewrite", "mlp", "a fact's layers")]
    expected = [stats.spearmanr(x["mlp"], x["rewrite"]).statistic for _, x in table.groupby("fact")]
    assert over_layers["mean"] == pytest.approx(np.mean(expected)) and over_layers["n"] == N_FACTS
    within = found.loc[("rewrite", "mlp", "facts, within a layer")]
    assert within["n"] == N_LAYERS and within["mean"] > 0.8
    assert abs(found.loc[("rewrite", "random", "facts, within a layer"), "mean"]) < 0.3


def test_facts_without_neighbours_are_left_out_of_what_is_said_of_neighbours_only():
    table = made_up(1.0, 1.0)
    table.loc[table["fact"] < 10, "neighbour"] = np.nan
    counts = regressions(table).groupby("success")["n_facts"].first()
    assert counts.to_dict() == {"rewrite": N_FACTS, "paraphrase": N_FACTS, "neighbour": N_FACTS - 10}
