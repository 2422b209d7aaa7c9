"""How far a trace is from the time of its matrix products alone, at the rate at which this machine makes them."""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Row, in_turns, ratios, row
from benchmarks.plain_tracing import Question, sweep
from rome_lab import LanguageModel
from rome_lab.models.process import products
from rome_lab.studies.cost.counting import (
    Shape,
    columns_in_blocks,
    matrices,
    record_flops,
    size_of,
    sweep_flops,
    swept_tokens,
)
from rome_lab.studies.cost.measuring import seconds

ROWS = 2048  # of a product that is large enough to reach the machine's rate


def floor(asked: Question, kind: str, choice: str, repetitions: int) -> list[Row]:
    """Part "floor" with one choice of products: the sweep and its products alone, in turns.

    The floor is the arithmetic of a sweep at the rate of one large product, the best that the machine reaches. A higher
    one, what the products of a sweep take by themselves at its very shapes, says how much of the gap those shapes make.
    The products inside the attention are left out, of the arithmetic too.
    """
    lm, shape = asked.lm, shape_of(asked)
    size = replace(size_of(lm.model), query_width=0)  # leaves out what happens inside the attention
    gflop = (record_flops(size, shape) + sweep_flops(size, shape, kind)) / 1e9
    vectors = vectors_for(lm, shape)
    ways = {"sweep": lambda: sweep(asked, (kind,)), "products": lambda: replay(lm, shape, kind, vectors)}
    with products(choice), torch.no_grad():
        times, _ = in_turns(ways, repetitions, lm.device, warm_up=ways.values())
        best = rate(lm)
    told = f"{kind}, {choice} products: "
    gap = ratios(times["sweep"], times["products"])
    return [
        row("floor", told + "arithmetic of the sweep", [gflop], "GFLOP"),
        row("floor", told + "rate of one large product", [best], "GFLOP/s"),
        row("floor", told + "rate at the sweep's shapes", [gflop / x for x in times["products"]], "GFLOP/s"),
        row("floor", told + "sweep", times["sweep"], "s"),
        row("floor", told + "its products alone, at its shapes", times["products"], "s"),
        row("floor", told + "arithmetic / rate of one large product", [gflop / best], "s"),
        row(
            "floor",
            told + "sweep / (arithmetic / rate of one large product)",
            [x * best / gflop for x in times["sweep"]],
            "times",
        ),
        row("floor", told + "sweep / its products alone", gap, "times"),
        row("floor", told + "share of products in the sweep", [100 / x for x in gap], "%"),
    ]


def shape_of(asked: Question) -> Shape:
    return Shape(len(asked.prompt.ids), asked.prompt.subject_range[0], len(asked.noise), asked.window)


def vectors_for(lm: LanguageModel, shape: Shape) -> dict[int, torch.Tensor]:
    """By their length, as many vectors as any product of a sweep is given."""
    most = shape.tokens * (1 + shape.samples * lm.n_layers)
    lengths = {inputs(module) for block in lm.blocks for module in matrices(block)} | {size_of(lm.model).width}
    return {length: torch.randn(most, length, dtype=lm.dtype, device=lm.device) for length in lengths}


def replay(lm: LanguageModel, shape: Shape, kind: str, vectors: dict[int, torch.Tensor]) -> None:
    """The products of a sweep with the model's own weights, on as many vectors, and nothing between them."""
    samples, width = shape.samples, size_of(lm.model).width
    run_blocks(lm, [(1 + samples) * shape.tokens] * lm.n_layers, vectors)
    columns = columns_in_blocks(kind, lm.n_layers, shape.window)
    read = lm.model.get_output_embeddings()
    read(vectors[width][: 2 * (1 + samples)])
    for number in swept_tokens(shape, kind):
        run_blocks(lm, [samples * several * number for several in columns], vectors, samples * columns[-1])
        read(vectors[width][: samples * lm.n_layers])


def run_blocks(lm: LanguageModel, rows: list[int], vectors: dict[int, torch.Tensor], last: int | None = None) -> None:
    """Every matrix of each block on its number of rows, those of the last block's MLP on `last`."""
    spared = matrices(mlp) if last is not None and (mlp := lm.feed_forward(lm.n_layers - 1)) else []
    for block, number in zip(lm.blocks, rows, strict=True):
        for module in matrices(block) if number else ():
            module(vectors[inputs(module)][: last if module in spared else number])


def inputs(module: torch.nn.Module) -> int:
    """Length of the vectors that a matrix multiplies."""
    return module.in_features if isinstance(module, torch.nn.Linear) else module.weight.shape[0]


def rate(lm: LanguageModel, repetitions: int = 5) -> float:
    """1e9 operations a second of the largest matrix of a block, on `ROWS` rows."""
    module = max(matrices(lm.blocks[0]), key=lambda module: module.weight.numel())
    given = torch.randn(ROWS, inputs(module), dtype=lm.dtype, device=lm.device)
    module(given)
    times = [seconds(lambda: module(given), lm.device)[0] for _ in range(repetitions)]
    return 2 * ROWS * module.weight.numel() / statistics.median(times) / 1e9


def idle(asked: Question, kinds: tuple[str, ...], choice: str, repetitions: int) -> list[Row]:
    """On CUDA: the share of the time of a trace in which no kernel and no copy runs, so that launches are waited for.

    The time is that of a run without the profiler, which would lengthen it; the kernels' is from one beside it. Where
    next to nothing is lost, their difference is as often below zero as above.
    """
    if asked.lm.device.type != "cuda":
        return []

    lm, spent, busy = asked.lm, [], []
    with products(choice):
        for _ in range(1 + repetitions):
            spent.append(seconds(lambda: sweep(asked, kinds), lm.device)[0])
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                sweep(asked, kinds)
                torch.cuda.synchronize(lm.device)
            busy.append(sum(event.self_device_time_total for event in seen.key_averages()) / 1e6)
    turns = list(zip(spent, busy, strict=True))[1:]  # the first one warms up
    told = f"{', '.join(kinds)}, {choice} products: "
    return [
        row("floor", told + "time without any kernel", [x - y for x, y in turns], "s"),
        row("floor", told + "its share", [100 * (1 - y / x) for x, y in turns], "%"),
    ]
