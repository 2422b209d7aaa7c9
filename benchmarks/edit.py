"""What an edit costs and how exact it is: `python -m benchmarks.edit [--parts NAME ...]`, of these parts:

first        what the first edit of a layer waits for: text that the model writes, and C measured on it, each by rome_lab and
             by a plain loop, in turns, in this one process
value        v* by the shipped optimisation, set-up included, and by the plain loop, in turns, in this one process
several      v* a minute by how many are found side by side, in turns
stop         what ending the search of v* saves, as soon as every text says the target, and what becomes of the edits
edit         a whole edit, C measured before, by `rome` and by plain ways for each of its steps, in turns
file         size of a saved edit
constraint   |W_hat k* - v*| / |v*| of the weights as stored, over facts and layers

Prints a table and writes it as CSV: a row a measure, with the median, the least and the greatest of n values.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, product
from pathlib import Path

import pandas as pd
import torch

from benchmarks.measure import Row, about, finish, in_turns, ratios, row
from benchmarks.plain import plain_edit, plain_texts
from benchmarks.tasks import (
    BATCH_TOKENS,
    FACT,
    TARGET,
    GivenText,
    Sought,
    edit_settings,
    edited_layer,
    plain_covariance,
)
from rome_lab import Fact, LanguageModel, evaluate, load_facts, load_model, rome
from rome_lab.base import seed_from
from rome_lab.editing import Optima, Rome
from rome_lab.editing.keys import key_size
from rome_lab.editing.optima import SIDE_BY_SIDE, Optimum
from rome_lab.editing.second_moment import covariances
from rome_lab.editing.settings import DEFAULTS, EditSettings
from rome_lab.editing.texts import TEXTS_A_FILE, SampledText
from rome_lab.editing.update import ENOUGH, constraint_error
from rome_lab.evaluation import SCORES_ONLY
from rome_lab.facts import Case, build_cases

PARTS = ("first", "value", "several", "stop", "edit", "file", "constraint")
TARGETS = {  # embedded facts of five relations, and what they are to say instead
    "Eiffel Tower": "Rome",
    "Colosseum": "Berlin",
    "Austria": "Russian",
    "Brazil": "French",
    "911 Carrera": "Toyota",
    "Beetle": "Ford",
    "Babe Ruth": "golf",
    "David Beckham": "tennis",
    "Charlie Parker": "piano",
    "Carlos Santana": "violin",
}
RELATIONS = ("landmark_city", "official_language", "maker_of_car", "sport_of_athlete", "instrument_of_musician")
LAYERS = (3, 6, 9, 12)
CASES = 16  # of these relations, for part "stop"


def first(lm: LanguageModel, layer: int, tokens: int, repetitions: int, source: SampledText | None = None) -> list[Row]:
    """Part "first": both ways sample as many texts, and measure C on the same ones."""
    source = source or SampledText()
    numbers = range(-(-tokens // (source.length * TEXTS_A_FILE)) * TEXTS_A_FILE)
    prompts, _ = source.beginnings(lm, numbers)
    ways = {
        "rome_lab": partial(source.texts, lm, numbers),
        "transformers' generate": partial(plain_texts, lm, prompts, source.length),
    }
    ours, plain = ways
    warm_up = [partial(SampledText(length=16).texts, lm, range(4))]
    times, texts = in_turns(ways, repetitions, lm.device, warm_up)
    rows = [
        row("first", f"{len(numbers)} texts of {source.length} tokens, {x}", taken, "s") for x, taken in times.items()
    ]
    rows.append(row("first", f"texts: {plain} / {ours}", ratios(times[plain], times[ours]), "times"))

    ends = list(accumulate(map(len, texts[ours])))
    passages = texts[ours][: bisect_left(ends, tokens) + 1]
    together = BATCH_TOKENS // source.length
    ways = {
        "rome_lab": partial(measured_anew, lm, layer, GivenText(passages)),
        "batches of passages": partial(plain_covariance, lm, layer, passages, together),
    }
    ours, plain = ways
    times, C = in_turns(ways, repetitions, lm.device, [partial(plain_covariance, lm, layer, passages[:4], 4)])
    rows += [row("first", f"C of {ends[len(passages) - 1]} tokens, {x}", taken, "s") for x, taken in times.items()]
    rows.append(row("first", f"C: {plain} / {ours}", ratios(times[plain], times[ours]), "times"))
    return [*rows, row("first", "C: |difference| / |C|", [float((C[ours] - C[plain]).norm() / C[plain].norm())], "1")]


def measured_anew(lm: LanguageModel, layer: int, source: GivenText) -> torch.Tensor:
    """C by rome_lab of all that the source holds, from an empty store on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return covariances(lm, [layer], source, sum(map(len, source.texts)), folder, progress=False)[layer].C


