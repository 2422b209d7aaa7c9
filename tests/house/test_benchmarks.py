"""The benchmark of edits runs, on a tiny model, and what it compares agrees."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from bench import case
from test_editing import FACT, FEW, OTHER, covariance_of
from tiny import tiny_model

from benchmarks import edit as bench
from benchmarks import tasks
from benchmarks.plain import plain_edit, plain_texts
from rome_lab import rome
from rome_lab.editing.settings import Default, EditSettings
from rome_lab.editing.texts import SampledText
from rome_lab.facts.sources import load_relations


@pytest.fixture
def lm():
    return tiny_model("llama")


def test_what_the_first_edit_waits_for_is_measured_by_both_ways_and_agrees(lm) -> None:
    table = pd.DataFrame(bench.first(lm, 1, 400, repetitions=2, source=SampledText(length=24))).set_index("measure")
    assert list(table["unit"]) == ["s", "s", "times", "s", "s", "times", "1"]
    assert (table["n"].iloc[:6] == 2).all() and (table["least"].iloc[:6] > 0).all()
    assert table.loc["C: |difference| / |C|", "median"] < 1e-6
    (measured,) = (name for name in table.index if name.endswith("tokens, rome_lab") and name.startswith("C of"))
    assert 400 <= int(measured.split()[2]) < 424


def test_plain_texts_begin_with_their_prompts_and_are_as_long_as_ours(lm) -> None:
    prompts, _ = SampledText(length=20).beginnings(lm, range(5))
    texts = plain_texts(lm, prompts, 20)
    assert all(text[: len(prompt)] == prompt for text, prompt in zip(texts, prompts, strict=True))
    assert max(map(len, texts)) == 20 and len(set(map(tuple, texts))) == 5


def test_the_two_ways_to_a_value_agree_and_are_both_timed(lm) -> None:
    rows = bench.value(lm, 1, replace(FEW, steps=4), repetitions=2)
    table = pd.DataFrame(rows).set_index("measure")
    assert table.loc["|difference of v*| / |v*|", "greatest"] < 1e-4
    loops = ("plain loop", "plain loop, weights frozen", "shipped")
    times = table.loc[[f"v*, 4 steps, {loop}" for loop in loops]]
    assert (times["n"] == 2).all() and (times["least"] > 0).all() and (times["least"] <= times["median"]).all()
    assert all(table.loc[f"{loop} / shipped", "median"] > 0 for loop in loops[:2])
    assert all(weight.requires_grad and weight.grad is None for weight in lm.model.parameters())


def test_values_side_by_side_are_counted_by_the_minute_and_agree(lm) -> None:
    rows = bench.several(lm, 1, replace(FEW, steps=2), repetitions=1)
    table = pd.DataFrame(rows).set_index("measure")
    assert table.loc["|difference of v*| / |v*|, 4 side by side", "greatest"] < 1e-4
    assert (table.loc[[f"v* a minute, {size} side by side" for size in (1, 2, 4)], "median"] > 0).all()


def test_the_stopped_search_is_compared_with_the_whole_one(lm, shared_cache) -> None:
    cases = [case(i, subject) for i, subject in enumerate(("Paris", "Japan", "Warsaw"))]
    table = pd.DataFrame(bench.stop(lm, 1, replace(FEW, steps=3, enough=0.0), cases)).set_index("measure")
    assert table.loc["steps, all steps", "median"] == 3 and table.loc["steps, stopped", "n"] == 3
    assert {f"{metric}, {way}, mean" for metric in ("ES", "PS", "NS") for way in ("all steps", "stopped")} <= {
        *table.index
    }
    assert table.loc["all steps / stopped", "median"] > 0


def test_a_plain_edit_with_the_same_prefixes_is_that_of_rome(lm) -> None:
    settings, C = replace(FEW, key="averaged", prefixes=("It is. ", "In all of it. ")), covariance_of(lm, 1)
    made = rome(lm, FACT, "Rome", 1, C=C, hparams=settings, progress=False)
    Lambda, u = plain_edit(lm, 1, (FACT, "Rome"), C, settings)
    change = torch.outer(made.Lambda, made.u)
    assert change.norm() > 0 and (torch.outer(Lambda, u) - change).norm() < 1e-4 * change.norm()


def test_whole_edits_are_timed_by_both_ways(lm, shared_cache) -> None:
    settings = replace(FEW, key="both", prefixes=None, prefix_lengths=(3, 4), steps=2)
    table = pd.DataFrame(bench.edit(lm, 1, settings, repetitions=2)).set_index("measure")
    ways = ("rome, key 'averaged'", "rome, key 'both'", "plain edit, key 'averaged'")
    times = table.loc[[f"{way}, 2 steps" for way in ways]]
    assert (times["n"] == 2).all() and (times["least"] > 0).all()
    assert table.loc[f"{ways[2]} / {ways[0]}", "median"] > 0


def test_files_and_constraints_are_measured(lm) -> None:
    C = {layer: covariance_of(lm, layer) for layer in (1, 2)}
    sizes = bench.file(lm, 1, FEW, C[1])
    assert [x["measure"] for x in sizes] == [f"saved edit, key {key!r}" for key in ("averaged", "both", "all")]
    assert 1 < sizes[0]["median"] < sizes[1]["median"] < sizes[2]["median"] < 100
    rows = bench.constraint(lm, [(FACT, "Rome"), (OTHER, "Tokyo")], FEW, C)
    assert [x["measure"][:7] for x in rows] == ["layer 1", "layer 2"]
    assert all(x["n"] == 4 and 0 < x["greatest"] < 1e-5 for x in rows), "two keys of two facts, as stored"


def test_the_command_writes_the_table(lm, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "load_model", lambda name: lm)
    monkeypatch.setattr(tasks, "default_settings", lambda lm: Default(1, EditSettings(prefix_lengths=(3, 4))))
    places = ["--out", str(tmp_path / "edit.csv"), "--page", str(tmp_path / "edit.md")]
    bench.main(["--parts", "value", "--repetitions", "1", "--steps", "2", *places])
    table = pd.read_csv(tmp_path / "edit.csv")
    assert len(table) == 6 and set(table["part"]) == {"value"} and "v*, 2 steps, shipped" in capsys.readouterr().out
    assert "v\\*, 2 steps, shipped" in (tmp_path / "edit.md").read_text()


def test_the_facts_are_ten_of_five_relations_with_targets_of_their_relation() -> None:
    found = bench.requests()
    assert len(found) == len(bench.TARGETS) == 10 and {fact.relation for fact, _ in found} == set(bench.RELATIONS)
    for fact, target in found:
        assert target in {other.object for other in load_relations()[fact.relation].facts} - {fact.object}
