"""The benchmark of tracing runs, on a tiny model, and what it compares agrees."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from test_known import FACTS, learner  # noqa: F401
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import tracing as bench
from benchmarks.aims import AIMS, with_aims
from benchmarks.floor import floor, replay, shape_of, vectors_for
from benchmarks.measure import about, in_turns, markdown, row
from benchmarks.plain_tracing import KINDS, WAYS, Question, one_forward_a_cell
from benchmarks.precision import precision
from benchmarks.tasks import TASKS, Options, prepared
from rome_lab import causal_trace
from rome_lab.models.process import PRODUCTS, precisions
from rome_lab.studies.cost.counting import plain_flops, record_flops, size_of, sweep_flops

EIFFEL = ("The Eiffel Tower is located in the city of", "Eiffel Tower")
SMALL = Options(samples=2, window=3, facts=2, tokens=300, steps=2)


@pytest.fixture(scope="module")
def lm():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def asked(lm):
    return Question.ask(lm, *EIFFEL, samples=3, window=3)


@pytest.fixture(scope="module")
def folder(learner, tmp_path_factory):  # noqa: F811
    """A model that knows some facts, on disk, with a file of these facts."""
    folder = tmp_path_factory.mktemp("bench")
    learner.save_pretrained(folder / "model")
    rows = [(fact.subject, fact.template, fact.object) for fact in FACTS]
    pd.DataFrame(rows, columns=["subject", "template", "object"]).to_csv(folder / "facts.csv", index=False)
    return folder


def test_all_ways_to_a_trace_agree_with_causal_trace(lm, asked) -> None:
    for kind in ("state", "mlp", "attn"):
        expected = causal_trace(lm, *EIFFEL, kind, samples=3, window=3).p_restored
        assert expected.std() > 1e-4
        for name, way in WAYS.items():
            np.testing.assert_allclose(way(asked, (kind,))[kind], expected, atol=1e-5, err_msg=f"{kind}: {name}")


def test_all_ways_can_be_limited_to_some_tokens(asked) -> None:
    for way in WAYS.values():
        done = np.isfinite(way(asked, ("state",), tokens=[3])["state"]).all(axis=1)
        assert np.flatnonzero(done).tolist() == [3]


def test_one_forward_a_cell_reads_a_clean_row_beside_the_corrupted_ones(lm, asked) -> None:
    lm.model.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as whole:
            one_forward_a_cell(asked, ("state",))
        with FlopCounterMode(display=False) as first:
            one_forward_a_cell(asked, ("state",), tokens=[])
    finally:
        lm.model.set_attn_implementation("sdpa")
    assert whole.get_total_flops() - first.get_total_flops() == plain_flops(size_of(lm.model), shape_of(asked))


def test_ways_take_turns_after_a_warm_up() -> None:
    done = []
    ways = {name: lambda name=name: done.append(name) or name for name in "ab"}
    times, results = in_turns(ways, 2, torch.device("cpu"), warm_up=[lambda: done.append("warm")])
    assert done == ["warm", "a", "b", "a", "b"] and results == {"a": "a", "b": "b"}
    assert all(len(taken) == 2 and min(taken) > 0 for taken in times.values())


def test_every_way_and_choice_of_products_is_timed_and_compared(asked) -> None:
    before = precisions()
    table = pd.DataFrame(bench.trace(asked, ("state",), 2)).set_index("measure")
    assert precisions() == before
    times = table[table["unit"] == "s"]
    assert len(times) == 8 and (times["n"] == 2).all() and (times["least"] > 0).all()
    apart = table.loc[table["unit"] == "probability", "median"]
    assert len(apart) == 5
    for way in ("sweep", "batched cells"):
        assert apart[f"state: largest difference of {way}, default products"] < 1e-5
    assert times.loc["state: one plain forward, fast products", "forwards"] == 1
    quotients = table.loc[table["unit"] == "times", "median"]
    assert len(quotients) == 6 and (quotients > 0).all()
    pairs = [f"state: {x}, default products" for x in ("one forward a cell", "sweep")]
    told = quotients[f"{pairs[0]} / sweep, default products"]
    assert times.loc[pairs[0], "least"] / times.loc[pairs[1], "greatest"] <= told
    assert told <= times.loc[pairs[0], "greatest"] / times.loc[pairs[1], "least"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["state", "mlp"])
def test_the_floor_makes_the_products_of_a_sweep_and_no_others(family, kind) -> None:
    asked = Question.ask(tiny_model(family), *EIFFEL, samples=3, window=3)
    shape, lm = shape_of(asked), asked.lm
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        replay(lm, shape, kind, vectors_for(lm, shape))
    rows = floor(asked, kind, "default", 1)
    counted = next(x["median"] for x in rows if "arithmetic of the sweep" in x["measure"])
    assert counted == pytest.approx(counter.get_total_flops() / 1e9)
    size = size_of(lm.model)
    assert 1e9 * counted < record_flops(size, shape) + sweep_flops(size, shape, kind), "attention is left out"


def test_every_aim_is_that_of_a_row(learner, asked, folder) -> None:  # noqa: F811
    rows = bench.trace(asked, KINDS, 1) + bench.all_kinds(asked, 1)
    rows += [x for kind in KINDS for choice in PRODUCTS for x in floor(asked, kind, choice, 1)]
    rows += precision(learner, Options(samples=2, window=3, facts=2, dataset=str(folder / "facts.csv")), 1)
    rows += bench.gradients(asked, 1)
    table = pd.DataFrame(rows)
    for device, aims in AIMS.items():
        found = with_aims(table, torch.device(device)).dropna(subset="aim")
        assert found.set_index("measure")["aim"].to_dict() == aims
    assert "aim" not in with_aims(table, torch.device("mps"))


def test_lower_precision_is_compared_by_the_figures(learner, folder) -> None:  # noqa: F811
    options = Options(samples=2, window=3, facts=2, dataset=str(folder / "facts.csv"))
    table = pd.DataFrame(precision(learner, options, 1)).set_index("measure")
    assert 0 < table.loc["relative error of default products", "median"] < 1e-6
    told = table.filter(like="bfloat16: largest difference of an average indirect effect", axis=0)
    assert len(told) == 3 and told["median"].between(0, 0.5, inclusive="neither").all()
    assert (table.filter(like="a fact", axis=0)["least"] >= 0).all()
    assert learner.dtype is torch.float32


def test_all_ways_to_known_facts_and_to_covariance_agree(learner, folder) -> None:  # noqa: F811
    options = Options(samples=2, facts=2, tokens=300, dataset=str(folder / "facts.csv"))
    table = pd.DataFrame(bench.tasks(learner, options, 1)).set_index("measure")
    ours, plain = (way() for way in prepared("known facts", learner, options).values())
    assert len(ours) == 2 and set(ours) == set(plain)
    assert table.loc["known facts: one prompt after the other: found by one way only", "median"] == 0
    for way in list(TASKS["covariance"])[1:]:
        assert table.loc[f"covariance: {way}: |difference| / |C|", "median"] < 1e-5
    assert TASKS["covariance"]["rome_lab"](learner, options)().norm() > 0


def test_both_ways_to_an_edits_value_agree(lm) -> None:
    ours, plain = (way() for way in prepared("edit", lm, SMALL).values())
    assert (ours - plain).norm() < 1e-3 * plain.norm()


def test_the_command_measures_every_part_and_writes_table_and_page(folder, tmp_path, capsys) -> None:
    command = ["--model", str(folder / "model"), "--dataset", str(folder / "facts.csv"), "--repetitions", "1"]
    command += ["--parts", "trace", "growth", "--kinds", "state", "--samples", "2", "--lengths", "5"]
    command += ["--depths", "2", "--sample-numbers", "1"]
    bench.main([*command, "--out", str(tmp_path / "t.csv"), "--page", str(tmp_path / "t.md")])
    table = pd.read_csv(tmp_path / "t.csv")
    assert list(table["part"].unique()) == ["trace", "growth"] and len(table) == 23 + 3
    assert {"model", "dtype", "device", "processor", "cores", "threads", "torch"} <= set(table)
    page = (tmp_path / "t.md").read_text()
    assert all(table["measure"].map(lambda measure: measure in page))
    assert "state: sweep, default products" in capsys.readouterr().out


def test_peak_memory_is_measured_in_a_process_of_its_own(folder) -> None:
    command = ["--model", str(folder / "model"), "--parts", "memory", "--tokens", "300"]
    table = bench.run(bench.read_arguments([*command, "--tasks", "covariance"]))
    assert list(table["measure"]) == [f"covariance: {way}" for way in TASKS["covariance"]]
    assert (table["unit"] == "MB").all() and (table["median"] > 0).all()


def test_the_table_names_the_processor(lm) -> None:
    told = about(lm)
    assert told["processor"] and told["cores"] >= 1


def test_a_page_says_once_what_all_rows_share() -> None:
    rows = [row("trace", "a|b", [1.0, 3.0], "s", forwards=2.0), row("floor", "c", [0.5, 0.5], "s")]
    page = markdown(pd.DataFrame(rows).assign(model="tiny"), "python -m x")
    assert "By `python -m x`, which writes this page: n 2, model tiny;" in page
    assert "| a\\|b | s | 2 | 1 | 3 | 2 |" in page and "| c | s | 0.5 | 0.5 | 0.5 |" in page


def test_gradients_are_measured_in_plain_forwards_of_the_same_texts(asked) -> None:
    table = pd.DataFrame(bench.gradients(asked, 1)).set_index("measure")["median"]
    seconds = table["attribution patching"] / table["one plain forward"]
    assert table["all three kinds: attribution patching / one plain forward"] == pytest.approx(seconds)
    assert {f"{kind}: rank correlation with exact effects" for kind in KINDS} <= set(table.index)


def test_a_trace_with_another_subject_is_set_beside_all_samples_of_noise(asked) -> None:
    table = pd.DataFrame(bench.swapped(asked, "Effiel Toxer", 1)).set_index("measure")["median"]
    samples = f"{len(asked.noise)} samples of noise"
    assert table[f"state: another subject / {samples}"] == pytest.approx(
        table["state: another subject"] / table[f"state: {samples}"]
    )
