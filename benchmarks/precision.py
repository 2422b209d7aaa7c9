"""What faster products and bfloat16 save, and what they change in the figures: the average indirect effects."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.measure import Row, in_turns, ratios, row
from benchmarks.plain_tracing import KINDS
from benchmarks.tasks import Options
from rome_lab import Fact, GaussianNoise, LanguageModel, Trace, Traces, known_facts, load_facts
from rome_lab.facts.known import rank
from rome_lab.models.process import PRODUCTS, product_error, products
from rome_lab.tracing.one_fact import restore
from rome_lab.tracing.runs import TraceSettings, run_clean_and_corrupted

REFERENCE, FAST, LOW = "float32, default products", "float32, fast products", "bfloat16"
TRIED = 10  # times as many facts as are wanted are tried


def precision(lm: LanguageModel, options: Options, repetitions: int) -> list[Row]:
    """Part "precision": facts that `lm` knows, or any where it knows none, traced by each way in turns."""
    facts = sorted(load_facts(options.dataset), key=lambda fact: rank(0, fact))[: TRIED * options.traced]
    facts = list(known_facts(lm, facts, options.traced, progress=False)) or facts[: options.traced]
    low = lower(lm, torch.bfloat16)
    settings, low_settings = (
        TraceSettings(GaussianNoise().measured(x), options.samples, options.window) for x in (lm, low)
    )
    ways = {
        REFERENCE: partial(traced, lm, settings),
        FAST: products("fast")(partial(traced, lm, settings)),
        LOW: partial(traced, low, low_settings),
    }
    with products("default"):
        warm_up = [partial(way, facts[:1]) for way in ways.values()]
        ways = {name: partial(way, facts) for name, way in ways.items()}
        times, results = in_turns(ways, repetitions, lm.device, warm_up)
    rows = []
    for choice in PRODUCTS:
        error = products(choice)(product_error)(lm.device)
        rows.append(row("precision", f"relative error of {choice} products", [error], "1"))
    for name, taken in times.items():
        rows.append(row("precision", f"{name}: all three kinds, a fact", [x / len(facts) for x in taken], "s"))
    for slow, name in ((REFERENCE, FAST), (REFERENCE, LOW), (FAST, LOW)):
        rows.append(row("precision", f"{slow} / {name}", ratios(times[slow], times[name]), "times"))
    for name in (FAST, LOW):
        rows += differences(name, results[REFERENCE], results[name])
    return rows


def lower(lm: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """A copy of the model with weights and arithmetic in `dtype`."""
    return LanguageModel(copy.deepcopy(lm.model).to(dtype), lm.tokenizer, name=f"{lm.name}, {dtype}")


def traced(lm: LanguageModel, settings: TraceSettings, facts: Sequence[Fact]) -> list[list[Trace]]:
    """The traces of each fact's prompt, to the answer that the model gives now."""
    runs = (run_clean_and_corrupted(lm, fact.prompt, fact.subject, settings) for fact in facts)
    return [[restore(one, kind) for kind in KINDS] for one in runs]


def differences(name: str, exact: list[list[Trace]], other: list[list[Trace]]) -> list[Row]:
    """Largest differences of the figures, over the facts whose answer stays the same; and how many others there are."""
    pairs = [(x, y) for x, y in zip(exact, other, strict=True) if x[0].answer == y[0].answer]
    rows = [row("precision", f"{name}: facts with another answer", [len(exact) - len(pairs)], f"of {len(exact)}")]
    if not pairs:
        return rows
    tables = [Traces([trace for fact in side for trace in fact]).average() for side in zip(*pairs, strict=True)]
    keys = ["kind", "bucket", "layer"]
    effects = tables[0].set_index(keys)["mean"] - tables[1].set_index(keys)["mean"]
    cells = [np.abs(x.p_restored - y.p_restored).max() for one, two in pairs for x, y in zip(one, two, strict=True)]
    for kind, part in effects.abs().groupby("kind", sort=False):
        told = f"{name}: largest difference of an average indirect effect, {kind}"
        rows.append(row("precision", told, [part.max()], "probability"))
    return [*rows, row("precision", f"{name}: largest difference in a cell of a fact", [max(cells)], "probability")]
