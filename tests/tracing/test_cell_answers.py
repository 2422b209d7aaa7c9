"""The three runs of one cell, made again: against one full forward a cell, and against the trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import FullForward
from test_tracing import EIFFEL, telling_model
from tiny import FAMILIES, tiny_model

from rome_lab import Fact, FixedNoise, GaussianNoise, causal_trace
from rome_lab.facts import read_prompt
from rome_lab.tracing import KINDS, Trace, answers_at, restored_layers
from rome_lab.tracing.corruption import noise_key
from rome_lab.tracing.one_fact import restore
from rome_lab.tracing.runs import TraceSettings, run_clean_and_corrupted

QUICK = {"samples": 3, "window": 2, "seed": 5}


def full_forward(lm, trace) -> FullForward:
    """One full forward a run, with the trace's noise."""
    read = read_prompt(lm, trace.prompt, trace.subject)
    shape = (trace.samples, read.subject_range[1] - read.subject_range[0], lm.embedding.weight.shape[1])
    key = noise_key(trace.seed, trace.prompt, trace.subject_range)
    return FullForward(lm, read.ids, read.subject_range, GaussianNoise(std=trace.noise_std).noise(lm, shape, key))


def all_probabilities(lm, trace, token, layer):
    """(V,) in the clean, the corrupted and the restored run."""
    slow = full_forward(lm, trace)
    p_clean, clean = slow.run(keep=True)
    p_corrupted, corrupted = slow.run(slow.noise, keep=True)
    every = slice(None)
    layers = slow.restored(trace.kind, layer, trace.window)
    hold = [(trace.kind, x, every, token, clean[trace.kind, x][0, token]) for x in layers]
    if trace.severed:
        above = range(layer + 1, lm.n_layers)
        hold += [(trace.severed, x, every, token, corrupted[trace.severed, x][:, token]) for x in above]
    return p_clean.mean(0), p_corrupted.mean(0), slow.run(slow.noise, hold)[0].mean(0)


def trace_of(lm, label="state", **more) -> Trace:
    kind, severed = KINDS[label]
    return causal_trace(lm, *EIFFEL, kind, severed=severed, **QUICK | more)


def assert_same_answers(lm, trace, token, layer) -> None:
    cell = answers_at(lm, trace, token, layer, n=4)
    expected = all_probabilities(lm, trace, token, layer)
    for run, p in zip((cell.clean, cell.corrupted, cell.restored), expected, strict=True):
        values, ids = p.topk(4)
        assert [value for _, value in run.top] == pytest.approx(values.tolist(), abs=1e-5)
        for (text, value), i in zip(run.top, ids.tolist(), strict=True):
            assert text == lm.tokenizer.decode([i]) or float(p[i]) == pytest.approx(value, abs=1e-5)
    assert cell.restored.p_answer == pytest.approx(trace.p_restored[token, layer], abs=1e-5)
    assert cell.clean.rank == 1


@pytest.mark.parametrize("label", KINDS)
def test_the_three_runs_are_those_of_one_full_forward_each(label) -> None:
    lm = telling_model("llama")
    trace = trace_of(lm, label)
    begin, end = trace.subject_range
    for token in {begin - 1, begin, end - 1, len(trace.tokens) - 1}:
        for layer in (0, 1, lm.n_layers - 1):
            assert_same_answers(lm, trace, token, layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family) -> None:
    lm = telling_model(family)
    for label in ("state", "mlp", "attn"):
        trace = trace_of(lm, label)
        assert_same_answers(lm, trace, trace.subject_range[1] - 1, 1)


def test_ranks_and_probabilities_belong_to_the_answer() -> None:
    lm = telling_model("llama")
    trace = trace_of(lm)
    cell = answers_at(lm, trace, 3, 2)
    p = all_probabilities(lm, trace, 3, 2)[1]
    answer_id = next(i for i in range(len(p)) if lm.tokenizer.decode([i]) == trace.answer)
    assert cell.corrupted.p_answer == pytest.approx(float(p[answer_id]), abs=1e-6)
    assert cell.corrupted.rank == 1 + int((p > p[answer_id]).sum())
    assert cell.clean.top[0][0] == trace.answer == cell.answer


