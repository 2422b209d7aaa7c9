"""Judging many cases: as one by one and method by method, kept in a store, interrupted and gone on with, never silent."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from bench import JUDGING, QUICK, UNRELATED, case, known, small
from scipy.stats import hmean
from tiny import tiny_model

from rome_lab.editing import TRAINED, layer_search
from rome_lab.editing.method_table import METHODS
from rome_lab.editing.methods import Proposal, Rome
from rome_lab.editing.optima import Optima
from rome_lab.evaluation import bench as bench_module
from rome_lab.evaluation import bystanders
from rome_lab.evaluation import evaluating as evaluation
from rome_lab.evaluation.bystanders import UNRELATED as MOST
from rome_lab.evaluation.bystanders import groups, spared, unrelated_to
from rome_lab.evaluation.cases import known_cases, load_cases
from rome_lab.evaluation.evaluating import evaluate, reference_corpus, remarks, story
from rome_lab.evaluation.judging import judge_case
from rome_lab.evaluation.metrics import METRICS, summarise
from rome_lab.evaluation.passages import passage_of
from rome_lab.facts.sources import load_facts
from rome_lab.models.changes import Change
from rome_lab.studies.evaluation import drawings as evaluation_plots
from rome_lab.studies.evaluation import paper
from rome_lab.studies.evaluation.paired_differences import pseudo_values

SUBJECTS = ("Paris", "Japan", "Warsaw", "France")
CASES = [case(i, subject) for i, subject in enumerate(SUBJECTS)]
READY = [name for name in METHODS if name not in TRAINED]
ALL = [small(name) for name in READY]
NUMBERS = list(METRICS)


pytestmark = pytest.mark.usefixtures("shared_cache")


def numbers(table: pd.DataFrame) -> np.ndarray:
    return table[[name for name in NUMBERS if name in table]].to_numpy(float)


def run(lm, cases=CASES, method=("none", "ft"), **options) -> pd.DataFrame:
    methods = [small(one) if isinstance(one, str) else one for one in method]
    return evaluate(lm, cases, methods, **{"progress": False, "settings": QUICK, "unrelated": UNRELATED} | options)


@dataclass(frozen=True)
class Spy:
    """A method that changes nothing, tells what it was asked, and fails when told to."""

    asked: list
    name: str = "spy"
    failing: tuple[str, ...] = ()
    error: type[BaseException] = ValueError
    together: int = 1

    def settled(self, lm):
        return self

    def describe(self):
        return {"method": "spy"}

    def change(self, lm, requests, optima):
        self.asked.append([fact.subject for fact, _ in requests])
        if requests[0][0].subject in self.failing:
            raise self.error(f"spy: no change of {requests[0][0].subject!r} for {len(self.asked)} reasons.")
        return Proposal()


def test_a_row_holds_what_judge_says_of_the_change(tiny):
    table = run(tiny, method=["none", "ft"], settings=JUDGING)
    assert list(table["case"]) == [one.id for one in CASES for _ in range(2)]
    assert table["judged"].all()
    for one, (_, rows) in zip(CASES, table.groupby("case", sort=False), strict=True):
        delta = small("ft").change(tiny, [(one.fact, one.target)], None).delta
        settings = replace(JUDGING, known=unrelated_to(one, [], UNRELATED, 0), passages=(passage_of(one.id),))
        for change, (_, row) in zip((Change(), Change(1, delta)), rows.iterrows(), strict=True):
            (expected,) = judge_case(tiny, one, [change], settings)
            texts = {"generations", "written", "verdicts"}
            for name in expected.keys() - texts:
                assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
            assert all(row[name] == expected[name] for name in texts)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_row_says_the_same_whichever_methods_it_stands_among(family):
    lm = tiny_model(family)
    together = run(lm, CASES[:2], READY)
    assert len(together) == 2 * len(READY)
    for name in ("none", "rome-averaged", "ft-linf", "in-context"):
        alone = run(lm, CASES[:2], [name])
        np.testing.assert_allclose(numbers(together[together["method"] == name]), numbers(alone), rtol=2e-4, atol=1e-5)


def test_the_model_is_left_as_it_was(tiny):
    before = tiny.fingerprint()
    run(tiny, CASES[:1], READY)
    assert tiny.fingerprint() == before


def test_what_the_store_holds_is_not_made_again_and_another_method_is_judged_alone(tiny, tmp_path, monkeypatch):
    first = run(tiny, store=tmp_path)
    changes = []
    real = bench_module.judge_all
    monkeypatch.setattr(
        bench_module, "judge_all", lambda lm, asked: changes.extend(change for _, change, _ in asked) or real(lm, asked)
    )
    again = run(tiny, method=["none", "ft", "in-context"], store=tmp_path)
    assert [change.preamble != "" for change in changes] == [True] * len(CASES)
    kept = again[again["method"] != "in-context"].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, first)


@pytest.mark.parametrize(
    "other",
    [
        {"settings": replace(QUICK, text_tokens=9)},
        {"settings": replace(QUICK, corpus=("Some text.",))},
        {"unrelated": UNRELATED[:3]},
        {"method": ["none", replace(small("ft"), tuning=replace(small("ft").tuning, steps=2))]},
        {"cases": [replace(one, neighbours=("Oslo is",) * 3) for one in CASES]},
    ],
)
def test_other_inputs_are_judged_anew(tiny, tmp_path, other):
    run(tiny, store=tmp_path)
    before = len(list(tmp_path.glob("evaluation/*")))
    run(tiny, **({"store": tmp_path} | other))
    assert len(list(tmp_path.glob("evaluation/*"))) > before


def test_interrupted_it_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "CASES_TOGETHER", 2)
    spy = Spy([], failing=("Warsaw",), error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, method=["ft", spy], store=tmp_path)
    assert len(list(tmp_path.glob("evaluation/*"))) == 4  # two methods of the two cases before
    rest = Spy([])
    table = run(tiny, method=["ft", rest], store=tmp_path)
    assert rest.asked == [["Warsaw"], ["France"]]
    pd.testing.assert_frame_equal(table, run(tiny, method=["ft", Spy([])]))


def evaluate_forever(folder):
    torch.set_num_threads(1)
    lm = tiny_model("llama")
    for tokens in range(1, 60):
        run(lm, store=folder, settings=replace(QUICK, text_tokens=tokens))


def test_killed_at_any_moment_loses_at_most_the_case_in_hand(tiny, tmp_path):
    for pause in (0.1, 0.5):
        process = multiprocessing.get_context("spawn").Process(target=evaluate_forever, args=(tmp_path,))
        process.start()
        while not list(tmp_path.glob("evaluation/[!.]*.safetensors")) and process.is_alive():
            time.sleep(0.02)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    done = {file: file.stat().st_mtime_ns for file in tmp_path.glob("evaluation/[!.]*.safetensors")}
    settings = replace(QUICK, text_tokens=1)
    table = run(tiny, store=tmp_path, settings=settings)
    np.testing.assert_allclose(numbers(table), numbers(run(tiny, settings=settings)), rtol=1e-4)
    assert all(file.stat().st_mtime_ns == at for file, at in done.items()), "something finished was made again"


def test_a_case_that_a_method_cannot_edit_is_reported_and_spoils_no_other(tiny, caplog):
    spy = Spy([], failing=("Japan", "France"))
    with caplog.at_level(logging.WARNING):
        table = run(tiny, method=["ft", spy])
    assert "2 of 8 rows could not be judged" in caplog.text
    failed = table[~table["judged"]]
    assert list(failed["subject"]) == ["Japan", "France"]
    assert set(failed["method"]) == {"spy"}
    assert np.isnan(numbers(failed)).all()
    counted = remarks(table)
    assert counted.to_dict("records") == [
        {"method": "spy", "judged": False, "remark": "spy: no change of … for … reasons.", "cases": 2}
    ]
    summary = summarise(table).set_index(["method", "metric"])["n"]
    assert (summary["ft", "ES"], summary["spy", "ES"]) == (4, 2)
    pd.testing.assert_frame_equal(
        table[table["method"] == "ft"].reset_index(drop=True), run(tiny, method=["ft"]), rtol=1e-4
    )


def test_a_change_that_breaks_the_model_spoils_its_own_row_only(tiny):
    @dataclass(frozen=True)
    class Breaker(Spy):
        def change(self, lm, requests, optima):
            return Proposal(1, torch.full((32, 48), 1e38))

    table = run(tiny, CASES[:1], ["none", Breaker([])])
    assert list(table["judged"]) == [True, False]
    assert table["remark"][1].startswith("judge")
    np.testing.assert_allclose(numbers(table[:1]), numbers(run(tiny, CASES[:1], ["none"])), rtol=1e-5)


def test_where_nothing_can_be_judged_the_first_reason_is_given(tiny):
    with pytest.raises(ValueError, match=r"none of 4 rows could be judged on tiny-llama; .* no change of 'Paris'"):
        run(tiny, method=[Spy([], failing=SUBJECTS)])


def test_an_edit_that_did_not_converge_is_judged_and_remarked_on(tiny):
    table = run(tiny, CASES[:2], ["rome"])
    assert table["judged"].all()
    assert table["remark"].str.startswith("v* did not converge").all()
    assert remarks(table)["cases"].tolist() == [2]


def test_requests_are_met_together_and_every_case_is_judged_with_all_of_them(tiny):
    spy = Spy([], together=3)
    run(tiny, method=[spy])
    assert spy.asked == [["Paris", "Japan", "Warsaw"], ["France"]]  # one change for all that are edited together
    joint = run(tiny, CASES[:2], ["joint"])
    delta = (
        small("rome").change(tiny, [(one.fact, one.target) for one in CASES[:2]], Optima(tiny, progress=False)).delta
    )
    for one, (_, row) in zip(CASES, joint.iterrows(), strict=False):
        (expected,) = judge_case(
            tiny, one, [Change(1, delta)], replace(QUICK, known=unrelated_to(one, [], UNRELATED, 0))
        )
        assert row["EM"] == pytest.approx(expected["EM"], rel=1e-3)


def test_groups_are_full_in_order_and_hold_no_subject_twice():
    cases = [case(i, subject) for i, subject in enumerate(["a", "b", "a", "c", "d", "a"])]
    found = groups(cases, 2)
    assert [[one.fact.subject for one in group] for group in found] == [["a", "b"], ["a", "c"], ["d", "a"]]
    assert sorted(one.id for group in found for one in group) == [one.id for one in cases]


def test_two_names_of_one_method_are_judged_once(tiny, monkeypatch):
    judged = []
    real = bench_module.judge_all
    monkeypatch.setattr(bench_module, "judge_all", lambda lm, asked: judged.append(len(asked)) or real(lm, asked))
    table = run(tiny, CASES[:1], ["rome", "rome-both"])
    assert judged == [1]
    assert list(table["method"]) == ["rome", "rome-both"]
    np.testing.assert_array_equal(numbers(table[:1]), numbers(table[1:]))


def test_facts_of_damage_share_nothing_with_the_case():
    one = case(0, "Paris", truth="Rome", target="Tokyo")
    others = (
        known(one),
        replace(known(one), subject="Tokyo", relation="x"),
        replace(known(one), subject="Oslo", relation="x"),
    )
    chosen = unrelated_to(one, [], (*UNRELATED, *others), 0)
    assert set(chosen) == set(UNRELATED) - {UNRELATED[2]}  # its object is the case's
    assert unrelated_to(one, [], (*others, *UNRELATED[::-1]), 0) == chosen
    many = [Fact_(i) for i in range(40)]
    assert len(unrelated_to(one, [], many, 0)) == MOST
    assert unrelated_to(one, [], many, 0) != unrelated_to(case(1, "Paris"), [], many, 0)


def test_facts_of_damage_share_nothing_with_what_is_edited_together_with_the_case():
    one = case(0, "Paris")
    mate = (replace(UNRELATED[0], object="Krakow"), "Colosseum")  # Marie, another object, a target that is a subject
    chosen = unrelated_to(one, [(one.fact, one.target), mate], UNRELATED, 0)
    assert set(chosen) == {UNRELATED[1], UNRELATED[3]}
    related = replace(UNRELATED[1], relation="birth")
    assert related not in unrelated_to(one, [mate], (*UNRELATED, related), 0)


def test_the_pool_is_drawn_by_a_seed_that_no_cases_are_drawn_by(tiny, monkeypatch):
    seeds = []
    monkeypatch.setattr(bystanders, "facts_said_at_once", lambda lm, facts, n, seed, *more: seeds.append(seed) or ())
    bystanders.known_pool(tiny)
    with pytest.raises(ValueError, match="seed"):
        replace(QUICK, seed=seeds[0])


def test_neighbours_that_are_edited_themselves_are_not_judged(tiny):
    first, second = case(0, "Paris"), case(1, "Oslo")
    requests = [(one.fact, one.target) for one in (first, second)]
    left = spared(first, requests)
    assert (left.neighbours, left.neighbour_subjects) == (("The town is",), ("town",))
    assert spared(second, requests) == second  # about itself: not for this to say
    assert spared(replace(first, neighbour_subjects=()), requests).neighbours == ("The town is",)
    (alone,) = judge_case(tiny, left, [Change()], QUICK)
    table = run(tiny, [first, second], ["none", Spy([], together=2)])
    by_method = table[table["case"] == first.id].set_index("method")["NM"]
    assert by_method["spy"] == pytest.approx(alone["NM"], rel=1e-4, abs=0)
    assert by_method["none"] != pytest.approx(alone["NM"], rel=1e-2, abs=0)
    town = case(2, "town")
    table = run(tiny, [first, second, town], [Spy([], together=3)])
    assert table["NS"].isna().tolist() == [True, False, False]


def Fact_(number: int):
    return replace(UNRELATED[3], subject=f"Thing {number}")


@pytest.mark.parametrize(
    ("cases", "method", "said"),
    [
        ([], "none", "there are no cases"),
        (CASES, "romee", "there is no method 'romee'; choose from none, rome"),
        (CASES, ["ft", "ft"], "the methods are ft, ft; give at least one, and none twice"),
        (CASES, [], "the methods are none; give at least one"),
        ([CASES[0], CASES[0]], "none", "two cases have one id"),
        (CASES, "rome", "rome: no layer is known for tiny-llama, and none could be suggested"),
        (CASES, Rome(layer=9), "layer is 9"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(tiny, cases, method, said, monkeypatch):
    # A layer is sought among the embedded facts; a few are enough to find that a random model knows none.
    monkeypatch.setattr(layer_search, "load_facts", lambda name: load_facts(name)[:20])
    with pytest.raises(ValueError, match=said):
        evaluate(tiny, cases, method, unrelated=UNRELATED)


def test_a_store_that_cannot_be_written_is_found_before_any_work(tiny, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    spy = Spy([])
    with pytest.raises(OSError, match="Cannot write to the folder"):
        run(tiny, method=[spy], store=blocked / "results")
    assert spy.asked == []


# Files of the published form


def counterfact(number: int, subject: str) -> dict:
    rewrite = {
        "prompt": "The city of {} is",
        "relation_id": "P1",
        "subject": subject,
        "target_new": {"str": "Tokyo", "id": "Q1"},
        "target_true": {"str": "Rome", "id": "Q2"},
    }
    texts = {"paraphrase_prompts": [f"{subject} stands in"], "neighborhood_prompts": ["Oslo is", "The town is"]}
    more = {"attribute_prompts": ["The tower is"], "generation_prompts": [f"{subject} is"]}
    return {"case_id": number, "requested_rewrite": rewrite, **texts, **more}


OTHER_SCORINGS = {f"{part}_{scoring}" for part in "EPN" for scoring in ("argmax", "written")}


def zsre(number: int, subject: str) -> dict:
    asked = {"src": f"Where is {subject}?", "rephrase": f"{subject} is where?", "loc": "nq question: who is it"}
    return {"subject": subject, **asked, "alt": "Tokyo", "answers": ["Rome"], "loc_ans": "Marie"}


@pytest.mark.parametrize(
    ("record", "metrics"),
    [
        (counterfact, {"ES", "EM", "PS", "PM", "NS", "NM", "GE", "RS", "nll", "known"} | OTHER_SCORINGS),
        (zsre, {"efficacy", "paraphrase", "specificity", "nll", "known"} | OTHER_SCORINGS),
    ],
)
def test_files_of_the_published_forms_give_their_papers_metrics(tiny, tmp_path, record, metrics):
    file = tmp_path / "set.json"
    file.write_text(json.dumps([record(i, subject) for i, subject in enumerate(SUBJECTS)]))
    cases = known_cases(tiny, file, n=3, progress=False, known_only=False)
    table = run(tiny, cases, ["none", "ft"], settings=replace(JUDGING, corpus=reference_corpus(load_cases(file))))
    assert len(table) == 6
    assert metrics == {name for name in NUMBERS if name in table}
    assert table[sorted(metrics)].notna().all(axis=None)
    summary = summarise(table)
    assert ("S" in set(summary["metric"])) == ("ES" in metrics)
    if record is zsre:
        taught = replace(small("ft"), tuning=replace(small("ft").tuning, steps=40, learning_rate=0.05))
        assert run(tiny, cases, [taught])["efficacy"].tolist() == [100.0] * 3


# Reading the table


def test_a_story_tells_the_case_its_numbers_and_its_texts(tiny):
    table = run(tiny, CASES[:2], ["none", "ft"], settings=JUDGING)
    told = story(table, "case/1", ["none", "ft"])
    assert told.startswith("The city of Japan is -> Tokyo (in truth Rome); case case/1")
    assert told.count("Japan is known") == 2
    assert "Paris" not in told
    with pytest.raises(ValueError, match="no case 'case/9'"):
        story(table, "case/9")


def by_hand(**scores: list[tuple[float, float, float]]) -> pd.DataFrame:
    """A table of ES, PS and NS of each method's cases."""
    rows = [
        {"case": str(i), "method": name.replace("_", "-"), "ES": es, "PS": ps, "NS": ns}
        for name, cases in scores.items()
        for i, (es, ps, ns) in enumerate(cases)
    ]
    return pd.DataFrame(rows)


