"""What is read off the averages is what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_averaging import make_trace
from tiny import tiny_model

from rome_lab.facts.fact import Fact
from rome_lab.tracing.averaging import BUCKETS, Traces
from rome_lab.tracing.readings import beside_paper, samples_worth, strongest, strongest_places, trace_random_weights
from rome_lab.tracing.trace import KINDS


def table_of(kind: str, cells: dict[tuple[str, int], tuple[float, float, float]]) -> pd.DataFrame:
    rows = [(kind, bucket, layer, *values, 5) for (bucket, layer), values in cells.items()]
    return pd.DataFrame(rows, columns=["kind", "bucket", "layer", "mean", "ci_low", "ci_high", "n_facts"])


def test_the_strongest_effect_is_the_highest_mean_and_only_layers_wholly_below_it_count():
    cells = {
        **{("subject_last", 0): (0.1, 0.0, 0.2), ("subject_last", 1): (0.5, 0.3, 0.7)},
        **{("subject_last", 2): (0.3, 0.2, 0.4), ("last", 2): (0.9, 0.8, 1.0)},
    }
    average = pd.concat([table_of("state", cells), table_of("mlp", {("last", 0): (2.0, 2.0, 2.0)})])
    peak = strongest(average, "state", ["subject_last"])
    assert (peak.bucket, peak.layer, peak.mean, peak.layers_below) == ("subject_last", 1, 0.5, 1)
    assert str(peak) == "0.500 (95% interval 0.300 to 0.700) at layer 1, n = 5"
    assert strongest(average, "state").bucket == "last"


def test_the_highest_of_what_is_below_zero_is_not_the_strongest():
    traces = Traces(replace(make_trace(fact, effect=np.full((7, 2), 0.2)), direction="noise") for fact in range(3))
    with pytest.raises(ValueError, match="normalised_effect"):
        strongest(traces.average(), "state")
    assert strongest(traces.average("normalised_effect"), "state").mean == pytest.approx(0.6)


def test_places_are_compared_with_the_papers_and_the_state_of_the_last_token_is_left_out():
    effects = {"state": [(6, 1, 0.9), (3, 1, 0.2)], "mlp": [(4, 0, 0.3)], "attn": [(6, 1, 0.4)]}
    traces = []
    for label, places in effects.items():
        effect = np.zeros((7, 2))
        for token, layer, size in places:
            effect[token, layer] = size
        traces += [make_trace(fact, label, effect) for fact in range(3)]
    places = strongest_places(Traces(traces).average(), Traces(traces).summary())
    assert places["strongest at"].tolist() == [BUCKETS[x] for x in ("subject_last", "first_subsequent", "last")]
    assert places["layer"].tolist() == [1, 0, 1] and places["layer of 48"].tolist() == [15, 17, 32]
    assert places["the same place"].tolist() == [True, False, True]


def test_shares_of_the_loss_and_of_the_depth_are_those_of_the_numbers():
    effect = np.zeros((7, 2))
    effect[3, 1] = 0.25
    traces = [make_trace(fact, "state", effect, p_clean=0.6, p_corrupted=0.1) for fact in range(3)]
    numbers = Traces(traces).summary()
    table = beside_paper(numbers, n_layers=2).set_index("measure")
    assert table.loc["state peak", "recovered"] == pytest.approx(0.5) and table.loc["state peak", "depth"] == 1.0
    assert table.loc["state peak", "paper_recovered"] == pytest.approx((0.15 - 0.0847) / (0.27 - 0.0847))
    assert table.loc["state peak", "paper_depth"] == pytest.approx(15 / 47)
    assert table.loc[["p_clean", "p_corrupted"], "recovered"].isna().all()
    assert table["paper_lies"].tolist() == ["below our interval"] * 4
    assert "recovered" not in numbers
    alone = beside_paper(Traces(traces[:1]).summary(), n_layers=2)
    assert set(alone["paper_lies"]) == {"beside no interval, for n = 1"}


def test_random_weights_are_traced_for_all_kinds_the_same_each_time_without_seeding_anything_else():
    lm = tiny_model("llama")
    facts = [Fact(subject, "{} is in", "x") for subject in ("Paris", "Rome")]
    before = torch.random.get_rng_state()
    first = trace_random_weights(lm, facts, samples=1, window=2, seed=3, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.kinds == tuple(KINDS) and first.n_facts == 2
    again = trace_random_weights(lm, facts, samples=1, window=2, seed=3, progress=False)
    for trace, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(trace.p_restored, other.p_restored)


def test_the_worth_of_samples_is_that_of_the_spread_at_each_sites_peak():
    rng, traces = np.random.default_rng(0), []
    for label, token, layer in (("state", 3, 0), ("mlp", 3, 1), ("attn", 6, 1)):
        for fact in range(6):
            effect = np.zeros((7, 2))
            effect[token, layer] = 0.3 + 0.1 * rng.normal()
            trace = make_trace(fact, label, effect)
            traces.append(replace(trace, p_variance=np.full((7, 2), 0.05)))  # of ten samples
    worth = samples_worth(Traces(traces)).set_index(["kind", "samples"])
    assert worth["layer"].groupby("kind").first().to_dict() == {"state": 0, "mlp": 1, "attn": 1}
    effects = np.array([trace.effect[6, 1] for trace in traces if trace.kind == "attn"])
    assert worth.loc[("attn", 10), "error"] == pytest.approx(effects.std(ddof=1) / np.sqrt(6))
    assert worth.loc[("attn", 10), "error"] == worth.loc[("attn", 10), "error_same_cost"]
    assert worth.loc[("attn", 1), "error"] > worth.loc[("attn", 10), "error"]
