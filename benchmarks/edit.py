"""What an edit costs and how exact it is: `python -m benchmarks.edit [--parts value covariance file constraint]`.

value        v* by the shipped optimisation, set-up included, and by the plain loop, in turns, in this one process
covariance   C from nothing: of the default layer, and of all layers in one pass
file         size of a saved edit
constraint   |W_hat k* - v*| / |v*| of the weights as stored, over facts and layers

Prints a table and writes it as CSV: a row a measure, with the median, the least and the greatest of n values.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from benchmarks.measure import Row, about, finish, row
from benchmarks.plain import plain_loop
from rome_lab import Fact, LanguageModel, load_facts, load_model, rome
from rome_lab.covariance import covariances
from rome_lab.editing import DEFAULTS, default_settings
from rome_lab.edits import weight
from rome_lab.keys import k_star, sample_prefixes
from rome_lab.measuring import seconds
from rome_lab.store import Store
from rome_lab.update import constraint_error
from rome_lab.values import EditSettings, Objective, optimise_value

PARTS = ("value", "covariance", "file", "constraint")
FACT, TARGET = Fact("Eiffel Tower", "The {} is located in the city of", "Paris"), "Rome"
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


def value(lm: LanguageModel, layer: int, settings: EditSettings, repetitions: int) -> list[Row]:
    """Part "value"; the prefixes are sampled beforehand, for both."""
    if settings.prefixes is None:
        settings = replace(settings, prefixes=sample_prefixes(lm, settings.prefix_lengths, settings.seed))
    v = weight(lm, layer).double() @ k_star(lm, FACT, layer, "averaged", settings.prefixes)[:, 0].double()

    def shipped(settings: EditSettings) -> torch.Tensor:
        return optimise_value(Objective(lm, layer, (FACT, TARGET), v, settings), progress=False).delta

    def plain(settings: EditSettings) -> torch.Tensor:
        return plain_loop(lm, layer, (FACT, TARGET), v, settings)[0]

    def frozen(settings: EditSettings) -> torch.Tensor:
        lm.model.requires_grad_(False)
        try:
            return plain(settings)
        finally:
            lm.model.requires_grad_(True)

    names = {plain: "plain loop", frozen: "plain loop, weights frozen", shipped: "shipped"}
    times, errors = {loop: [] for loop in names}, []
    for loop in names:
        loop(replace(settings, steps=1))
    for _ in range(repetitions):
        stars = {}
        for loop, taken in times.items():
            spent, delta = seconds(lambda loop=loop: loop(settings))
            taken.append(spent)
            stars[loop] = v + delta.double()
        errors.append(float((stars[shipped] - stars[plain]).norm() / stars[plain].norm()))
    rows = [row("value", f"v*, {settings.steps} steps, {names[loop]}", taken, "s") for loop, taken in times.items()]
    for slow in (plain, frozen):
        ratios = [x / y for x, y in zip(times[slow], times[shipped], strict=True)]
        rows.append(row("value", f"{names[slow]} / shipped", ratios, "times"))
    return [*rows, row("value", "|difference of v*| / |v*|", errors, "1")]


def covariance(lm: LanguageModel, layer: int, tokens: int | None = None) -> list[Row]:
    """Part "covariance", each time in a store that is empty; the time to sample the text is in it."""
    rows = []
    for name, layers in ((f"layer {layer}", [layer]), (f"all {lm.n_layers} layers", range(lm.n_layers))):
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder)
            spent, found = seconds(lambda layers=layers, store=store: covariances(lm, layers, None, tokens, store))
        seen = next(iter(found.values())).tokens
        rows.append(row("covariance", f"C of {name}, {seen} tokens", [spent], "s"))
    return rows


def file(lm: LanguageModel, layer: int, settings: EditSettings, C: torch.Tensor) -> list[Row]:
    """Part "file"; the keys of "both" make the larger file."""
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for key in ("averaged", "both"):
            edit = rome(lm, FACT, TARGET, layer, C=C, hparams=replace(settings, key=key, steps=2), progress=False)
            sizes[key] = edit.save(Path(folder, key)).stat().st_size / 1000
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
                errors += constraint_error(weight(lm, layer), K, V).tolist()
        rows.append(row("constraint", f"layer {layer}, {len(facts)} facts: |W_hat k* - v*| / |v*|", errors, "1"))
    return rows


def requests() -> list[tuple[Fact, str]]:
    """The facts of part "constraint" with their targets."""
    facts = [x for x in load_facts("embedded") if x.relation in RELATIONS and x.subject in TARGETS]
    return [(fact, TARGETS[fact.subject]) for fact in facts]


def run(lm: LanguageModel, parts: Sequence[str], repetitions: int, steps: int | None) -> pd.DataFrame:
    """The table of some parts."""
    default = default_settings(lm)
    layer = lm.n_layers // 5 if default.layer is None else default.layer
    settings = default.settings if steps is None else replace(default.settings, steps=steps)
    rows: list[Row] = []
    if "value" in parts:
        rows += value(lm, layer, settings, repetitions)
    if "covariance" in parts:
        rows += covariance(lm, layer)
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
    parser.add_argument("--repetitions", type=int, default=3, help="of the two ways to v* (%(default)s)")
    parser.add_argument("--steps", type=int, help="of Adam; the model's default otherwise")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/edit.csv"), help="the table (%(default)s)")
    given = parser.parse_args(arguments)
    table = run(load_model(given.model), given.parts, given.repetitions, given.steps)
    finish(table, given.out)


if __name__ == "__main__":
    main()