def test_differences_are_paired_and_compared_with_the_papers():
    table = by_hand(rome=[(100, 90, 80), (100, 80, 60), (100, 100, 70)], none=[(0, 0, 79), (0, 10, 62), (0, 20, 65)])
    found = paper.agreement_with_paper(table).set_index(["metric", "minus"])
    assert found.loc[("ES", "none"), "difference"] == 100
    assert found.loc[("ES", "none"), "paper"] == pytest.approx(100 - 22.2)
    assert found.loc[("PS", "none"), "difference"] == pytest.approx(80)
    assert found.loc[("PS", "none"), "verdict"] == "agrees"
    assert found.loc[("NS", "none"), "difference"] == pytest.approx((1 - 2 + 5) / 3)
    assert found.loc[("NS", "none"), "verdict"] == "can't tell"
    assert set(found.index.get_level_values("minus")) == {"none"}
    worse = paper.agreement_with_paper(by_hand(rome=[(0, 0, 0)] * 3, none=[(100, 100, 100)] * 3))
    assert set(worse["verdict"]) == {"differs", "agrees"}
    assert worse.set_index("metric").loc["NS", "verdict"] == "agrees"  # the paper's ROME is below no edit too


def test_fewer_than_three_cases_tell_nothing_and_cases_of_one_method_only_do_not_count():
    table = by_hand(rome=[(100, 90, 80)] * 2 + [(100, 50, 50)], ft=[(0, 0, 0)] * 2)
    found = paper.agreement_with_paper(table)
    assert set(found["verdict"]) == {"can't tell"}
    assert set(found["n"]) == {2}


