"""Token buckets, averages over facts and their intervals."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rome_lab.base.intervals import mean_ci
from rome_lab.tracing.averaging import BUCKETS, Traces, buckets
from rome_lab.tracing.metrics import Readings
from rome_lab.tracing.trace import KINDS, Trace


def make_trace(
    fact: int = 0,
    label: str = "state",
    effect: np.ndarray | None = None,
    subject_range: tuple[int, int] = (1, 4),
    p_clean: float = 0.6,
    p_corrupted: float = 0.1,
) -> Trace:
    """A trace with these indirect effects, (T, L); by default seven tokens, two layers and no effect."""
    effect = np.zeros((7, 2)) if effect is None else effect
    kind, severed = KINDS[label]
    return Trace(
        kind=kind,
        severed=severed,
        prompt=f"prompt {fact}",
        subject=f"subject {fact}",
        answer=" Paris",
        tokens=tuple(f" t{i}" for i in range(len(effect))),
        subject_range=subject_range,
        p_clean=p_clean,
        p_corrupted=p_corrupted,
        p_restored=p_corrupted + effect,
        noise_std=0.3,
        samples=10,
        window=10,
        seed=0,
    )


def rows_of(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    return table


@st.composite
def prompts(draw):
    n_tokens = draw(st.integers(1, 40))
    begin = draw(st.integers(0, n_tokens - 1))
    return n_tokens, (begin, draw(st.integers(begin + 1, n_tokens)))


@given(prompts())
def test_each_token_from_the_subject_on_is_in_exactly_one_bucket(prompt):
    n_tokens, (begin, end) = prompt
    found = buckets(n_tokens, (begin, end))
    assert len(found) == n_tokens
    assert found[:begin] == [None] * begin
    assert set(found[begin:]) <= set(BUCKETS)
    assert found[-1] == "last" and found.count("last") == 1
    for single in ("subject_first", "subject_last", "first_subsequent"):
        assert found.count(single) <= 1
    assert found.count("subject_last") == (end < n_tokens)


@given(prompts())
def test_buckets_follow_the_order_of_the_prompt(prompt):
    n_tokens, (begin, end) = prompt
    order = [list(BUCKETS).index(bucket) for bucket in buckets(n_tokens, (begin, end))[begin:]]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("n_tokens", "subject_range", "expected"),
    [
        (7, (1, 4), [None, "subject_first", "subject_middle", "subject_last", "first_subsequent", "further", "last"]),
        (4, (1, 2), [None, "subject_last", "first_subsequent", "last"]),  # one-token subject
        (3, (0, 2), ["subject_first", "subject_last", "last"]),  # only one token follows, and it predicts
        (3, (0, 3), ["subject_first", "subject_middle", "last"]),  # the prompt ends with the subject
        (1, (0, 1), ["last"]),
    ],
)
def test_buckets_of_small_prompts(n_tokens, subject_range, expected):
    assert buckets(n_tokens, subject_range) == expected


@pytest.mark.parametrize("subject_range", [(2, 2), (-1, 2), (3, 2), (2, 6)])
def test_a_subject_outside_the_prompt_is_refused(subject_range):
    with pytest.raises(ValueError, match="not a non-empty range"):
        buckets(5, subject_range)


def test_average_agrees_with_a_hand_calculation():
    effects = [np.zeros((7, 2)), np.zeros((8, 2)), np.zeros((4, 2))]
    effects[0][2] = [0.10, -0.20]  # its one middle subject token
    effects[1][2:4] = [[0.30, 0.0], [0.50, 0.1]]  # two of them: 0.40, 0.05
    effects[2][1] = [0.25, 0.25]  # a one-token subject
    ranges = [(1, 4), (1, 5), (1, 2)]
    traces = [make_trace(i, effect=e, subject_range=r) for i, (e, r) in enumerate(zip(effects, ranges, strict=True))]
    table = Traces(traces).average()
    assert list(table.columns) == ["kind", "bucket", "layer", "mean", "ci_low", "ci_high", "n_facts"]

    # 0.10 and 0.40: mean 0.25, s = 0.3 / sqrt(2), s / sqrt(2) = 0.15, t(0.975, 1) = 12.7062
    middle = rows_of(table, bucket="subject_middle")
    assert middle["n_facts"].tolist() == [2, 2]
    assert middle["mean"].tolist() == pytest.approx([0.25, -0.075])
    assert middle["ci_low"].tolist() == pytest.approx([0.25 - 12.7062 * 0.15, -0.075 - 12.7062 * 0.125], abs=1e-4)
    assert middle["ci_high"].tolist() == pytest.approx([0.25 + 12.7062 * 0.15, -0.075 + 12.7062 * 0.125], abs=1e-4)

    # 0, 0 and 0.25: mean 1/12, s = 0.144338, s / sqrt(3) = 1/12, t(0.975, 2) = 4.3027
    last = rows_of(table, bucket="subject_last", layer=0).iloc[0]
    assert last["mean"] == pytest.approx(1 / 12)
    assert last["ci_high"] == pytest.approx(1 / 12 + 4.3027 / 12, abs=1e-4)
    assert last["n_facts"] == 3


def test_one_fact_has_a_mean_and_no_interval_and_no_rows_for_the_buckets_it_lacks():
    table = Traces([make_trace(effect=np.full((4, 2), 0.2), subject_range=(1, 2))]).average()
    assert set(table["bucket"]) == {"subject_last", "first_subsequent", "last"}
    assert table["mean"].tolist() == pytest.approx([0.2] * 6)
    assert table["ci_low"].isna().all() and table["ci_high"].isna().all()
    assert (table["n_facts"] == 1).all()


def test_bounds_are_not_clipped_to_possible_probabilities():
    effects = [np.full((7, 2), 0.9), np.full((7, 2), -0.05), np.full((7, 2), 0.0)]
    traces = [make_trace(i, effect=effect) for i, effect in enumerate(effects)]
    assert Traces(traces).average()["ci_low"].max() < 0
    assert Traces(traces).average("p_restored")["ci_high"].min() > 1


def test_the_interval_is_of_paired_effects_not_of_raw_probabilities():
    effect = np.full((7, 2), 0.2)
    traces = [make_trace(i, effect=effect, p_corrupted=p) for i, p in enumerate([0.0, 0.2, 0.5])]
    paired, raw = Traces(traces).average(), Traces(traces).average("p_restored")
    assert (paired["ci_high"] - paired["ci_low"]).max() < 1e-12
    assert (raw["ci_high"] - raw["ci_low"]).min() > 0.5


def test_repeating_tokens_within_a_fact_does_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    once, repeated = [], []
    for fact in range(8):
        effect = rng.normal(0.1, 0.1, (7, 3))
        once.append(make_trace(fact, effect=effect))
        repeated.append(make_trace(fact, effect=effect[[0, 1, *[2] * 9, 3, 4, *[5] * 9, 6]], subject_range=(1, 12)))
    np.testing.assert_allclose(
        Traces(once).average()[["mean", "ci_low", "ci_high", "n_facts"]],
        Traces(repeated).average()[["mean", "ci_low", "ci_high", "n_facts"]],
        atol=1e-12,
    )


@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_a_95_percent_interval_covers_the_true_mean_93_to_97_percent_of_the_time(shape):
    rng = np.random.default_rng(1)
    n_facts, repetitions = 60, 4000
    if shape == "normal":
        values, truth = rng.normal(0.08, 0.1, (n_facts, repetitions)), 0.08
    else:  # gamma of shape 3: skewness 1.15
        values, truth = 0.03 * rng.gamma(3.0, size=(n_facts, repetitions)), 0.09
    _, low, high, n = mean_ci(values)
    assert (n == n_facts).all()
    assert 0.93 < np.mean((low < truth) & (truth < high)) < 0.97


def test_average_is_the_mean_of_the_fact_table():
    rng = np.random.default_rng(2)
    ranges = [(0, 1), (1, 3), (2, 6), (3, 7)]
    traces = [make_trace(i, k, rng.normal(size=(7, 4)), r) for i, r in enumerate(ranges) for k in ("state", "mlp")]
    table = Traces(traces).fact_table()
    assert list(table.columns) == ["kind", "fact", "bucket", "layer", "indirect_effect"]
    grouped = table.groupby(["kind", "bucket", "layer"], observed=True)["indirect_effect"].agg(["mean", "count"])
    expected = Traces(traces).average().set_index(["kind", "bucket", "layer"])
    assert len(grouped) == len(expected)
    for key, row in expected.iterrows():
        assert row["mean"] == pytest.approx(grouped.loc[key, "mean"])
        assert row["n_facts"] == grouped.loc[key, "count"]


def test_a_bucket_with_a_token_that_was_not_restored_counts_as_missing():
    effect = np.full((8, 2), 0.2)
    effect[[0, 2, 6]] = np.nan  # before the subject, one of two middle subject tokens, one of two further tokens
    traces = [make_trace(0, effect=effect, subject_range=(1, 5)), make_trace(1, effect=np.full((7, 2), 0.4))]
    table = Traces(traces).average()
    n_facts = table[table["layer"] == 0].set_index("bucket")["n_facts"].to_dict()
    assert n_facts == {b: 1 if b in ("subject_middle", "further") else 2 for b in BUCKETS}
    assert rows_of(table, bucket="subject_middle")["mean"].tolist() == pytest.approx([0.4, 0.4])
    assert rows_of(table, bucket="subject_last")["mean"].tolist() == pytest.approx([0.3, 0.3])


def test_the_order_of_the_traces_does_not_change_the_average():
    rng = np.random.default_rng(3)
    traces = [make_trace(i, k, rng.normal(size=(7, 3))) for i in range(5) for k in ("attn", "state")]
    forward, backward = Traces(traces).average(), Traces(traces[::-1]).average()
    assert forward[["kind", "bucket", "layer"]].equals(backward[["kind", "bucket", "layer"]])
    np.testing.assert_allclose(forward["ci_low"], backward["ci_low"], atol=1e-12)


@pytest.mark.parametrize(
    ("traces", "message"),
    [
        ([], "there are no traces"),
        ([make_trace(0), make_trace(1), make_trace(0)], "two 'state' traces of 'prompt 0'"),
        ([make_trace(0), make_trace(1, effect=np.zeros((7, 3)))], "different numbers of layers: 2 .* 3"),
        ([make_trace(0, effect=np.where(np.eye(7, 2) > 0, np.nan, 0.1))], "'prompt 0' has NaN or inf"),
        ([make_trace(0, effect=np.full((7, 2), np.inf))], "'prompt 0' has NaN or inf"),
        ([make_trace(0, p_clean=np.nan)], "'prompt 0' has NaN or inf"),
    ],
)
def test_traces_that_cannot_be_averaged_are_refused(traces, message):
    with pytest.raises(ValueError, match=message):
        Traces(traces).average()


def test_an_unknown_quantity_or_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="'score'; choose one of indirect_effect, p_restored"):
        Traces([make_trace()]).average("score")
    with pytest.raises(ValueError, match="'hidden'; choose one of state, mlp"):
        Traces([make_trace()]).of("hidden")


def test_traces_is_an_immutable_sequence():
    given_list = [make_trace(0), make_trace(1), make_trace(0, "mlp")]
    traces = Traces(given_list)
    given_list.clear()
    assert len(traces) == 3 and list(traces)[1].prompt == "prompt 1"
    assert traces.kinds == ("state", "mlp") and traces.n_facts == 2
    assert [trace.label for trace in traces.of("mlp")] == ["mlp"]
    assert isinstance(traces[:2], Traces) and traces[-1].label == "mlp"
    with pytest.raises(TypeError):
        traces[0] = make_trace(2)


def test_gap_is_paired_and_counts_only_facts_that_have_both():
    rng = np.random.default_rng(4)
    traces = []
    for fact in range(6):
        effect = rng.normal(0.3, 0.2, (7, 2))
        traces += [make_trace(fact, "state", effect), make_trace(fact, "severed-mlp", effect - 0.1)]
    table = Traces([*traces, make_trace(99, "state")]).gap("state", "severed-mlp")
    assert set(table["kind"]) == {"state minus severed-mlp"}
    assert (table["n_facts"] == 6).all()
    assert np.allclose(table[["mean", "ci_low", "ci_high"]], 0.1)  # no spread: the facts' own spread has gone
    with pytest.raises(ValueError, match="no traces of kind 'severed-attn'"):
        Traces(traces).gap("state", "severed-attn")


def test_summary_gives_the_numbers_of_b1_and_b2_beside_the_papers():
    traces = []
    for fact, (p_clean, early) in enumerate([(0.5, (0.2, 0.1, 0.0)), (0.7, (0.1, 0.3, 0.0))]):
        state = np.zeros((7, 3))
        state[3], state[6] = early, (0.0, 0.0, p_clean - 0.1)
        mlp = np.zeros((7, 3))
        mlp[4, 1], mlp[3, 2] = 0.4, 0.05
        traces += [make_trace(fact, "state", state, p_clean=p_clean), make_trace(fact, "mlp", mlp, p_clean=p_clean)]
    table = Traces(traces).summary().set_index("measure")
    assert table.loc["p_clean", "mean"] == pytest.approx(0.6)
    assert table.loc["p_corrupted", "mean"] == pytest.approx(0.1)
    assert table.loc["state best", "mean"] == pytest.approx(0.1 + (0.2 + 0.3) / 2)  # not the last token's p_clean
    assert table.loc["state peak", ["mean", "layer"]].tolist() == pytest.approx([0.1 + 0.2, 1])
    assert table.loc["mlp best", "mean"] == pytest.approx(0.5)  # anywhere
    assert table.loc["mlp peak", ["mean", "layer"]].tolist() == pytest.approx([0.15, 2])  # at the last subject token
    assert "attn best" not in table.index
    assert (table["n_facts"] == 2).all() and table["paper"].notna().all()
    assert table.loc["state peak", ["paper", "paper_layer"]].tolist() == [0.150, 15]


def test_summary_of_facts_whose_prompts_end_with_the_subject_says_that_none_has_the_early_site():
    table = Traces(make_trace(i, subject_range=(4, 7)) for i in range(3)).summary().set_index("measure")
    assert table.loc["state best", "n_facts"] == 0 and np.isnan(table.loc["state best", "mean"])
    assert table.loc["p_clean", "n_facts"] == 3


def test_a_trace_is_told_in_one_line_and_a_small_table_without_its_numbers_by_token():
    effect = np.zeros((7, 40))
    effect[3, 17] = 0.25
    trace = replace(make_trace(effect=effect), prompt="a <b>bold</b>\nprompt " + 90 * "word ")
    line, table = repr(trace), trace._repr_html_()
    assert "\n" not in line and len(line) < 400 and "array" not in line and "tensor" not in line
    for text in ("kind state", "answer ' Paris'", "p_clean 0.600", "p_corrupted 0.100", "0.250 at ' t3' in layer 17"):
        assert text in line, text
    assert table.count("<tr>") <= 10 and "0.250 at ' t3' in layer 17" in table
    assert "<b>" not in table and "&lt;b&gt;" in table


def test_a_trace_of_one_token_is_told_by_the_token_that_was_restored():
    effect = np.full((7, 2), np.nan)
    effect[3] = (-0.2, -0.1)
    assert "-0.100 at ' t3' in layer 1" in repr(make_trace(0, "severed-mlp", effect))


def test_where_corruption_raises_the_metric_the_strongest_cell_is_the_one_that_lowers_it_most():
    effect = np.zeros((7, 2))
    effect[2, 1], effect[4, 0] = 0.3, -0.4
    assert make_trace(effect=effect).peak == (2, 1)
    raised = make_trace(effect=effect, p_clean=0.1, p_corrupted=0.6)
    assert raised.peak == (4, 0)
    assert replace(raised, direction="noise", p_restored=raised.p_clean + effect).peak == (2, 1)


def test_traces_are_told_in_one_line_and_a_row_a_kind():
    traces = Traces([make_trace(i, label, np.full((7, 2), 0.2)) for i in range(30) for label in ("state", "mlp")])
    assert repr(traces) == "Traces(60 traces of 30 facts: state, mlp)"
    table = traces._repr_html_()
    assert table.count("<tr") == 3 and "0.600" in table and "0.200" in table and "30" in table
    assert "<tr" in Traces()._repr_html_()


@given(st.integers(0, 1000))
def test_an_interval_of_clusters_of_equal_size_is_that_of_their_means(seed):
    values = np.random.default_rng(seed).normal(size=(12, 2))
    labels = ["a", "b", "c", "d"] * 3
    means = np.stack([values[place::4].mean(axis=0) for place in range(4)])
    clustered, expected = mean_ci(values, labels), mean_ci(means)
    np.testing.assert_allclose(clustered.mean, expected.mean)
    np.testing.assert_allclose(clustered.ci_low, expected.ci_low)
    assert (clustered.n_facts == 12).all()


def test_facts_without_a_cluster_stand_for_themselves_and_one_cluster_alone_has_no_interval():
    values = np.random.default_rng(0).normal(size=9)
    np.testing.assert_allclose(mean_ci(values, [None] * 9), mean_ci(values))
    assert np.isnan(mean_ci(values, ["one"] * 9).ci_low)


def test_normalised_effects_leave_out_and_count_facts_that_are_hardly_corrupted():
    effect = np.full((7, 2), 0.1)
    traces = Traces([make_trace(fact=0, effect=effect), make_trace(fact=1, effect=effect, p_corrupted=0.595)])
    table = traces.average("normalised_effect")
    assert table.attrs["left_out"] == 1 and (table["n_facts"] == 1).all()
    np.testing.assert_allclose(table["mean"], 0.1 / 0.5)


def test_traces_of_several_directions_are_not_averaged():
    with pytest.raises(
        ValueError, match="different metrics, directions or corruptions: probability and denoise, probability and noise"
    ):
        Traces([make_trace(fact=0), replace(make_trace(fact=1), direction="noise")]).average()


def of_head(fact: int) -> Trace:
    return replace(make_trace(fact), kind="head", token=6, p_restored=np.full((3, 4), 0.3), p_variance=np.ones((3, 4)))


@pytest.mark.parametrize(
    "changed", [{"direction": "noise"}, {"swapped": "Rome"}, {"prompt": "prompt 0", "subject": "subject 0"}]
)
def test_what_differs_or_comes_twice_is_averaged_in_no_way(changed):
    heads = Traces([of_head(0), replace(of_head(1), **changed)])
    states = Traces(replace(x, p_variance=np.ones((7, 2))) for x in (make_trace(0), replace(make_trace(1), **changed)))
    ways = (heads.average_heads, states.average, states.summary, lambda: states.spread("state", "last", 0))
    for way in ways:
        with pytest.raises(ValueError, match="different metrics, directions or corruptions|two '(head|state)' traces"):
            way()


def test_runs_of_different_lengths_and_heads_at_different_tokens_are_not_averaged():
    with pytest.raises(ValueError, match=r"runs of \[1, 10\] layers; average those of one length"):
        Traces([make_trace(0, "mlp"), replace(make_trace(1, "mlp"), window=1)]).average()
    Traces([make_trace(0, "mlp"), replace(make_trace(1), window=1)]).average()  # a state is of one layer in any case
    at_last = [replace(of_head(fact), token=token) for fact, token in ((0, 6), (1, 3))]
    with pytest.raises(ValueError, match="heads were restored at the last token in some traces"):
        Traces(at_last).average_heads()


@pytest.mark.parametrize(("kind", "layer"), [("head", 0), ("state", 2), ("state", -1)])
def test_the_spread_is_of_layers_and_buckets_that_there_are(kind, layer):
    traces = Traces(x for fact in range(2) for x in (make_trace(fact), of_head(fact)))
    with pytest.raises(ValueError, match=f"no layer {layer} of kind '{kind}'"):
        traces.spread(kind, "subject_first", layer)


def test_the_papers_numbers_are_not_read_off_the_other_direction():
    traces = Traces(replace(make_trace(fact), direction="noise") for fact in range(3))
    with pytest.raises(ValueError, match="direction='denoise'"):
        traces.summary()


def test_the_small_table_is_in_probability_and_has_a_row_a_direction():
    effect = np.zeros((7, 2))
    effect[3, 1] = 0.25
    trace = make_trace(effect=effect)
    readings = Readings(-1.0, -4.0, np.where(np.eye(7, 2) > 0, -1.0, -4.0), effect)  # its peak is another cell
    trace = replace(trace, metric="log_probability", further={"log_probability": readings})
    back = replace(make_trace(effect=effect - 0.4), direction="noise")  # 0.6 -> at the least -0.3, at another cell
    table = Traces([trace, back])._repr_html_()
    assert "0.250" in table and "state, direction noise" in table and f"{-0.3 - 0.6:.3f}" in table


def test_averages_say_what_they_are_of():
    traces = Traces(replace(make_trace(fact), direction="noise", relation="r") for fact in range(2))
    common = {"metric": "probability", "direction": "noise"}
    assert traces.average(clustered=True).attrs == {
        **common,
        "quantity": "indirect_effect",
        "clustered": True,
        "left_out": 0,
    }
    heads = Traces([of_head(0)]).average_heads()
    assert heads.attrs == {**common, "direction": "denoise", "clustered": False}


def test_a_trace_that_was_pickled_before_there_were_metrics_can_be_read():
    trace = make_trace(effect=np.full((7, 2), 0.2))
    later = ("direction", "metric", "foil", "swapped", "token", "relation", "p_variance", "further")
    old = object.__new__(Trace)
    old.__setstate__({name: value for name, value in trace.__dict__.items() if name not in later})
    np.testing.assert_allclose(pickle.loads(pickle.dumps(old)).indirect_effect, 0.2)


def test_heads_are_averaged_by_layer_and_head():
    shape = (3, 4)
    traces = Traces(
        replace(make_trace(fact=x), kind="head", token=6, p_restored=0.1 + np.arange(12).reshape(shape) * (1 + x))
        for x in range(3)
    )
    table = traces.average_heads()
    row = table[(table["layer"] == 2) & (table["head"] == 1)].iloc[0]
    assert row["mean"] == pytest.approx(9 * 2) and row["n_facts"] == 3 and len(table) == 12
    assert row["ci_low"] == pytest.approx(float(mean_ci(np.array([9.0, 18.0, 27.0])).ci_low))


def test_the_spread_between_and_within_facts_is_found_again():
    rng, facts, samples = np.random.default_rng(1), 4000, 4
    traces = []
    for fact in range(facts):
        drawn = 0.3 + rng.normal(scale=0.2) + rng.normal(scale=0.4, size=samples)
        trace = make_trace(fact=fact, effect=np.full((7, 2), drawn.mean()))
        traces.append(replace(trace, samples=samples, p_variance=np.full((7, 2), drawn.var(ddof=1))))
    spread = Traces(traces).spread("state", "last", 0)
    assert spread.between == pytest.approx(0.04, rel=0.15) and spread.within == pytest.approx(0.16, rel=0.1)
    effects = np.array([trace.effect[-1, 0] for trace in traces])
    assert spread.error(samples) == pytest.approx(effects.std(ddof=1) / np.sqrt(facts), rel=1e-3)
    best = spread.best_samples(fact_cost=1, sample_cost=1)
    costs = {s: spread.error(s, 1000) * np.sqrt(1 + s) for s in range(1, 30)}  # at one cost of all
    assert costs[best] == pytest.approx(min(costs.values()), rel=0.02)
    with pytest.raises(ValueError, match="of two or more"):
        Traces(map(replace, traces[:5])).of("state")[:1].spread("state", "last", 0)