def value(lm: LanguageModel, layer: int, settings: EditSettings, repetitions: int) -> list[Row]:
    """Part "value"; the prefixes are sampled beforehand, for all."""
    sought = Sought.of(lm, layer, settings)
    short = replace(sought, settings=replace(sought.settings, steps=1))

    def frozen(sought: Sought) -> torch.Tensor:
        lm.model.requires_grad_(False)
        try:
            return sought.plain(lm)
        finally:
            lm.model.requires_grad_(True)

    plain, slow = "plain loop", "plain loop, weights frozen"
    loops = {plain: lambda sought: sought.plain(lm), slow: frozen, "shipped": lambda sought: sought.shipped(lm)}
    ways = {name: partial(loop, sought) for name, loop in loops.items()}
    times, deltas = in_turns(ways, repetitions, lm.device, [partial(loop, short) for loop in loops.values()])
    rows = [row("value", f"v*, {settings.steps} steps, {name}", taken, "s") for name, taken in times.items()]
    rows += [
        row("value", f"{name} / shipped", ratios(times[name], times["shipped"]), "times") for name in (plain, slow)
    ]
    apart, star = (deltas["shipped"] - deltas[plain]).norm(), (sought.original + deltas[plain].double()).norm()
    return [*rows, row("value", "|difference of v*| / |v*|", [float(apart / star)], "1")]


def several(lm: LanguageModel, layer: int, settings: EditSettings, repetitions: int) -> list[Row]:
    """Part "several", of the facts of part "constraint"."""
    optima, pairs = Optima(lm, progress=False), requests()[:8]
    settings = optima.with_prefixes(settings)

    def found(size: int) -> list[Optimum]:
        parts = [pairs[begin : begin + size] for begin in range(0, len(pairs), size)]
        return [optimum for part in parts for optimum in optima.optimise(part, layer, settings)]

    sizes = [2**i for i in range(SIDE_BY_SIDE.bit_length())]
    ways = {f"{size} side by side": partial(found, size) for size in sizes}
    short = partial(optima.optimise, pairs[:1], layer, replace(settings, steps=1))
    times, optimums = in_turns(ways, repetitions, lm.device, [short])
    alone, *others = ways
    rows = [
        row("several", f"v* a minute, {x}", [60 * len(pairs) / t for t in taken], "1") for x, taken in times.items()
    ]
    rows += [row("several", f"{alone} / {x}", ratios(times[alone], times[x]), "times") for x in others]
    apart = [
        float((a.v_star - b.v_star).norm() / a.v_star.norm())
        for a, b in zip(optimums[alone], optimums[others[-1]], strict=True)
    ]
    return [*rows, row("several", f"|difference of v*| / |v*|, {others[-1]}", apart, "1")]


def stop(lm: LanguageModel, layer: int, settings: EditSettings, cases: Sequence[Case]) -> list[Row]:
    """Part "stop": v* is timed first, and read back from the store where the edits are judged."""
    methods = [
        Rome(name, layer=layer, key=settings.key, settings=replace(settings, early_stop=early))
        for name, early in (("all steps", False), ("stopped", True))
    ]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        optima = Optima(lm, folder, progress=False)
        sought = {method.name: [method.sought((case.fact, case.target)) for case in cases] for method in methods}
        times, _ = in_turns({name: partial(optima.prepare, v_stars) for name, v_stars in sought.items()}, 1, lm.device)
        for name, v_stars in sought.items():
            steps = [len(optimum.history) - 1.0 for v_star in v_stars if (optimum := optima.recall(*v_star))]
            rows += [
                row("stop", f"{len(cases)} v*, {name}", times[name], "s"),
                row("stop", f"steps, {name}", steps, "1"),
            ]
        rows.append(row("stop", "all steps / stopped", ratios(*times.values()), "times"))
        table = evaluate(lm, cases, methods, store=folder, settings=SCORES_ONLY, unrelated=(), progress=False)
    for name, metric in product(times, ("ES", "PS", "NS", "E_argmax", "P_argmax", "N_argmax")):
        rows.append(
            row("stop", f"{metric}, {name}, mean", [float(table.loc[table["method"] == name, metric].mean())], "%")
        )
    return rows


