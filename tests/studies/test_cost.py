"""Counted cost: against what PyTorch counts while it runs, and against the published models' own numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from oracle import FullForward
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from rome_lab import GaussianNoise, causal_trace
from rome_lab.facts.prompts import read_prompt
from rome_lab.studies.cost.counting import (
    Shape,
    extrapolate,
    larger_models,
    plain_flops,
    published_sizes,
    record_flops,
    recorded_bytes,
    size_of,
    sweep_bytes,
    sweep_flops,
)
from rome_lab.tracing.runs import TraceSettings, run_clean_and_corrupted

EIFFEL = ("The Eiffel Tower is located in the city of", "Eiffel Tower")
FAMILIES = ("gpt2", "gptj", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma2")
KINDS = ("state", "mlp", "attn")


def shape_of(lm, samples, window):
    read = read_prompt(lm, *EIFFEL)
    return Shape(len(read.ids), read.subject_range[0], samples, window)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_arithmetic_of_the_sweep_is_what_pytorch_counts(family) -> None:
    lm = tiny_model(family)
    lm.model.set_attn_implementation("eager")  # PyTorch does not count inside its own attention
    assert lm.readout == lm.plain_readout
    causal_trace(lm, *EIFFEL, samples=1)  # what is tried or looked for once, is not counted
    size, shape = size_of(lm.model), shape_of(lm, samples=3, window=2)
    for kind in KINDS:
        with FlopCounterMode(display=False) as counter:
            causal_trace(lm, *EIFFEL, kind, GaussianNoise(std=0.1), samples=3, window=2)
        assert record_flops(size, shape) + sweep_flops(size, shape, kind) == counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_arithmetic_of_one_forward_a_cell_is_what_pytorch_counts(family) -> None:
    lm = tiny_model(family)
    lm.model.set_attn_implementation("eager")
    read, rows = read_prompt(lm, *EIFFEL), 4
    begin, end = read.subject_range
    forward = FullForward(lm, read.ids, read.subject_range, torch.zeros(rows, end - begin, size_of(lm.model).width))
    with FlopCounterMode(display=False) as both:
        forward.trace("state")
    with FlopCounterMode(display=False) as first:
        forward.trace("state", tokens=[])
    counted = plain_flops(size_of(lm.model), Shape(len(read.ids), begin, samples=rows - 1))
    assert counted == both.get_total_flops() - first.get_total_flops()


def test_what_is_recorded_is_counted_to_the_byte() -> None:
    for family in ("gpt2", "llama"):
        lm = tiny_model(family)
        shape = shape_of(lm, samples=3, window=2)
        recording = run_clean_and_corrupted(lm, *EIFFEL, TraceSettings(GaussianNoise(std=0.1), samples=3)).recording
        tensors = [getattr(recording, name) for name in ("states", "attn", "mlp", "attention_keys", "attention_values")]
        assert recorded_bytes(size_of(lm.model), shape) == sum(x.nbytes for several in tensors for x in several)


def test_sizes_of_published_models_are_the_published_ones() -> None:
    sizes = published_sizes()
    billions = {name: round(size.parameters / 1e9, 2) for name, size in sizes.items()}
    assert billions == {"GPT-2 XL": 1.56, "GPT-J": 6.05, "Llama 2 7B": 6.74, "Llama 2 70B": 68.98}
    assert sizes["GPT-2 XL"].block_weights == 12 * 1600**2
    assert sizes["Llama 2 70B"].key_width * 8 == sizes["Llama 2 70B"].query_width


@pytest.mark.parametrize("kind", KINDS)
def test_what_grows_grows_as_it_should(kind) -> None:
    size = published_sizes()["GPT-J"]
    shape = Shape(tokens=9)

    def doubled(**changes: int) -> float:
        return sweep_flops(size, dataclasses.replace(shape, **changes), kind) / sweep_flops(size, shape, kind)

    assert doubled(samples=20) == pytest.approx(2)
    assert 3 < doubled(tokens=18) < 4.5, "quadratic in the tokens"
    assert doubled(begin=8) < 1 / 9, "one token costs less than a ninth of nine"
    deeper = dataclasses.replace(size, layers=2 * size.layers)
    assert 3 < sweep_flops(deeper, shape, kind) / sweep_flops(size, shape, kind) < 4.5, "quadratic in the layers"
    assert sweep_bytes(size, dataclasses.replace(shape, samples=20), kind) > sweep_bytes(size, shape, kind)


def test_the_extrapolation_is_arithmetic_over_rate() -> None:
    size, shape = published_sizes()["GPT-J"], Shape(tokens=9, begin=1)
    (row,) = extrapolate({"GPT-J": size}, shape, KINDS, 1000, {"a machine": 1e14}, item=2).to_dict("records")
    flops = record_flops(size, shape) + sum(sweep_flops(size, shape, kind) for kind in KINDS)
    assert row["hours, a machine"] == pytest.approx(1000 * flops / 1e14 / 3600)
    assert row["weights (GB)"] == pytest.approx(2 * row["parameters (1e9)"])
    assert row["plain / sweep"] > 3


def test_the_table_of_larger_models_begins_with_the_one_at_hand() -> None:
    lm = tiny_model("llama")
    table = larger_models(lm, rate=2.0, facts=10, tflops=100.0)
    assert table["model"].tolist() == [lm.name, *published_sizes()]
    np.testing.assert_allclose(table["hours, here"] / table["hours, 100 TFLOP/s"], 1e14 / 2e9)
