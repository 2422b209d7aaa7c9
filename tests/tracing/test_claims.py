"""The claims table on synthetic traces whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rome_lab.base.intervals import mean_ci
from rome_lab.tracing.averaging import Traces
from rome_lab.tracing.paper_claims import CLAIMS, claims, claims_at_fact, holm
from rome_lab.tracing.trace import KINDS, Trace

SUBJECT_LAST, LAST = 2, 4


def make_traces(
    n_facts: int,
    effects: dict[tuple[str, int], float] | None = None,
    noise: float = 0.02,
    n_layers: int = 6,
    seed: int = 0,
    kinds: tuple[str, ...] = tuple(KINDS),
    subject_range: tuple[int, int] = (1, 3),
) -> Traces:
    """Facts with these mean effects by kind and token in the half of the layers that has the site, and noise."""
    rng = np.random.default_rng(seed)
    half = {SUBJECT_LAST: slice(0, n_layers // 2), LAST: slice(n_layers - n_layers // 2, n_layers)}
    traces = []
    for fact in range(n_facts):
        for label in kinds:
            effect = noise * rng.normal(size=(5, n_layers))
            for (kind, token), size in (effects or {}).items():
                if kind == label:
                    effect[token, half[token]] += size
            kind, severed = KINDS[label]
            tokens = ("The", " sub", "ject", " is", " in")
            names = (f"prompt {fact}", f"subject {fact}", " Paris")
            numbers = (0.6, 0.1, 0.1 + effect)
            traces.append(Trace(kind, severed, *names, tokens, subject_range, *numbers, 0.3, 10, 10, seed=0))
    return Traces(traces)


PAPER_LIKE = {
    ("state", SUBJECT_LAST): 0.15,
    ("state", LAST): 0.4,
    ("mlp", SUBJECT_LAST): 0.15,
    ("attn", SUBJECT_LAST): 0.03,
    ("mlp", LAST): 0.05,
    ("attn", LAST): 0.2,
    ("severed-mlp", SUBJECT_LAST): 0.03,
    ("severed-attn", SUBJECT_LAST): 0.12,
}
EXPECTED_EFFECTS = [0.15, 0.15, 0.4, 0.12, 0.15, 0.09]


def test_one_fact_agrees_with_the_claims_where_the_paper_is_true_of_it():
    table = claims_at_fact(make_traces(1, PAPER_LIKE, noise=0.001))
    assert table["verdict"].tolist() == ["agrees"] * len(CLAIMS)
    assert table["effect"].tolist() == pytest.approx(EXPECTED_EFFECTS, abs=0.01)
    assert table["larger"].tolist() == pytest.approx([0.15, 0.15, 0.4, 0.15, 0.2, 0.12], abs=0.01)
    assert (table["larger"] - table["smaller"]).tolist() == pytest.approx(table["effect"].tolist())
    turned = claims_at_fact(make_traces(1, {key: -size for key, size in PAPER_LIKE.items()}, noise=0.001))
    assert turned["verdict"].tolist() == ["disagrees"] * len(CLAIMS)
    assert claims_at_fact(make_traces(1, noise=0.001))["verdict"].tolist() == ["neither"] * len(CLAIMS)


def test_one_fact_means_over_facts_are_those_of_many():
    many = make_traces(5, PAPER_LIKE)
    each = [claims_at_fact(many[5 * fact : 5 * fact + 5])["effect"].to_numpy() for fact in range(5)]
    assert np.mean(each, axis=0) == pytest.approx(claims(many)["effect"].to_numpy())


def test_one_fact_says_nothing_where_a_trace_a_token_or_the_layers_are_wanting():
    assert claims_at_fact(make_traces(1, PAPER_LIKE, kinds=("state",)))["verdict"].tolist()[3:] == ["can't tell"] * 3
    assert claims_at_fact(make_traces(1, PAPER_LIKE, n_layers=1))["verdict"].eq("can't tell").all()
    one_token = claims_at_fact(make_traces(1, PAPER_LIKE, subject_range=(2, 3)))
    assert one_token["verdict"].tolist() == ["agrees", "can't tell", *["agrees"] * 4]
    with pytest.raises(ValueError, match="traces of 2 facts"):
        claims_at_fact(make_traces(2))


def test_all_claims_hold_where_the_paper_is_true_and_the_effects_are_recovered():
    table = claims(make_traces(40, PAPER_LIKE))
    assert table["verdict"].tolist() == ["holds"] * len(CLAIMS)
    assert table["effect"].tolist() == pytest.approx(EXPECTED_EFFECTS, abs=0.01)
    assert (table["ci_low"] < table["effect"]).all() and (table["effect"] < table["ci_high"]).all()
    assert (table["p_value"] < 1e-6).all()
    assert table["layers"].tolist() == ["0-2", "0-2", "3-4", "0-2", "3-5", "0-2"]
    assert (table["n_facts"] == 40).all() and (table["left_out"] == 0).all()


def test_no_claim_holds_where_nothing_has_an_effect():
    table = claims(make_traces(40, noise=0.01))
    assert table["verdict"].tolist() == ["does not hold"] * len(CLAIMS)


def test_no_claim_holds_where_the_opposite_is_true():
    opposite = {site: 0.2 - size / 2 for site, size in PAPER_LIKE.items()}
    opposite[("state", SUBJECT_LAST)] = opposite[("state", LAST)] = -0.1
    table = claims(make_traces(40, opposite))
    assert table["verdict"].tolist() == ["does not hold"] * len(CLAIMS)
    assert (table["effect"] < 0).all() and (table["layers"] == "none").all()


def test_few_noisy_facts_cannot_tell():
    tables = [claims(make_traces(5, PAPER_LIKE, noise=1.0, seed=seed)) for seed in range(20)]
    assert np.mean([(table["verdict"] == "can't tell").mean() for table in tables]) > 0.85
    assert all(table["effect"].notna().all() for table in tables)


def test_an_effect_too_small_to_speak_of_does_not_hold_however_significant():
    tiny = {site: size / 1000 for site, size in PAPER_LIKE.items()}
    traces = make_traces(40, tiny, noise=1e-6)
    table = claims(traces)
    assert (table["p_value"] < 1e-6).all()
    assert table["verdict"].tolist() == ["does not hold"] * len(CLAIMS)
    assert claims(traces, margin=0.0)["verdict"].tolist() == ["holds"] * len(CLAIMS)


def test_zero_effects_without_any_spread_are_no_evidence():
    table = claims(make_traces(10, noise=0.0))
    assert table["verdict"].tolist() == ["does not hold"] * len(CLAIMS)
    assert (table["p_value"] > 0.4).all()


@pytest.mark.slow
def test_under_the_null_rejections_come_at_about_the_nominal_rate():
    repetitions = 240
    tables = [claims(make_traces(20, n_layers=4, seed=seed), margin=0.0) for seed in range(repetitions)]
    rejected = np.mean([(table["p_value"] < 0.05).mean() for table in tables])
    held = np.mean([(table["verdict"] == "holds").mean() for table in tables])
    refuted = np.mean([(table["verdict"] == "does not hold").mean() for table in tables])
    assert 0.03 < rejected < 0.07  # one-sided, corrected over the layers
    assert 0.012 < held < 0.04 and 0.012 < refuted < 0.04  # 2.5% on either side of the interval


def test_p_value_of_one_layer_is_that_of_a_paired_one_sided_t_test():
    traces = make_traces(12, PAPER_LIKE, noise=0.2, n_layers=2)
    by_kind = {kind: np.stack([trace.indirect_effect for trace in traces.of(kind)]) for kind in KINDS}
    table = claims(traces).set_index("claim")
    where = {"subject_other": 1, "subject_last": SUBJECT_LAST, "last": LAST}
    for claim in CLAIMS:
        if claim.trivial:  # of the upper half, one layer, nothing is left
            assert np.isnan(table.loc[claim.sentence, "p_value"])
            continue
        layer = 0 if claim.half == "lower" else 1
        larger, smaller = (by_kind[kind][:, where[bucket]] for kind, bucket in (claim.larger, claim.smaller))
        other = smaller[:, 0] if claim.against == "lower" else smaller[:, layer]
        expected = stats.ttest_rel(larger[:, layer], other, alternative="greater")
        interval = stats.ttest_rel(larger[:, layer], other).confidence_interval(0.95)
        assert table.loc[claim.sentence, "p_value"] == pytest.approx(expected.pvalue)
        assert table.loc[claim.sentence, ["ci_low", "ci_high"]].tolist() == pytest.approx([*interval])


def test_the_subjects_last_token_is_compared_with_the_mean_of_its_first_and_middle_ones():
    traces = make_traces(10, {("state", SUBJECT_LAST): 0.3}, noise=0, subject_range=(0, 3))
    for trace in traces.of("state"):
        trace.p_restored[1, :3] += 0.1  # the middle token; the first has no effect
    rows = claims(traces).set_index("claim")
    assert rows.loc[CLAIMS[1].sentence, "effect"] == pytest.approx(0.3 - 0.05)


def test_subjects_of_one_token_are_left_out_where_subject_tokens_are_compared():
    table = claims(make_traces(10, PAPER_LIKE, subject_range=(2, 3)))
    assert table.loc[1, "left_out"] == 10 and table.loc[1, "verdict"] == "can't tell"


def test_one_fact_of_the_other_direction_agrees_with_nothing():
    traces = Traces(replace(trace, direction="noise") for trace in make_traces(1, PAPER_LIKE))
    with pytest.raises(ValueError, match="of direction 'denoise'"):
        claims_at_fact(traces)


def test_facts_without_a_share_are_left_out_and_the_note_says_so():
    traces = [*make_traces(4, PAPER_LIKE)]
    traces[: len(KINDS)] = (replace(trace, p_clean=trace.p_corrupted + 0.01) for trace in traces[: len(KINDS)])
    table = claims(traces, quantity="normalised_effect")
    assert (table["left_out"] == 1).all()
    assert table["note"].str.startswith("1 of 4 facts left out, for want of a trace, of the token or of a share").all()


def test_holm_agrees_with_a_hand_calculation():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.7, 0.6])).tolist() == [1.0, 1.0]


def test_the_verdict_comes_from_the_half_fixed_beforehand_not_from_the_best_layer():
    """One strong layer among fifteen is significant, and still not an early site of an appreciable mean effect."""
    traces = make_traces(30, n_layers=30, noise=0.005)
    for trace in traces.of("state"):
        trace.p_restored[SUBJECT_LAST, 4] += 0.06
    early = claims(traces).iloc[0]
    assert early["layers"] == "4" and early["peak_layer"] == 4 and early["tested_layers"] == "0-14"
    assert early["verdict"] == "does not hold"


def test_the_middle_layer_of_an_odd_number_is_in_neither_half():
    assert claims(make_traces(5, n_layers=7))["tested_layers"].tolist() == ["0-2", "0-2", "4-5", "0-2", "4-6", "0-2"]


def test_missing_kinds_cannot_tell_and_say_why():
    table = claims(make_traces(10, PAPER_LIKE, kinds=("state", "mlp")))
    assert table["verdict"].tolist() == ["holds", "holds", "holds", "can't tell", "can't tell", "can't tell"]
    assert "no traces of kind attn" in table["note"][3]
    assert "severed-attn" in table["note"][5] and "severed-mlp" in table["note"][5]


def test_two_facts_cannot_tell():
    table = claims(make_traces(2, PAPER_LIKE))
    assert table["verdict"].tolist() == ["can't tell"] * len(CLAIMS)
    assert table["note"].str.contains("at least 3").all()


def test_facts_without_one_of_the_sites_are_left_out_and_counted():
    ordinary = make_traces(10, PAPER_LIKE)
    ends_with_subject = [
        Trace(**(vars(trace) | {"prompt": f"other {trace.prompt}", "subject_range": (3, 5)}))
        for trace in make_traces(4, PAPER_LIKE)
    ]
    table = claims([*ordinary, *ends_with_subject])
    assert table["n_facts"].tolist() == [10, 10, 14, 10, 14, 10]
    assert table["left_out"].tolist() == [4, 4, 0, 4, 0, 4]
    assert "4 of 14 facts left out" in table["note"][0] and table["note"][2] == ""


def test_a_model_of_one_layer_has_no_halves():
    table = claims(make_traces(5, n_layers=1))
    assert table["verdict"].tolist() == ["can't tell"] * len(CLAIMS)
    assert table["note"].str.contains("none that the claim speaks of").all()


def test_the_late_site_can_fail_where_only_the_last_layer_gives_the_answer_back():
    traces = make_traces(20, noise=0.01)
    for trace in traces.of("state"):
        trace.p_restored[LAST, -1] = trace.p_clean
    assert claims(traces)["verdict"][2] == "does not hold"


def test_claims_of_shares_are_those_of_probabilities_divided_by_what_there_is_to_restore():
    traces = make_traces(10, PAPER_LIKE)
    shares = claims(traces, quantity="normalised_effect")
    assert shares["effect"].tolist() == pytest.approx((claims(traces)["effect"] / 0.5).tolist())
    mirrored = Traces(  # the same facts, told the other way round
        replace(x, direction="noise", p_clean=x.p_corrupted, p_corrupted=x.p_clean) for x in traces
    )
    assert claims(mirrored, quantity="normalised_effect")["effect"].tolist() == pytest.approx(shares["effect"].tolist())
    with pytest.raises(ValueError, match="of direction 'denoise', or 'normalised_effect'"):
        claims(mirrored)


def test_claims_clustered_by_relation_count_alike_facts_less():
    traces = Traces(
        replace(x, relation="one" if "prompt 1" in x.prompt else x.prompt) for x in make_traces(20, PAPER_LIKE)
    )
    plain, clustered = claims(traces), claims(traces, clustered=True)
    assert clustered["effect"].tolist() == plain["effect"].tolist()
    expected = mean_ci(claims_effect(traces), [x.relation for x in traces.of("state")])
    assert clustered["ci_low"][0] == pytest.approx(float(expected.ci_low))
    assert clustered["ci_low"][0] != plain["ci_low"][0]


def claims_effect(traces):
    """The first claim's contrast, a fact each."""
    return np.array(
        [(x.indirect_effect[SUBJECT_LAST, :3] - x.indirect_effect[LAST, :3]).mean() for x in traces.of("state")]
    )


@pytest.mark.parametrize("margin", [-0.1, 1.0, float("nan")])
def test_a_margin_that_is_no_probability_is_refused(margin):
    with pytest.raises(ValueError, match="not a probability"):
        claims(make_traces(3), margin=margin)
