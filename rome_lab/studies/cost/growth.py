"""How the time and the memory of tracing grow, measured on the machine at hand and counted beside it.

    growth_of_one_trace(lm, lengths, depths, samples)    with tokens, layers and samples of the noise
    growth_with_facts(lm, facts, numbers)                with facts
    growth_with_workers(lm, facts, numbers)              with the workers of a Dask cluster on this machine
    powers_in_words(points)                              how fast time and arithmetic grow
    rate_of(points), rates_in_words(points)              operations a second, of all measured traces together

The growths return a tidy DataFrame: `along` (what grows), `at` (how much of it), the shape of the trace, `gflop` counted
by `rome_lab.studies.cost.counting`, and `seconds` and `mb` measured. `growth_of_one_trace` gives the median, `least` and
`greatest` of several, the median of `forwards`, the time in units of one plain forward of the 1 + S texts, and
`expected_mb`, counted.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rome_lab.facts import Fact, load_facts, read_prompt
from rome_lab.models import LanguageModel
from rome_lab.studies.cost.counting import Shape, record_flops, size_of, sweep_bytes, sweep_flops
from rome_lab.studies.cost.measuring import peak_bytes, seconds
from rome_lab.tracing import GaussianNoise, causal_trace, trace_facts

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

SENTENCES = 200  # of the embedded facts, from which long prompts are cut
Row = dict[str, object]


def growth_of_one_trace(
    lm: LanguageModel,
    lengths: Sequence[int] = (),
    depths: Sequence[int] = (),
    samples: Sequence[int] = (),
    kind: str = "state",
    at: Shape | None = None,
    repetitions: int = 3,
) -> pd.DataFrame:
    """One trace at each number of tokens, of layers and of samples, all else as in `at`.

    Args:
        lengths: T, tokens of a prompt whose subject is its first word, so that every token is swept.
        depths: L, of random models that are else as `lm`: what weights say has no part in the time.
        samples: S.
        at: 9 tokens and 10 samples by default.
        repetitions: of each, after one that does not count.

    Raises:
        ValueError: `lm` reads fewer tokens than a prompt is to have.
    """
    at = at or Shape(tokens=9)
    rows = []
    for length in lengths:
        rows.append({"along": "tokens", "at": length} | trace_row(lm, replace(at, tokens=length), kind, repetitions))
    for depth in depths:
        rows.append({"along": "layers", "at": depth} | trace_row(of_depth(lm, depth), at, kind, repetitions))
    for number in samples:
        rows.append({"along": "samples", "at": number} | trace_row(lm, replace(at, samples=number), kind, repetitions))
    return pd.DataFrame(rows)


def trace_row(lm: LanguageModel, shape: Shape, kind: str, repetitions: int) -> Row:
    """Time and memory of one trace, and the time of one plain forward of its 1 + S texts."""
    prompt, subject = prompt_of_length(lm, shape.tokens)
    read = read_prompt(lm, prompt, subject)
    shape = replace(shape, begin=read.subject_range[0])
    # The size of the noise costs nothing, and measuring the embeddings' would be timed, too.
    noise = GaussianNoise(std=1.0)

    def trace() -> None:
        causal_trace(lm, prompt, subject, kind, noise, shape.samples, shape.window)

    @torch.no_grad()
    def forward() -> None:
        lm.model(read.ids.expand(1 + shape.samples, -1), use_cache=False)

    forward()
    peak = peak_bytes(trace, lm.device)  # which also warms up
    times = [(seconds(trace, lm.device)[0], seconds(forward, lm.device)[0]) for _ in range(repetitions)]
    size = size_of(lm.model)
    return {
        "layers": lm.n_layers,
        "tokens": shape.tokens,
        "samples": shape.samples,
        "gflop": (record_flops(size, shape) + sweep_flops(size, shape, kind)) / 1e9,
        "seconds": statistics.median(spent for spent, _ in times),
        "least": min(spent for spent, _ in times),
        "greatest": max(spent for spent, _ in times),
        "forwards": statistics.median(spent / forward for spent, forward in times),
        "mb": peak / 1e6,
        "expected_mb": sweep_bytes(size, shape, kind, lm.dtype.itemsize) / 1e6,
    }


def growth_with_facts(
    lm: LanguageModel, facts: Sequence[Fact], numbers: Sequence[int], kinds: Sequence[str], samples: int = 10
) -> pd.DataFrame:
    """Tracing the first facts, without a store; `facts` are known to `lm`.

    Raises:
        ValueError: there are fewer facts than a number asks for.
    """
    enough_facts(facts, numbers)
    corruption = GaussianNoise().measured(lm)
    trace_facts(lm, facts[:1], kinds, progress=False, corruption=corruption, samples=samples)  # to warm up
    rows = []
    for number in numbers:

        def trace(chosen: Sequence[Fact] = facts[:number]) -> None:
            trace_facts(lm, chosen, kinds, progress=False, corruption=corruption, samples=samples)

        spent = seconds(trace, lm.device)[0]
        peak = peak_bytes(trace, lm.device)
        gflop = facts_gflop(lm, facts[:number], kinds, samples)
        rows.append({"along": "facts", "at": number, "gflop": gflop, "seconds": spent, "mb": peak / 1e6})
    return pd.DataFrame(rows).assign(layers=lm.n_layers, samples=samples)


def facts_gflop(lm: LanguageModel, facts: Sequence[Fact], kinds: Sequence[str], samples: int) -> float:
    """Arithmetic of tracing the facts, in 1e9 operations."""
    size, total = size_of(lm.model), 0.0
    for fact in facts:
        prompt = read_prompt(lm, fact)
        shape = Shape(len(prompt.ids), prompt.subject_range[0], samples)
        total += record_flops(size, shape) + sum(sweep_flops(size, shape, kind) for kind in kinds)
    return total / 1e9


def growth_with_workers(
    lm: LanguageModel, facts: Sequence[Fact], numbers: Sequence[int], kinds: Sequence[str], samples: int = 10
) -> pd.DataFrame:
    """Tracing all the facts by `trace_facts` with a client, whose workers are processes that share this machine.

    Each has a model like `lm` and its part of the threads. All facts are traced once before, so that loading the models is
    not timed; what is timed includes that the client reads its weights to know them from others.

    Raises:
        ImportError: Dask is not installed.
        ValueError: there are fewer facts than workers, or `load_model` has not loaded `lm`.
        RuntimeError: a worker failed.
    """
    enough_facts(facts, numbers)
    corruption = GaussianNoise().measured(lm)
    rows = []
    for number in numbers:
        threads = max(1, torch.get_num_threads() // number)
        with cluster_here(number, lm.device) as cluster, cluster.get_client() as client:
            client.run(torch.set_num_threads, threads)

            def trace(client: Client = client) -> None:
                trace_facts(lm, facts, kinds, None, False, corruption=corruption, samples=samples, client=client)

            trace()
            spent, _ = seconds(trace)
        rows.append({"along": "workers", "at": number, "threads": threads, "seconds": spent, "samples": samples})
    return pd.DataFrame(rows)


def powers_in_words(points: pd.DataFrame) -> str:
    """A line for each thing that grows: with which power of it time and counted arithmetic do, by least squares of logs."""
    lines = []
    for name, part in points.groupby("along", sort=False):
        if len(part) > 1:
            at = np.log(part["at"].astype(float))
            time, arithmetic = (np.polyfit(at, np.log(part[column]), 1)[0] for column in ("seconds", "gflop"))
            lines.append(f"{name}: time grows with their power {time:.2f}, arithmetic with {arithmetic:.2f}")
    return "\n".join(lines)


def rate_of(points: pd.DataFrame) -> float:
    """1e9 operations a second: the arithmetic of all points that it is counted for, over their time."""
    counted = points.dropna(subset=["gflop"])
    return counted["gflop"].sum() / counted["seconds"].sum()


def rates_in_words(points: pd.DataFrame) -> str:
    """`rate_of` all points, and the least and the greatest of single ones."""
    rates = points["gflop"] / points["seconds"]
    return f"{rate_of(points):.3g} GFLOP/s over all; between {rates.min():.3g} and {rates.max():.3g} in single traces"


def cluster_here(n_workers: int, device: torch.device) -> LocalCluster:
    """A Dask cluster of processes on this machine, which nobody reaches from another; without GPUs for the CPU."""
    try:
        from distributed import LocalCluster  # an optional extra
    except ImportError as error:
        raise ImportError(
            "growth_with_workers needs Dask; install it with `pip install -e '.[cluster]'`, or measure without workers."
        ) from error
    env = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}  # a worker takes the best device that it sees
    return LocalCluster(
        n_workers=n_workers, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", env=env
    )


def enough_facts(facts: Sequence[Fact], numbers: Sequence[int]) -> None:
    """Raise where there are fewer facts than the largest of `numbers`."""
    if len(facts) < max(numbers, default=0):
        raise ValueError(f"growth: {max(numbers)} facts were asked for, and {len(facts)} given; ask for fewer.")


def of_depth(lm: LanguageModel, layers: int) -> LanguageModel:
    """A random model with this number of layers, in everything else of the shape of `lm`."""
    config = copy.deepcopy(lm.model.config)
    config.num_hidden_layers = layers
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[layer % len(types)] for layer in range(layers)]
    return random_model(config, lm)


def random_model(config: PreTrainedConfig, like: LanguageModel) -> LanguageModel:
    """A model of this shape with random weights, with the tokenizer, dtype and device of another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=like.dtype).to(like.device)
    return LanguageModel(model, like.tokenizer, name=f"random {config.model_type}, {config.num_hidden_layers} layers")


def prompt_of_length(lm: LanguageModel, length: int) -> tuple[str, str]:
    """A prompt of exactly this many tokens, cut from the sentences of embedded facts, and its first word."""
    if length > lm.context_length:
        raise ValueError(f"growth: a prompt of {length} tokens is more than {lm.name} reads, {lm.context_length}.")
    for text in embedded_texts():
        offsets = lm.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        prompt = text[: offsets[length - 1][1]] if len(offsets) >= length else ""
        if prompt.strip() and len(lm.tokenizer(prompt)["input_ids"]) == length:
            return prompt, prompt.split()[0]
    raise ValueError(f"growth: found no prompt of {length} tokens of {lm.name}; give another length.")


def embedded_texts() -> Iterator[str]:
    """Long texts, each of which begins with another embedded fact."""
    sentences = [f"{fact.prompt} {fact.object}." for fact in load_facts("embedded")[:SENTENCES]]
    for first in range(len(sentences)):
        yield " ".join(sentences[first:] + sentences[:first])
