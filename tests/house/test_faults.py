"""The fault suite runs, in small, and finds what is wrong where something is; `make faults` is the whole of it."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from rome_lab.base.store import Store
from tests.faults import __main__ as suite
from tests.faults import damage, kills, long_use
from tests.faults.outcome import Outcome, Setting
from tests.faults.work import WORK, Task, at_once, load, prepare, set_clock


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    scratch = tmp_path_factory.mktemp("faults")
    until = time.monotonic() + 600
    return Setting(scratch, prepare(scratch), ("trace",), kills=2, rounds=12, until=until, chance=random.Random(0))


def test_a_killed_search_and_trace_goes_on_to_the_results_of_an_undisturbed_one(setting) -> None:
    outcome = kills.kill(setting, "trace", 2)
    assert (outcome.tried, outcome.wrong, outcome.skipped) == (2, [], "")


def test_where_one_of_two_processes_has_no_model_both_end(setting) -> None:
    tasks = [setting.task("trace", setting.fresh("trace")) for _ in range(2)]
    assert at_once([tasks[0], replace(tasks[1], model="nowhere")]) == [(None, "the process ended without a word")] * 2


def test_a_sum_of_a_covariance_is_told_from_a_finished_one(tmp_path) -> None:
    inputs, store = {"what": "covariance", "layer": 1}, Store(tmp_path)
    done = store.save({**inputs, "tokens": 100}, {"C": np.eye(2)}, {"tokens": 104})
    furthest = store.save({**inputs, "tokens": None}, {"total": np.eye(2)}, {"tokens": 80, "passages": 5})
    assert kills.summed(tmp_path) == {furthest: 80} and set(kills.finished(tmp_path)) == {done}


def test_a_clock_jumps_from_ahead_to_behind(tmp_path, monkeypatch) -> None:
    real = time.time
    for turn_s, ahead in ((1000, 5000), (0, -5000)):
        monkeypatch.setattr(time, "time", real)
        set_clock(Task("trace", "", tmp_path, tmp_path, ahead=5000, turn_s=turn_s))
        assert time.time() - real() == pytest.approx(ahead, abs=100)


def test_without_time_every_part_is_skipped_and_says_so(tmp_path, capsys) -> None:
    assert suite.main(["--minutes", "0", "--out", str(tmp_path / "faults.csv")]) == 0
    table = pd.read_csv(tmp_path / "faults.csv")
    assert (table["tried"] == 0).all() and table["skipped"].str.endswith("for want of time").all()
    assert len(table) == 5 + 5 + 2 * 4 + 3 + 4 + 5 + 1
    assert capsys.readouterr().out.count("skipped ") == len(table)


def test_a_part_that_ends_early_is_reported_and_the_others_are_made(tmp_path, monkeypatch) -> None:
    def fails(setting):
        yield Outcome("before", tried=1)
        raise RuntimeError("the undisturbed run failed.")

    parts = {"kills": fails, "long": lambda setting: [Outcome("after", tried=1)]}
    monkeypatch.setattr(suite, "PARTS", parts)
    monkeypatch.setattr(suite, "prepare", lambda scratch, name: name)
    assert suite.main(["--parts", *parts, "--out", str(tmp_path / "faults.csv")]) == 1
    table = pd.read_csv(tmp_path / "faults.csv").set_index("check")
    assert table["wrong"].to_dict() == {"before": 0, "the rest of part kills": 1, "after": 0}


def test_a_table_is_kept_of_a_suite_that_is_interrupted(tmp_path, monkeypatch) -> None:
    def interrupted(setting):
        yield Outcome("before", tried=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "PARTS", {"kills": interrupted})
    monkeypatch.setattr(suite, "prepare", lambda scratch, name: name)
    with pytest.raises(KeyboardInterrupt):
        suite.main(["--parts", "kills", "--out", str(tmp_path / "faults.csv")])
    assert list(pd.read_csv(tmp_path / "faults.csv")["check"]) == ["before"]


def test_damaged_files_are_found_out(setting) -> None:
    lm = load(setting.model)
    made = (damage.damage_store(setting, lm, "trace"), damage.damage_edit(setting, lm), damage.damage_data_set(setting))
    for outcome in made:
        assert outcome.tried and not outcome.wrong


def test_long_use_leaves_the_weights_as_they_were(setting) -> None:
    (outcome,) = long_use.use_for_long(setting)
    assert outcome.tried == setting.rounds
    assert not [wrong for wrong in outcome.wrong if "weights" in wrong]


def test_a_wrong_result_and_an_error_without_a_sentence_are_reported(setting, monkeypatch) -> None:
    said = iter([1, 2, KeyError("odd"), ValueError("the file was damaged; make it anew.")])

    def work(lm, model, folder):
        answer = next(said)
        if isinstance(answer, Exception):
            raise answer
        return answer

    folder = setting.fresh("trace")
    Store(folder).save({"what": "trace"}, {}, {})
    monkeypatch.setitem(WORK, "trace", work)
    monkeypatch.setattr(Setting, "undisturbed", lambda self, kind: (folder, 1, 0.1))
    outcome = damage.damage_store(replace(setting, rounds=4 * damage.SLOW), None, "trace")
    wrong = [line.split(": ", 1)[1] for line in outcome.wrong]
    assert wrong[0] == "the results differ from those of whole files" and wrong[1].startswith("NO SENTENCE: Traceback")
    assert wrong[2:] == ["the file was damaged; make it anew."], "with damaged caches the work is to succeed"
    assert str(outcome).startswith("WRONG") and outcome.tried == 4


def test_growth_of_memory_is_reported_and_noise_is_not() -> None:
    rounds = np.arange(200)
    for growth, verdict in ((40_000, True), (100, False)):
        outcome = Outcome("x", tried=200)
        noise = np.random.default_rng(0).integers(-(1 << 20), 1 << 20, 200)
        long_use.judge(outcome, np.stack([(500 << 20) + growth * rounds + noise, np.full(200, 1000)], axis=1))
        assert bool(outcome.wrong) == verdict
