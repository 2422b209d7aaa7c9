"""The fault suite runs, in small, and finds what is wrong where something is; `make faults` is the whole of it."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import numpy as np
import pytest

from faults import damage, kills, long_use
from faults.outcome import Outcome, Setting
from faults.work import WORK, load, prepare
from rome_lab.store import Store


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    scratch = tmp_path_factory.mktemp("faults")
    until = time.monotonic() + 600
    return Setting(scratch, prepare(scratch), ("trace",), kills=2, rounds=12, until=until, chance=random.Random(0))


def test_a_killed_search_and_trace_goes_on_to_the_results_of_an_undisturbed_one(setting) -> None:
    outcome = kills.kill(setting, "trace", 2)
    assert (outcome.tried, outcome.wrong, outcome.skipped) == (2, [], "")


def test_damaged_files_are_found_out(setting) -> None:
    lm = load(setting.model)
    for outcome in (damage.damage_store(setting, lm, "trace"), damage.damage_edit(setting, lm)):
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