def test_pseudo_values_of_one_score_in_three_columns_are_the_scores_and_their_mean_is_near_s():
    scores = np.array([10.0, 50.0, 90.0, 70.0])
    np.testing.assert_allclose(pseudo_values(np.stack([scores] * 3, axis=1)), scores)
    values = np.random.default_rng(0).uniform(60, 100, (400, 3))
    assert pseudo_values(values).mean() == pytest.approx(hmean(values.mean(axis=0)), abs=0.05)
    interval = summarise(pd.DataFrame(values, columns=["ES", "PS", "NS"]).assign(method="x")).iloc[0]
    spread = 1.966 * pseudo_values(values).std(ddof=1) / 20
    assert interval["ci_high"] - interval["mean"] == pytest.approx(spread, rel=0.02)


def test_the_papers_s_is_the_harmonic_mean_of_its_parts():
    numbers = paper.paper_numbers().pivot(index="method", columns="metric", values="mean")
    np.testing.assert_allclose(hmean(numbers[["ES", "PS", "NS"]].to_numpy(), axis=-1), numbers["S"], atol=0.15)
    assert numbers.loc["none", "GE"] == pytest.approx(6.266)


# The figures


@pytest.fixture
def summary():
    rng = np.random.default_rng(1)
    rows = [
        {"method": method, "case": i, "edits": edits, "nll": rng.uniform(1, 2)}
        | {name: rng.uniform(0, 100) for name in ("ES", "PS", "NS", "RS")}
        for method in ("none", "rome", "ft")
        for edits in ((0,) if method == "none" else (1, 10))
        for i in range(5)
    ]
    return summarise(pd.DataFrame(rows), ["method", "edits"])


