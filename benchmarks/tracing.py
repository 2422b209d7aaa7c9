"""What tracing costs: `python -m benchmarks.tracing [--parts trace floor precision gradients swap growth tasks memory]`.

trace        one fact, each kind: the sweep, one forward a cell, cells batched together; in turns, in this one process
floor        how far the sweep is from the time of its matrix products alone
precision    faster products and bfloat16: their speed, and their error in the figures
gradients    attribution patching of three kinds, in plain forwards of the same texts, and how it ranks states
swap         states traced with another subject, beside all samples of noise
growth       the sweep with more tokens, layers and samples
tasks        known facts and covariance, against the plain ways
memory       the peak of each way, in a process of its own

Prints a table and writes it as CSV: a row a measure, with the median, the least and the greatest of n values.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from benchmarks.aims import with_aims
from benchmarks.floor import floor, idle
from benchmarks.measure import Row, about, finish, in_turns, ratios, row
from benchmarks.memory import peaks
from benchmarks.model import SHAPES, Chosen, load
from benchmarks.plain_tracing import KINDS, WAYS, Question, forward, sweep
from benchmarks.precision import precision
from benchmarks.tasks import TASKS, Options, prepared
from rome_lab import Fact, FixedNoise, LanguageModel, SubjectSwap, attribution_patching, causal_trace
from rome_lab.models.process import PRODUCTS, products
from rome_lab.studies.cost.counting import Shape
from rome_lab.studies.cost.growth import growth_of_one_trace

PARTS = ("trace", "floor", "precision", "gradients", "swap", "growth", "tasks", "memory")
MANY = 1000  # facts, to which the time of one is extrapolated
GROWN_SAMPLES = 4  # of growth with tokens and layers: with 10, 80 tokens alone would take a quarter of an hour


def trace(asked: Question, kinds: Sequence[str], repetitions: int) -> list[Row]:
    """Part "trace": each way with each choice of products; `forwards` is time over that of one plain forward."""
    lm, last = asked.lm, [len(asked.prompt.ids) - 1]
    rows = []
    for kind in kinds:
        ways = {(n, c): with_products(c, partial(w, asked, (kind,))) for n, w in WAYS.items() for c in PRODUCTS}
        forwards = {("one plain forward", c): with_products(c, partial(forward, asked)) for c in PRODUCTS}
        warm_up = [partial(way, tokens=last) for way in ways.values()]
        times, results = in_turns(forwards | ways, repetitions, lm.device, [*forwards.values(), *warm_up])
        exact = results["one forward a cell", "default"][kind]
        for (name, choice), taken in times.items():
            more = {"forwards": float(np.median(ratios(taken, times["one plain forward", choice])))}
            rows.append(row("trace", f"{kind}: {name}, {choice} products", taken, "s", **more))
        for (name, choice), tables in results.items():
            if name in WAYS and (name, choice) != ("one forward a cell", "default"):
                apart = float(np.abs(tables[kind] - exact).max())
                rows.append(
                    row("trace", f"{kind}: largest difference of {name}, {choice} products", [apart], "probability")
                )
        rows += speedups(kind, times)
    return rows


def speedups(kind: str, times: dict[tuple[str, str], list[float]]) -> list[Row]:
    """How many times faster the sweep is than each plain way, with the same choice of products and with the faster one."""
    ours, *plain = WAYS
    rows = []
    for name in plain:
        for theirs, choice in (("default", "default"), ("fast", "fast"), ("default", "fast")):
            told = f"{kind}: {name}, {theirs} products / {ours}, {choice} products"
            rows.append(row("trace", told, ratios(times[name, theirs], times[ours, choice]), "times"))
    return rows


def with_products(choice: str, work: Callable[..., object]) -> Callable[..., object]:
    """`work`, with this choice of products in force while it runs."""
    return products(choice)(work)


def all_kinds(asked: Question, repetitions: int) -> list[Row]:
    """Part "trace": the three kinds of one fact by the sweep, which share their clean and corrupted runs."""
    ways = {choice: with_products(choice, partial(sweep, asked, KINDS)) for choice in PRODUCTS}
    times, _ = in_turns(ways, repetitions, asked.lm.device, warm_up=ways.values())
    rows = []
    for choice, taken in times.items():
        rows.append(row("trace", f"all three kinds: sweep, {choice} products", taken, "s"))
        told = f"all three kinds of {MANY} such facts, extrapolated, {choice} products"
        rows.append(row("trace", told, [MANY * x / 60 for x in taken], "min"))
    return rows


def gradients(asked: Question, repetitions: int) -> list[Row]:
    """Part "gradients": all cells of three kinds from one gradient; `forwards` is time over that of one plain forward."""
    options = {"kinds": KINDS, "corruption": FixedNoise(asked.noise), "window": asked.window}
    estimate = partial(attribution_patching, asked.lm, asked.prompt.text, asked.prompt.subject, **options)
    ways = {"one plain forward": partial(forward, asked), "attribution patching": estimate}
    times, results = in_turns(ways, repetitions, asked.lm.device, warm_up=ways.values())
    exact = sweep(asked, KINDS)
    rows = [row("gradients", name, taken, "s") for name, taken in times.items()]
    told = "all three kinds: attribution patching / one plain forward"
    rows.append(row("gradients", told, ratios(times["attribution patching"], times["one plain forward"]), "forwards"))
    for kind, values in results["attribution patching"].items():
        rho = float(spearmanr(values.ravel(), exact[kind].ravel()).statistic)
        rows.append(row("gradients", f"{kind}: rank correlation with exact effects", [rho], "1"))
    return rows


def swapped(asked: Question, other: str, repetitions: int) -> list[Row]:
    """Part "swap": the states of one fact with another subject in its corrupted run, beside all samples of noise."""
    trace_states = partial(causal_trace, asked.lm, asked.prompt.text, asked.prompt.subject)
    samples = f"{len(asked.noise)} samples of noise"
    ways = {
        "another subject": partial(trace_states, corruption=SubjectSwap(other)),
        samples: partial(trace_states, corruption=FixedNoise(asked.noise)),
    }
    times, _ = in_turns(ways, repetitions, asked.lm.device, warm_up=ways.values())
    rows = [row("swap", f"state: {name}", taken, "s") for name, taken in times.items()]
    return [
        *rows,
        row("swap", f"state: another subject / {samples}", ratios(times["another subject"], times[samples]), "times"),
    ]


def grown(lm: LanguageModel, given: argparse.Namespace) -> list[Row]:
    """Part "growth"."""
    at = Shape(tokens=9, samples=GROWN_SAMPLES, window=given.window)
    numbers = (given.lengths, given.depths, given.sample_numbers)
    found = growth_of_one_trace(lm, *numbers, at=at, repetitions=given.repetitions)
    spread = found.rename(columns={"seconds": "median", "gflop": "GFLOP", "mb": "peak MB", "expected_mb": "counted MB"})
    measure = spread["along"] + " " + spread["at"].astype(str) + ": state, sweep"
    columns = ["median", "least", "greatest", "forwards", "GFLOP", "peak MB", "counted MB"]
    table = spread[columns].assign(part="growth", measure=measure, unit="s", n=given.repetitions)
    # One forward a cell takes at least a plain forward for each.
    return table.assign(cells=spread["tokens"] * spread["layers"]).to_dict("records")


def tasks(lm: LanguageModel, options: Options, repetitions: int) -> list[Row]:
    """Part "tasks": known facts and covariance, each by all ways in turns."""
    rows = []
    for task in ("known facts", "covariance"):
        ways = prepared(task, lm, options)
        ours, *others = ways
        times, results = in_turns(ways, repetitions, lm.device, warm_up=[TASKS["state trace"]["sweep"](lm, options)])
        rows += [row("tasks", f"{task}: {name}", taken, "s") for name, taken in times.items()]
        for plain in others:
            rows.append(row("tasks", f"{task}: {plain} / {ours}", ratios(times[plain], times[ours]), "times"))
            rows.append(apart(f"{task}: {plain}", results[ours], results[plain]))
    return rows


def apart(told: str, one: tuple[Fact, ...] | torch.Tensor, other: tuple[Fact, ...] | torch.Tensor) -> Row:
    """How far the results of two ways are apart."""
    if isinstance(one, torch.Tensor):
        return row("tasks", f"{told}: |difference| / |C|", [float((one - other).norm() / other.norm())], "1")
    return row("tasks", f"{told}: found by one way only", [len(set(one) ^ set(other))], f"of {len(other)}")


def run(given: argparse.Namespace) -> pd.DataFrame:
    """The table of some parts."""
    chosen = Chosen(given.model, given.shape, given.device, given.dtype)
    lm = load(chosen)
    names = ("prompt", "subject", "samples", "window", "dataset", "facts", "tokens", "steps", "traced")
    options = Options(**{name: getattr(given, name) for name in names})
    asked = Question.ask(lm, options.prompt, options.subject, options.samples, options.window)
    parts: dict[str, Callable[[], list[Row]]] = {
        "trace": lambda: trace(asked, given.kinds, given.repetitions) + all_kinds(asked, given.repetitions),
        "floor": lambda: [
            *(x for kind in given.kinds for choice in PRODUCTS for x in floor(asked, kind, choice, given.repetitions)),
            *(x for choice in PRODUCTS for x in idle(asked, KINDS, choice, given.repetitions)),
        ],
        "precision": lambda: precision(lm, options, given.repetitions),
        "gradients": lambda: gradients(asked, given.repetitions),
        "swap": lambda: swapped(asked, given.other, given.repetitions),
        "growth": lambda: grown(lm, given),
        "tasks": lambda: tasks(lm, options, given.repetitions),
        "memory": lambda: peaks(chosen, options, given.tasks),
    }
    rows = [row for part in given.parts for row in parts[part]()]
    table = with_aims(pd.DataFrame(rows), lm.device)
    return table.assign(prompt_tokens=len(asked.prompt.ids), **about(lm))


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    default, model = Options(), Chosen()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracing", description="What tracing costs.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which to run (all)")
    parser.add_argument("--model", default=model.model, help="a name, hub id or folder (%(default)s)")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, with the model's tokenizer")
    parser.add_argument("--device", default=model.device, help="(%(default)s)")
    parser.add_argument("--dtype", default=model.dtype, help="(%(default)s)")
    parser.add_argument("--repetitions", type=int, default=2, help="of every way (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of trace and floor (all)")
    for name in ("prompt", "subject", "dataset"):
        parser.add_argument(f"--{name}", default=getattr(default, name), help="(%(default)s)")
    for name in ("samples", "window", "facts", "tokens", "traced"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help="(%(default)s)")
    parser.add_argument("--other", default="Trevi Fountain", help="subject, of swap (%(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tuple(TASKS), help="of memory (all)")
    parser.add_argument("--steps", type=int, help="of Adam; the model's default otherwise")
    parser.add_argument("--lengths", type=int, nargs="*", default=[5, 10, 20, 40, 80], help="tokens, of growth")
    parser.add_argument("--depths", type=int, nargs="*", default=[8, 15, 30, 60], help="layers, of growth")
    parser.add_argument("--sample-numbers", type=int, nargs="*", default=[1, 4, 10, 20], help="of growth")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tracing.csv"), help="(%(default)s)")
    parser.add_argument("--page", type=Path, help="write the table as Markdown, too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = read_arguments(arguments)
    finish(
        run(given),
        given.out,
        given.page,
        shlex.join(["python", "-m", "benchmarks.tracing", *(sys.argv[1:] if arguments is None else arguments)]),
    )


if __name__ == "__main__":
    main()