def test_a_fact_places_its_subject_where_plain_text_would_not() -> None:
    lm = telling_model("llama")
    second = read_prompt(lm, Fact("Paris", "The Paris of today and {} of", "any"))
    assert second.subject_range != read_prompt(lm, second.text, "Paris").subject_range
    runs = run_clean_and_corrupted(lm, second, None, TraceSettings(**QUICK))
    trace = restore(runs, "state")
    cell = answers_at(lm, trace, second.subject_range[0], 1)
    assert cell.corrupted.p_answer == pytest.approx(runs.metrics["probability"][1:].mean(), abs=1e-6)


def test_restored_layers_are_clipped_at_the_ends() -> None:
    lm = telling_model("llama")
    assert restored_layers(trace_of(lm, "mlp", window=3)) == [(0, 1), (0, 2), (1, 3), (2, 3)]
    assert restored_layers(trace_of(lm)) == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_the_trace_of_another_model_is_refused() -> None:
    lm = telling_model("llama")
    trace = trace_of(lm)
    with pytest.raises(ValueError, match="trace again with this model"):
        answers_at(tiny_model("llama", 99), trace, 1, 1)
    with pytest.raises(ValueError, match="4 layers and the trace 3; .*trace again"):
        answers_at(lm, replace(trace, p_restored=trace.p_restored[:, :3]), 1, 1)
    with pytest.raises(ValueError, match="other tokens than the trace"):
        answers_at(lm, replace(trace, tokens=(*trace.tokens[:-1], "x")), 1, 1)
    wrong = trace.p_restored.copy()
    wrong[3, 2] += 0.01
    with pytest.raises(ValueError, match="restoring token 3 at layer 2 gives"):
        answers_at(lm, replace(trace, p_restored=wrong), 3, 2)


def test_noise_that_a_trace_does_not_keep_is_refused_in_a_sentence() -> None:
    lm = telling_model("llama")
    begin, end = read_prompt(lm, *EIFFEL).subject_range
    noise = torch.randn(3, end - begin, lm.embedding.weight.shape[1], generator=torch.Generator().manual_seed(1))
    trace = causal_trace(lm, *EIFFEL, corruption=FixedNoise(noise))
    with pytest.raises(ValueError, match="FixedNoise or a corruption of your own, which a trace does not keep"):
        answers_at(lm, trace, 1, 1)


@pytest.mark.parametrize("cell", [(-1, 0), (0, 4), (99, 0), (1.5, 0), (True, 0)])
def test_a_cell_that_is_not_there_is_refused(cell) -> None:
    lm = telling_model("llama")
    with pytest.raises(ValueError, match="answers_at: "):
        answers_at(lm, trace_of(lm), *cell)


def test_a_token_that_was_not_restored_has_answers_all_the_same() -> None:
    lm = telling_model("llama")
    trace = trace_of(lm)
    holey = trace.p_restored.copy()
    holey[3] = np.nan
    assert answers_at(lm, replace(trace, p_restored=holey), 3, 2) == answers_at(lm, trace, 3, 2)


def test_another_answer_than_the_models_own_is_followed_in_all_runs() -> None:
    lm = telling_model("gpt2")
    trace = causal_trace(lm, *EIFFEL, "mlp", answer="Rome", **QUICK)
    token = lm.tokenizer(EIFFEL[0] + " Rome")["input_ids"][len(trace.tokens)]
    assert trace.answer == lm.tokenizer.decode([token])
    for place, layer in ((2, 0), (len(trace.tokens) - 1, 2)):
        clean, corrupted, restored = (float(p[token]) for p in all_probabilities(lm, trace, place, layer))
        cell = answers_at(lm, trace, place, layer)
        assert (trace.p_clean, trace.p_corrupted) == pytest.approx((clean, corrupted), abs=1e-6)
        assert (cell.clean.p_answer, cell.corrupted.p_answer) == pytest.approx((clean, corrupted), abs=1e-6)
        assert trace.p_restored[place, layer] == pytest.approx(restored, abs=1e-6)
        assert cell.restored.p_answer == pytest.approx(restored, abs=1e-6) and cell.clean.rank > 1


def test_rows_are_shown_as_they_come() -> None:
    lm, parts = telling_model("llama"), []
    whole = causal_trace(lm, *EIFFEL, "state", callback=parts.append, **QUICK)
    assert [int(np.isfinite(part.p_restored).all(axis=1).sum()) for part in parts] == [*range(1, len(whole.tokens) + 1)]
    for part in parts:
        there = np.isfinite(part.p_restored)
        assert np.array_equal(part.p_restored[there], whole.p_restored[there])
