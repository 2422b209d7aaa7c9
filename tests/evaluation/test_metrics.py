"""Metrics against hand calculations, and their summaries against other ways to the same interval."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rome_lab.base import harmonic_mean_ci, mean_ci, share_ci
from rome_lab.evaluation import metrics
from rome_lab.evaluation.metrics import ngram_entropy, summarise
from rome_lab.evaluation.passages import passage_of
from rome_lab.facts import success


def test_scores_and_magnitudes_are_of_probabilities_of_whole_targets():
    wanted, other = np.log([0.5, 0.2, 0.1]), np.log([0.1, 0.3, 0.1])
    assert success(wanted, other) == pytest.approx(100 / 3)  # the tie is no success
    assert metrics.magnitude(wanted, other) == pytest.approx(100 * (0.4 - 0.1 + 0.0) / 3)


def test_scores_tell_apart_probabilities_too_small_for_a_float():
    assert success([-900.0], [-901.0]) == 100.0
    assert success([-901.0], [-900.0]) == 0.0
    assert metrics.magnitude([-900.0], [-901.0]) == 0.0


def test_token_accuracy_weighs_prompts_not_tokens():
    assert metrics.token_accuracy([[True, False, False, False], [True]]) == pytest.approx(62.5)


def test_entropy_of_ngrams_is_that_of_their_frequencies():
    assert ngram_entropy("one two three four five", 2) == pytest.approx(2.0)  # four bigrams, once each
    assert ngram_entropy("a b a b c", 2) == pytest.approx(1.5)  # ab twice, ba, bc
    assert ngram_entropy("a b a b c", 3) == pytest.approx(math.log2(3))
    assert ngram_entropy("no no no no no", 2) == ngram_entropy("word", 2) == ngram_entropy("", 3) == 0.0


def test_punctuation_marks_are_words_of_their_own():
    assert ngram_entropy("Yes, yes.", 2) == pytest.approx(math.log2(3))


def test_generation_entropy_weighs_trigrams_twice_and_texts_alike():
    wanted = (1.5 + 2 * math.log2(3)) / 3
    assert metrics.generation_entropy(["a b a b c"]) == pytest.approx(wanted)
    assert metrics.generation_entropy(["a b a b c", "no no no no"]) == pytest.approx(wanted / 2)


def test_reference_score_is_the_cosine_of_tf_idf_by_hand():
    corpus = ["tower rome", "tower paris", "rome bread"]  # in 2, 2, 1 and 1 of 3 texts
    idf = {word: math.log(4 / (1 + n)) + 1 for word, n in {"tower": 2, "rome": 2, "paris": 1, "bread": 1}.items()}
    said, wanted = {"rome": 2 * idf["rome"], "paris": idf["paris"]}, {"rome": idf["rome"], "bread": idf["bread"]}
    cosine = said["rome"] * wanted["rome"] / math.hypot(*said.values()) / math.hypot(*wanted.values())
    # "in" and "unheard" do not stand in the corpus.
    found = metrics.reference_score(["In Rome: unheard", "rome, Paris"], ["rome bread"], corpus)
    assert found == pytest.approx(100 * cosine)


def test_reference_score_is_full_for_the_references_themselves_and_nothing_without_a_shared_word():
    references = ["Rome is old.", "Bread in Rome."]
    assert metrics.reference_score(references, references) == pytest.approx(100.0)
    assert metrics.reference_score(["quite another thing"], references) == 0.0


def scores(n=200, seed=0):
    """ES, PS, NS of n cases that vary together, as real ones do."""
    random = np.random.default_rng(seed)
    shared = random.normal(size=(n, 1))
    p = 1 / (1 + np.exp(-(np.array([3.0, 1.0, 1.5]) + shared + random.normal(size=(n, 3)))))
    return 100 * random.binomial([1, 4, 6], p) / [1, 4, 6]


def test_S_is_the_harmonic_mean_of_the_means():
    values = scores()
    es, ps, ns = values.mean(axis=0)
    assert harmonic_mean_ci(values).mean == pytest.approx(3 / (1 / es + 1 / ps + 1 / ns))


def test_the_interval_of_S_is_that_of_the_bootstrap_over_cases():
    values = scores()
    draws = np.random.default_rng(1).integers(len(values), size=(4000, len(values)))
    resampled = stats.hmean(values[draws].mean(axis=1), axis=1)
    found = harmonic_mean_ci(values)
    low, high = np.percentile(resampled, [2.5, 97.5])
    assert (found.ci_low, found.ci_high) == (pytest.approx(low, abs=0.4), pytest.approx(high, abs=0.4))
    assert high - low > 3


def test_the_interval_of_S_is_that_of_a_share_where_all_three_scores_are_the_same():
    one = scores()[:, 1:2]
    assert harmonic_mean_ci(np.repeat(one, 3, axis=1)) == pytest.approx(share_ci(one[:, 0]))


def test_intervals_of_shares_agree_with_those_of_scipy_and_stay_where_shares_can_be():
    values = scores()[:, 1]
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    mean, low, high, n = share_ci(values)
    assert (mean, n) == (values.mean(), 200) and (low, high) == pytest.approx(theirs, abs=0.3)
    t = mean_ci(values)
    assert (low, high) == pytest.approx((t.ci_low, t.ci_high), abs=0.5)
    few = share_ci(np.array([100.0, 100.0, 100.0, 50.0, np.nan]))
    assert few.ci_high == 100.0 < mean_ci(np.array([100.0, 100.0, 100.0, 50.0])).ci_high and few.n_facts == 4


def test_shares_of_all_or_nothing_have_exact_intervals():
    # Clopper and Pearson's bounds are quantiles of beta distributions.
    half = share_ci(np.array([100.0] * 6 + [0.0] * 4))
    assert half[:3] == pytest.approx((60.0, 100 * stats.beta.ppf(0.025, 6, 5), 100 * stats.beta.ppf(0.975, 7, 4)))
    assert share_ci(np.full(200, 100.0))[:3] == pytest.approx((100.0, 100 * 0.025 ** (1 / 200), 100.0))
    assert share_ci(np.zeros(20))[:3] == pytest.approx((0.0, 0.0, 100 * (1 - 0.025 ** (1 / 20))))
    assert harmonic_mean_ci(np.full((200, 3), 100.0)) == share_ci(np.full(200, 100.0))
    assert np.isnan(share_ci(np.array([np.nan]))[:3]).all() and share_ci(np.zeros(0)).n_facts == 0


def test_clusters_are_drawn_whole():
    values = np.random.default_rng(0).uniform(0, 100, size=30)
    alike, relations = np.repeat(values, 7), np.repeat(np.arange(30), 7)
    assert share_ci(alike, relations)[:3] == pytest.approx(share_ci(values)[:3])
    assert harmonic_mean_ci(alike[:, None], [None] * 210)[:3] == pytest.approx(share_ci(alike)[:3])
    assert np.isnan(share_ci(values, ["one"] * 30).ci_low)
    assert share_ci(np.full(9, 100.0), [1, 2, 3] * 3)[:3] == share_ci(np.full(3, 100.0))[:3]


@pytest.mark.parametrize("zeros", [[0], [0, 1], [0, 1, 2]])
def test_S_is_zero_without_a_warning_where_a_mean_is_zero(zeros):
    values = scores(20)
    values[:, zeros] = 0.0
    with np.errstate(all="raise", divide="warn"):
        found = harmonic_mean_ci(values)
    high = share_ci(np.zeros(20)).ci_high if len(zeros) == 3 else 0.0  # nothing else varies with it
    assert (found.mean, found.ci_low, found.ci_high) == (0.0, 0.0, high)


def rows():
    """Three cases under two methods; the last case has no neighbours."""
    one = {"ES": [100.0, 0.0, 100.0], "PS": [50.0, 50.0, 100.0], "NS": [100.0, 50.0, np.nan], "nll": [3.0, 3.5, 4.0]}
    other = {"ES": [0.0, 0.0, 0.0], "PS": [0.0, 0.0, 50.0], "NS": [100.0, 100.0, 100.0], "nll": [3.0, 3.0, 3.0]}
    about = {"case": ["a", "b", "c"], "generations": [["x"], [], ["y"]]}
    tables = [pd.DataFrame(about | values | {"method": name}) for name, values in (("rome", one), ("none", other))]
    return pd.concat(tables, ignore_index=True)


def test_the_interval_of_perplexity_is_over_passages_and_that_of_chains_over_chains():
    cases = [f"case {i}" for i in range(200)]
    nll = [3.0 + 0.1 * passage_of(case) for case in cases]  # cases of one passage say the same
    table = pd.DataFrame({"method": "none", "case": cases, "nll": nll})
    by_passage = summarise(table).set_index("metric").loc["nll"]
    by_chain = summarise(table.assign(chain=range(200))).set_index("metric").loc["nll"]
    assert by_passage["mean"] == by_chain["mean"] == pytest.approx(np.mean(nll))
    # 8 values of spread 0.1 * sqrt(63 / 12), one each, about as often.
    means = [np.mean([x for x, case in zip(nll, cases, strict=True) if passage_of(case) == i]) for i in range(8)]
    expected = stats.t.ppf(0.975, 7) * np.std(means, ddof=1) / 8**0.5
    assert by_passage["ci_high"] - by_passage["mean"] == pytest.approx(expected, rel=0.2)
    assert by_chain["ci_high"] - by_chain["mean"] < expected / 3
    assert (by_passage["over"], by_chain["over"]) == ("passages", "cases")


def test_a_summary_has_a_row_a_method_and_metric_with_means_over_the_cases_that_have_a_value():
    table = summarise(rows())
    assert list(table) == ["method", "metric", "mean", "ci_low", "ci_high", "n", "over"]
    assert list(table["method"].unique()) == ["rome", "none"]
    assert list(table["metric"].unique()) == ["S", "ES", "PS", "NS", "nll", "perplexity"]
    rome = table[table["method"] == "rome"].set_index("metric")
    assert rome.loc["ES", "mean"] == pytest.approx(200 / 3)
    exact = 100 * stats.beta.ppf(0.025, 2, 2), 100 * stats.beta.ppf(0.975, 3, 1)
    assert rome.loc["ES", ["ci_low", "ci_high"]].tolist() == pytest.approx(exact)
    assert (rome.loc["NS", "mean"], rome.loc["NS", "n"], rome.loc["PS", "n"]) == (75.0, 2, 3)
    assert rome.loc["S", "mean"] == pytest.approx(3 / (1 / 50 + 1 / 50 + 1 / 75))  # the cases that have all three
    assert rome.loc["S", "n"] == 2
    assert rome.loc["perplexity", ["mean", "ci_low"]].tolist() == pytest.approx(
        np.exp(rome.loc["nll", ["mean", "ci_low"]].astype(float)).tolist()
    )


def test_nothing_in_percent_leaves_its_range_and_magnitudes_have_theirs():
    random = np.random.default_rng(0)
    table = pd.DataFrame(
        {"EM": [-100.0, -100, -99, 40], "PS": [0.0, 0, 0, 25], "RS": random.uniform(0, 5, 4), "nll": 1}
    )
    summary = summarise(table.assign(method="rome")).set_index("metric")
    assert (summary["ci_low"] <= summary["mean"]).all() and (summary["mean"] <= summary["ci_high"]).all()
    assert summary.loc["EM", "ci_low"] >= -100 and summary.loc["PS", "ci_low"] == 0
    assert mean_ci(table["EM"].to_numpy(float)).ci_low < -100


def test_a_summary_can_be_clustered_by_a_column():
    table = rows().assign(relation=["city", "city", None] * 2)
    clustered = summarise(table, clusters="relation")
    assert set(clustered["over"]) == {"relations"}
    assert clustered["mean"].tolist() == summarise(table)["mean"].tolist()
    with pytest.raises(ValueError, match="with method, language and metrics"):
        summarise(table, clusters="language")


@pytest.mark.parametrize("column", ["model", "chain"])
def test_cases_that_share_an_edited_model_are_drawn_with_it(column):
    table = rows().assign(method="rome", model=range(6))
    shared = table.assign(**{column: [0, 0, 1, 1, 2, 2]})
    pd.testing.assert_frame_equal(summarise(shared), summarise(shared, clusters=column))
    assert not summarise(shared).equals(summarise(table))
    assert set(summarise(shared)["over"]) == {"models"}
    assert set(summarise(table.assign(model=[0, 1, 2, 3, None, None]))["over"]) == {"cases", "passages"}
    pd.testing.assert_frame_equal(summarise(table), summarise(table.drop(columns="model")))


def test_a_summary_by_two_columns_keeps_both():
    table = rows().assign(edits=[1, 1, 10] * 2)
    found = summarise(table, ["method", "edits"])
    assert list(found)[:2] == ["method", "edits"]
    assert found.groupby(["method", "edits"], sort=False).ngroups == 4
    alone = found.query("method == 'rome' and edits == 10").set_index("metric")
    assert alone.loc["ES", "mean"] == 100.0 and alone.loc["ES", "ci_low"] == pytest.approx(2.5)
    assert np.isnan(alone.loc["nll", "ci_low"])
    assert not {"S", "NS"} & set(alone.index)  # no case has them


def test_what_cannot_be_summarised_is_refused():
    for table, by in ((rows().iloc[:0], "method"), (rows(), "model"), (rows()[["method", "case"]], "method")):
        with pytest.raises(ValueError, match="summarise: got"):
            summarise(table, by)
    with pytest.raises(ValueError, match="infinite"):
        summarise(rows().assign(nll=np.inf))


def test_every_metric_that_is_no_text_says_how_its_probability_is_meant():
    for name, metric in metrics.METRICS.items():
        assert metric.definition and metric.whole in ("whole target", "per token", "text", "matrix"), name
        assert metric.forced == (metric.whole not in ("text", "matrix")), name