def test_dots_stand_at_the_means_a_row_a_method_and_scores_share_their_scale(summary):
    first = summary[summary["edits"] < 10]
    figure = evaluation_plots.dot_table(first, ["S", "ES", "RS", "GE"], paper=paper.paper_numbers())
    assert [ax.get_title() for ax in figure.axes] == ["S", "ES", "RS"]  # nobody has GE
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    ax = figure.axes[1]
    drawn = {
        round(float(line.get_xdata()[0]), 9)
        for line in ax.lines
        if line.get_marker() in "sov" and len(line.get_xdata()) == 1
    }
    assert drawn == {round(mean, 9) for mean in first[first["metric"] == "ES"]["mean"]}
    (theirs,) = (line for line in ax.lines if line.get_markerfacecolor() == "none")
    assert list(theirs.get_xdata()) == [22.2, 100.0, 100.0]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["none", "rome", "ft"]
    plt.close(figure)


def test_curves_pass_through_the_means_and_what_has_no_edits_is_a_level_line(summary):
    ax = evaluation_plots.curves(summary, "ES", "edits", log=True)
    assert set(ax.get_legend_handles_labels()[1]) == {"none", "rome", "ft"}
    means = summary[summary["metric"] == "ES"].set_index("method")["mean"]
    drawn = [list(line.get_ydata()) for line in ax.lines if len(line.get_ydata()) == 2]
    assert [means["none"]] * 2 in drawn
    assert list(means["rome"]) in drawn
    assert list(means["ft"]) in drawn
    plt.close(ax.figure)


def test_a_metric_that_is_not_there_is_refused(summary):
    with pytest.raises(ValueError, match="no metric 'GE', only S, ES"):
        evaluation_plots.dots(summary, "GE")
