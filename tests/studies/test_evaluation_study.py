"""What evaluation.ipynb tells from a table: marks, verdicts, the order of cases, failing paraphrases, tables to read."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from rome_lab.base import mean_ci
from rome_lab.evaluation import METRICS, summarise
from rome_lab.studies import evaluation as study


def judged(scores: dict[str, list[tuple[float, float, float]]]) -> pd.DataFrame:
    """A table of judged cases from ES, PS and NS by method."""
    rows = [
        {"case": str(i), "method": method, "ES": es, "PS": ps, "NS": ns, "PM": ps / 2, "judged": True}
        for method, several in scores.items()
        for i, (es, ps, ns) in enumerate(several)
    ]
    return pd.DataFrame(rows)


GOOD = judged({"rome": [(100, 100, 80), (100, 90, 80)], "ft": [(100, 80, 40), (100, 90, 50)]})


def test_marks_are_reached_missed_or_cannot_be_told() -> None:
    lines = dict(line.split(": ", 1) for line in study.aims_in_words(summarise(GOOD)).splitlines())
    assert lines["ES"] == "100.0, aim 99: reached"
    assert lines["PS"] == "95.0, aim 90: reached"
    assert lines["S above ft-linf"] == "nan, aim 15: cannot be told"
    S = summarise(GOOD).query("metric == 'S'").set_index("method")["mean"]
    assert lines["S above ft"] == f"{S['rome'] - S['ft']:.1f}, aim 15: reached"
    worse = study.aims_in_words(summarise(judged({"rome": [(98, 90, 75)] * 2})))
    assert "ES: 98.0, aim 99: missed by 1.0" in worse


def test_every_verdict_has_a_line_that_counts_it() -> None:
    agreement = study.agreement_with_paper(judged({"rome": [(100, 96, 75)] * 3, "ft": [(99.9, 88, 40)] * 3}))
    lines = study.verdicts_in_words(agreement).splitlines()
    assert sum(int(line.split(": ")[1].split(" of ")[0]) for line in lines) == len(agreement) == 4
    assert "agrees: 4 of 4: S (rome minus ft), ES (rome minus ft), PS (rome minus ft), NS (rome minus ft)" in lines


def test_the_worst_cases_come_first_and_equals_by_magnitude() -> None:
    table = judged({"none": [(0, 0, 0)] * 3, "rome": [(100, 100, 100), (100, 50, 50), (100, 0, 100)]})
    assert study.worst_first(table) == ["2", "1", "0"]
    assert study.worst_first(table[table["method"] == "none"]) == ["0", "1", "2"]
    tied = table.assign(PM=[0, 0, 0, 3, 2, 1]).assign(ES=50.0, PS=50.0, NS=50.0)
    assert study.worst_first(tied) == ["2", "1", "0"]


def test_tables_to_read_keep_the_order_and_say_mean_and_interval() -> None:
    summary = summarise(GOOD)
    table = study.table_of_means(summary)
    assert list(table.index) == ["rome", "ft"]
    assert list(table.columns) == ["S", "ES", "PS", "PM", "NS", "n"]
    one = summary.set_index(["method", "metric"]).loc[("rome", "PS")]
    assert table.loc["rome", "PS"] == f"{one['mean']:.1f} ({one.ci_low:.1f}, {one.ci_high:.1f})"
    assert (table["n"] == 2).all()
    assert list(study.definitions().index) == list(METRICS)
    assert list(study.definitions()) == ["definition", "unit", "of", "teacher forcing", "better"]


def test_the_figure_has_the_papers_diamonds_where_the_metrics_are_its_own() -> None:
    figure = study.methods_figure(summarise(GOOD), "a model, 2 cases")
    assert "diamonds" in figure.get_suptitle()
    assert [ax.get_title() for ax in figure.axes] == ["S", "ES", "PS", "NS"]
    zsre = pd.DataFrame(
        {"method": ["rome"] * 2, "efficacy": [50.0, 70.0], "paraphrase": 40.0, "specificity": [9.0, 8.0]}
    )
    figure = study.methods_figure(summarise(zsre), "a model")
    assert "diamonds" not in figure.get_suptitle()
    assert [ax.get_title() for ax in figure.axes] == ["efficacy", "paraphrase", "specificity"]


def test_numbers_say_over_what_their_interval_is() -> None:
    together = GOOD[GOOD["method"] == "rome"].assign(method="memit", nll=[1.0, 2.0], case=["a", "c"], model=[0, 0])
    alone = GOOD.assign(nll=1.0, case=["a", "c"] * 2, model=[1, 2, 3, 4])
    summary = summarise(pd.concat([alone, together]))
    numbers = study.plotted_numbers(summary, "a model", "folder/cases.json").set_index(["method", "metric"])
    assert numbers.loc[("rome", "PS"), "interval"] == "95% over cases" and set(numbers["dataset"]) == {"cases.json"}
    assert numbers.loc[("rome", "nll"), ["unit", "interval"]].tolist() == ["nats", "95% over passages"]
    assert numbers.loc["memit", "interval"].isna().all(), "there is one such model"
    assert "95% intervals over cases, of perplexity over passages" in study.methods_figure(summary, "x").get_suptitle()
    two = pd.concat([together.assign(case=[f"{x} {i}" for x in "ac"], model=i, PS=40.0 * i) for i in (1, 2)])
    title = study.methods_figure(summarise(pd.concat([alone, two])), "x").get_suptitle()
    assert "95% intervals over cases, of memit over models, of perplexity over passages" in title
    one_model = together.assign(method="memit")
    assert study.methods_figure(summarise(one_model), "x").get_suptitle().startswith("x; means with no intervals")
    by_relation = summarise(alone.assign(relation=["r", "s"] * 2), clusters="relation")
    assert "95% intervals over relations\n" in study.methods_figure(by_relation, "x").get_suptitle()
    assert study.scorings_figure(summarise(alone), "x").get_suptitle() == "x; means with 95% intervals over cases"


def test_failing_paraphrases_are_counted_with_those_that_the_subject_opens() -> None:
    scores = pd.DataFrame({"case": ["a", "a", "b"], "opens": [True, False, True], "won": [0.0, 100.0, 0.0]})
    assert study.failures_in_words(scores) == "2 of 3 paraphrases fail, 2 of them with the subject in front"
    assert list(study.by_opening(scores)["mean"]) == pytest.approx([100.0, 0.0])


def test_scorings_stand_side_by_side_in_a_table_and_a_figure() -> None:
    table = GOOD.assign(E_written=[100.0, 0.0, 0.0, 0.0], N_written=50.0, P_choice=75.0)
    summary = summarise(table)
    wide = study.table_of_scorings(summary)
    assert list(wide.columns) == [
        ("E", "score"), ("E", "written"), ("P", "score"), ("P", "choice"), ("N", "score"), ("N", "written"),
    ]  # fmt: skip
    assert wide.loc["rome", ("E", "written")].startswith("50 (") and wide.loc["ft", ("E", "written")].startswith("0 (")
    assert "E_written" not in study.table_of_means(summary)
    figure = study.scorings_figure(summary, "a model")
    assert [ax.get_title() for ax in figure.axes] == ["rewrite", "paraphrases", "neighbours"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["score", "argmax", "choice", "written"]


def test_differences_are_paired_and_their_intervals_over_cases_models_and_relations() -> None:
    scores = {"rome": [(100, 80, 60), (100, 90, 70), (100, 70, 50), (100, 60, 40)]}
    scores["joint"] = [(es, ps - 10, ns + 2 * number) for number, (es, ps, ns) in enumerate(scores["rome"])]
    table = judged(scores).assign(nll=2.0, model="a", relation=list("xxyy") * 2)
    table["model"] = [*"1234", *"ppqq"]
    found = study.differences_to(table).set_index("metric")
    assert set(found["method"]) == {"joint"} and set(found["minus"]) == {"rome"} and set(found["n"]) == {4}
    assert found.loc["PS", ["difference", "ci_low", "ci_high"]].tolist() == [-10, -10, -10]
    assert found.loc["nll", "difference"] == 0
    ns = np.array([0.0, 2.0, 4.0, 6.0])
    over_models = mean_ci(ns, [1, 1, 2, 2])
    for column, expected in zip(["difference", "ci_low", "ci_high"], over_models, strict=False):
        assert found.loc["NS", column] == pytest.approx(float(expected))
    assert found.loc["NS", "relations_low"] == pytest.approx(
        float(over_models.ci_low)
    )  # relations are as the models here
    one_each = study.differences_to(table.assign(model=table["case"])).set_index("metric")
    assert one_each.loc["NS", "ci_low"] == pytest.approx(float(mean_ci(ns).ci_low))
    S = summarise(table).query("metric == 'S'").set_index("method")["mean"]
    assert found.loc["S", "difference"] == pytest.approx(S["joint"] - S["rome"], abs=0.5)
    readable = study.table_of_differences(found.reset_index())
    assert readable.loc["joint", "PS"] == "-10.00 (-10.00, -10.00) *"
    assert readable.loc["joint", "ES"] == "+0.00 (+0.00, +0.00)" and "*" not in readable.loc["joint", "NS"]


def test_without_the_reference_or_another_method_there_are_no_differences() -> None:
    table = judged({"ft": [(100, 80, 60)] * 3}).assign(model="a", relation=None)
    for some in table, table.assign(method="rome"):
        assert study.differences_to(some).empty and study.table_of_differences(study.differences_to(some)).empty
