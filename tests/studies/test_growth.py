"""Measured cost: what is measured is what was asked for, and memory is seen while it is taken."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from test_collection import known, talker  # noqa: F401
from tiny import tiny_model

from rome_lab.facts.prompts import read_prompt
from rome_lab.models.loading import load_model
from rome_lab.studies.cost.counting import Shape
from rome_lab.studies.cost.drawings import growth_panels
from rome_lab.studies.cost.growth import (
    growth_of_one_trace,
    growth_with_facts,
    growth_with_workers,
    of_depth,
    powers_in_words,
    prompt_of_length,
    rate_of,
    rates_in_words,
)
from rome_lab.studies.cost.measuring import peak_bytes, seconds

CPU = torch.device("cpu")
MB = 1_000_000


def test_memory_that_is_given_back_is_still_seen_and_what_was_there_before_is_not() -> None:
    held = np.ones(10 * MB)
    peak = peak_bytes(lambda: float(np.ones(20 * MB).sum()), CPU)
    assert 150 * MB < peak < 170 * MB
    assert peak_bytes(lambda: None, CPU) < 5 * MB < held.nbytes


def test_work_that_fails_fails_and_is_no_longer_watched() -> None:
    with pytest.raises(RuntimeError, match="work"):
        peak_bytes(lambda: (_ for _ in ()).throw(RuntimeError("work")), CPU)


def test_seconds_gives_what_the_work_gives() -> None:
    spent, result = seconds(lambda: "done", CPU)
    assert spent > 0 and result == "done"


@pytest.mark.parametrize("length", [1, 5, 23, 60])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompts_have_the_length_asked_for_and_begin_with_their_subject(family, length) -> None:
    lm = tiny_model(family)
    read = read_prompt(lm, *prompt_of_length(lm, length))
    assert len(read.ids) == length and read.subject_range[0] == 0


def test_prompts_longer_than_the_model_reads_are_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens is more than tiny-llama reads, 64"):
        growth_of_one_trace(tiny_model("llama"), lengths=[65])


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2"])
def test_a_model_of_another_depth_has_everything_else_the_same(family) -> None:
    lm = tiny_model(family)
    before = torch.random.get_rng_state()
    deep = of_depth(lm, 6)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert deep.n_layers == 6 and lm.n_layers == 4
    shapes = [{name: weight.shape for name, weight in x.blocks[1].named_parameters()} for x in (lm, deep)]
    assert shapes[0] == shapes[1] and deep.embedding.weight.shape == lm.embedding.weight.shape


@pytest.mark.slow
def test_growth_measures_each_thing_by_itself() -> None:
    table = growth_of_one_trace(tiny_model("llama"), [5, 12], [2, 5], [1, 4], at=Shape(9, samples=2), repetitions=1)
    assert list(table["along"]) == ["tokens"] * 2 + ["layers"] * 2 + ["samples"] * 2
    shapes = table[["tokens", "layers", "samples"]].to_numpy().tolist()
    assert shapes == [[5, 4, 2], [12, 4, 2], [9, 2, 2], [9, 5, 2], [9, 4, 1], [9, 4, 4]]
    assert (table[["seconds", "forwards", "gflop", "expected_mb"]] > 0).all(axis=None)
    assert (table.groupby("along")["gflop"].diff().dropna() > 0).all()


@pytest.mark.slow
def test_facts_and_workers_are_measured_and_drawn(talker, tmp_path) -> None:  # noqa: F811
    facts = known(talker)
    talker.save_pretrained(tmp_path / "model")
    by_facts = growth_with_facts(talker, facts, [1, 2], ["state"], samples=2)
    assert list(by_facts["at"]) == [1, 2] and by_facts["gflop"].is_monotonic_increasing
    lm = load_model(str(tmp_path / "model"), device="cpu", dtype="bfloat16")
    by_workers = growth_with_workers(lm, known(lm), [2], ["state"], samples=2)
    assert list(by_workers["at"]) == [2] and (by_workers["seconds"] > 0).all()
    figure = growth_panels(pd.concat([by_facts, by_workers], ignore_index=True), rate=1.0)
    assert [ax.get_xlabel() for ax in figure.axes] == ["", "Dask workers", "facts", ""]
    with pytest.raises(ValueError, match="99 facts were asked for"):
        growth_with_facts(talker, facts, [99], ["state"])


def test_without_dask_workers_are_not_measured_and_that_is_said(talker, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match="growth_with_workers needs Dask; install it with"):
        growth_with_workers(talker, known(talker), [1], ["state"])


def test_powers_and_rates_are_those_of_the_points() -> None:
    points = pd.DataFrame(
        {"along": "tokens", "at": [2, 4, 8], "seconds": [1.0, 4.0, 16.0], "gflop": [10.0, 20.0, 40.0]}
    )
    points.loc[3] = ["workers", 2, 5.0, np.nan]
    assert powers_in_words(points) == "tokens: time grows with their power 2.00, arithmetic with 1.00"
    assert rate_of(points) == pytest.approx(70 / 21)
    assert rates_in_words(points) == "3.33 GFLOP/s over all; between 2.5 and 10 in single traces"
