"""Tracing many facts: the same as one by one, kept in a store that is never trusted blindly and survives being killed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from tiny import TEMPLATE, known, talkative_model, tiny_model

from rome_lab import Fact, GaussianNoise, causal_trace, known_facts, trace_facts
from rome_lab.tracing import many_facts as collection
from rome_lab.tracing.trace import KINDS


@pytest.fixture(scope="module")
def talker():
    """A tiny model that says something that can be an object, for most prompts."""
    return talkative_model()


def same(one, other):
    return len(one) == len(other) and all(
        x.label == y.label and x.prompt == y.prompt and np.array_equal(x.p_restored, y.p_restored, equal_nan=True)
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.slow
def test_many_facts_are_traced_as_each_alone(talker):
    facts = known(talker)
    traces = trace_facts(talker, facts, tuple(KINDS), progress=False, samples=2)
    assert [t.label for t in traces] == list(KINDS) * len(facts)
    for trace in traces:
        fact = next(fact for fact in facts if fact.prompt == trace.prompt)
        alone = causal_trace(talker, fact, kind=trace.kind, severed=trace.severed, samples=2)
        rows = ~np.isnan(trace.p_restored[:, 0])
        np.testing.assert_array_equal(trace.p_restored[rows], alone.p_restored[rows])
        expected = [trace.subject_range[1] - 1] if trace.severed else range(len(trace.tokens))
        assert list(np.nonzero(rows)[0]) == list(expected)


def test_order_does_not_change_a_trace(talker):
    facts = known(talker)
    forward = trace_facts(talker, facts, progress=False, samples=2)
    backward = trace_facts(talker, facts[::-1], progress=False, samples=2)
    assert same(sorted(forward, key=lambda t: (t.prompt, t.kind)), sorted(backward, key=lambda t: (t.prompt, t.kind)))


def test_what_the_store_holds_is_not_traced_again(talker, tmp_path, monkeypatch):
    facts = known(talker)
    first = trace_facts(talker, facts, store=tmp_path, progress=False, samples=2)
    monkeypatch.setattr(collection, "run_clean_and_corrupted", lambda *args: pytest.fail("traced again"))
    assert same(trace_facts(talker, facts, store=tmp_path, progress=False, samples=2), first)


@pytest.mark.parametrize("other", [{"seed": 1}, {"samples": 3}, {"window": 2, "kinds": ("mlp",)}])
def test_other_settings_are_traced_anew(talker, tmp_path, other):
    facts = known(talker)
    settings = {"kinds": ("state", "mlp"), "samples": 2, "window": 4}
    trace_facts(talker, facts, store=tmp_path, progress=False, **settings)
    before = len(list(tmp_path.glob("trace/*")))
    trace_facts(talker, facts, store=tmp_path, progress=False, **(settings | other))
    assert len(list(tmp_path.glob("trace/*"))) > before


def test_another_models_traces_are_never_used(talker, tmp_path):
    facts = known(talker)
    trace_facts(talker, facts, store=tmp_path, progress=False, samples=2)
    files = set(tmp_path.glob("trace/*"))
    changed = tiny_model("llama", int(talker.fingerprint(), 16) % 7 + 300)
    with pytest.raises(ValueError, match="not known to"):
        trace_facts(changed, [Fact("Paris", TEMPLATE, "Zanzibar")], store=tmp_path, progress=False)
    assert set(tmp_path.glob("trace/*")) == files
    with torch.no_grad():
        talker.memory(3).weight[0, 0] += 1e-4
    try:
        trace_facts(talker, facts[:1], store=tmp_path, progress=False, samples=2)
    finally:
        with torch.no_grad():
            talker.memory(3).weight[0, 0] -= 1e-4
    assert len(set(tmp_path.glob("trace/*")) - files) == 3


def test_a_damaged_trace_is_made_again_with_a_warning(talker, tmp_path, caplog):
    facts = known(talker)[:1]
    first = trace_facts(talker, facts, ("state",), store=tmp_path, progress=False, samples=2)
    (file,) = tmp_path.glob("trace/*")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert same(trace_facts(talker, facts, ("state",), store=tmp_path, progress=False, samples=2), first)
    assert "computed again" in caplog.text


def trace_forever(folder, facts, seed, threads):
    torch.set_num_threads(threads)  # those of the process that compares: with others sums may be rounded otherwise
    lm = tiny_model("llama", seed)
    for samples in range(1, 100):
        trace_facts(lm, facts, store=folder, progress=False, samples=samples)


@pytest.mark.slow
def test_killed_at_any_moment_loses_at_most_the_fact_in_hand(tmp_path):
    seed = next(seed for seed in range(200) if len(known(tiny_model("llama", seed))) >= 4)
    lm = tiny_model("llama", seed)
    facts = known(lm)
    arguments = (tmp_path, facts, seed, torch.get_num_threads())
    for pause in (0.3, 0.7, 1.5):
        process = multiprocessing.get_context("spawn").Process(target=trace_forever, args=arguments)
        process.start()
        while not list(tmp_path.glob("trace/[!.]*.safetensors")) and process.is_alive():
            time.sleep(0.05)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    done = {file: file.stat().st_mtime_ns for file in tmp_path.glob("trace/[!.]*.safetensors")}
    fresh = trace_facts(lm, facts, progress=False, samples=1)
    assert same(trace_facts(lm, facts, store=tmp_path, progress=False, samples=1), fresh)
    assert all(file.stat().st_mtime_ns == at for file, at in done.items()), "something finished was made again"


def test_facts_that_the_model_does_not_know_are_left_out_and_reported(talker, caplog):
    facts = [Fact("Paris", TEMPLATE, "Zanzibar"), *known(talker)]
    traces = trace_facts(talker, facts, ("state",), progress=False, samples=1)
    assert len(traces) == len(facts) - 1
    assert "1 of" in caplog.text
    assert "does not know this fact" in caplog.text


def test_a_corruption_that_cannot_be_described_serves_where_nothing_is_stored(talker, tmp_path):
    class Undescribed(GaussianNoise):
        def measured(self, lm):
            return self

        def describe(self, lm):
            return {"corruption": self}  # no JSON

    fact = known(talker)[0]
    (trace,) = trace_facts(talker, [fact], ("state",), progress=False, samples=2, corruption=Undescribed(std=0.3))
    alone = causal_trace(talker, fact, samples=2, corruption=GaussianNoise(std=0.3))
    np.testing.assert_array_equal(trace.p_restored, alone.p_restored)
    with pytest.raises(TypeError, match="JSON"):
        trace_facts(talker, [fact], ("state",), tmp_path, progress=False, samples=2, corruption=Undescribed(std=0.3))


def test_bad_input_is_refused_before_any_work(talker, tmp_path):
    with pytest.raises(ValueError, match="unknown kinds"):
        trace_facts(talker, known(talker), ("hidden",))
    with pytest.raises(ValueError, match=r"the kinds \['mlp'\] are given more than once; name each once"):
        trace_facts(talker, known(talker), ("mlp", "state", "mlp"))
    with pytest.raises(ValueError, match="no facts to trace"):
        trace_facts(talker, [])
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="Cannot write to the folder"):
        trace_facts(talker, known(talker), store=blocked / "results")


def test_more_facts_asked_for_than_known_uses_all_and_says_so(talker, caplog):
    facts = known(talker)
    found = known_facts(talker, facts, n=len(facts) + 5, progress=False)
    assert len(found) <= len(facts)
    assert f"{len(facts) + 5} facts were asked for" in caplog.text