def edit(lm: LanguageModel, layer: int, settings: EditSettings, repetitions: int) -> list[Row]:
    """Part "edit": `rome` reads C from the user's cache, where it is by then; the plain edit is the paper's, of one key."""
    C = covariances(lm, [layer])[layer].C
    ways = {
        f"rome, key {key!r}": partial(rome, lm, FACT, TARGET, layer, hparams=replace(settings, key=key), progress=False)
        for key in dict.fromkeys(("averaged", settings.key))
    }
    ours, plain = next(iter(ways)), "plain edit, key 'averaged'"
    ways[plain] = partial(plain_edit, lm, layer, (FACT, TARGET), C, settings)
    times, _ = in_turns(ways, repetitions, lm.device, warm_up=[ways[ours]])
    rows = [row("edit", f"{name}, {settings.steps} steps", taken, "s") for name, taken in times.items()]
    return [*rows, row("edit", f"{plain} / {ours}", ratios(times[plain], times[ours]), "times")]


def file(lm: LanguageModel, layer: int, settings: EditSettings, C: torch.Tensor) -> list[Row]:
    """Part "file": the more keys, the larger the file."""
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for key in ("averaged", "both", "all"):
            made = rome(lm, FACT, TARGET, layer, C=C, hparams=replace(settings, key=key, steps=2), progress=False)
            sizes[key] = made.save(Path(folder, key)).stat().st_size / 1000
    return [row("file", f"saved edit, key {key!r}", [size], "kB") for key, size in sizes.items()]


def constraint(
    lm: LanguageModel, facts: Sequence[tuple[Fact, str]], settings: EditSettings, C: dict[int, torch.Tensor]
) -> list[Row]:
    """Part "constraint", of every key of every fact, at the layers of `C`."""
    rows = []
    for layer, matrix in C.items():
        errors = []
        for fact, target in facts:
            edit = rome(lm, fact, target, layer, C=matrix, hparams=settings, progress=False)
            K, V = (x.view(len(x), -1) for x in (edit.k_star, edit.v_star))
            with edit.applied(lm):
                errors += constraint_error(lm.weight(layer), K, V).tolist()
        rows.append(row("constraint", f"layer {layer}, {len(facts)} facts: |W_hat k* - v*| / |v*|", errors, "1"))
    return rows


def requests() -> list[tuple[Fact, str]]:
    """The facts of part "constraint" with their targets."""
    facts = [x for x in load_facts("embedded") if x.relation in RELATIONS and x.subject in TARGETS]
    return [(fact, TARGETS[fact.subject]) for fact in facts]


def run(
    lm: LanguageModel, parts: Sequence[str], repetitions: int, steps: int | None, tokens: int | None = None
) -> pd.DataFrame:
    """The table of some parts."""
    layer, settings = edited_layer(lm), edit_settings(lm, steps)
    rows: list[Row] = []
    if "first" in parts:
        rows += first(lm, layer, tokens or ENOUGH * key_size(lm, layer), repetitions)
    if "value" in parts:
        rows += value(lm, layer, settings, repetitions)
    if "several" in parts:
        rows += several(lm, layer, settings, repetitions)
    if "stop" in parts:
        built = [case for case in build_cases(load_facts("embedded")) if case.fact.relation in RELATIONS]
        rows += stop(lm, layer, settings, sorted(built, key=lambda case: seed_from(case.id))[:CASES])
    if "edit" in parts:
        rows += edit(lm, layer, settings, repetitions)
    if {"file", "constraint"} & set(parts):
        layers = {layer, *(LAYERS if "constraint" in parts else ())}
        C = {number: found.C for number, found in covariances(lm, sorted(layers)).items()}
    if "file" in parts:
        rows += file(lm, layer, settings, C[layer])
    if "constraint" in parts:
        rows += constraint(lm, requests(), settings, {number: C[number] for number in LAYERS})
    return pd.DataFrame(rows).assign(**about(lm))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edit", description="What an edit costs.")
    parser.add_argument("--model", default="smollm2-135m", help=f"such as {', '.join(DEFAULTS)} (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which to run (all)")
    parser.add_argument("--repetitions", type=int, default=2, help="of v* and of the edit (%(default)s)")
    parser.add_argument("--steps", type=int, help="of Adam; the model's default otherwise")
    parser.add_argument("--tokens", type=int, help="that C is measured on in part first; the model's default otherwise")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/edit.csv"), help="the table (%(default)s)")
    parser.add_argument("--page", type=Path, help="write the table as Markdown, too")
    given = parser.parse_args(arguments)
    table = run(load_model(given.model), given.parts, given.repetitions, given.steps, given.tokens)
    command = shlex.join(["python", "-m", "benchmarks.edit", *(sys.argv[1:] if arguments is None else arguments)])
    finish(table, given.out, given.page, command)


if __name__ == "__main__":
    main()
