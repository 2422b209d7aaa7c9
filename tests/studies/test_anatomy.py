"""The parts of an edit are what the theory says, keys are read where they are said to be, and sweeps judge real edits."""

from __future__ import annotations

from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import QuadMesh
from test_audit import says
from test_editing import FACT, FEW, OTHER, THIRD, covariance_of, make
from test_keys import input_of_W
from tiny import FAMILIES, tiny_model

from rome_lab.editing.exact import rome
from rome_lab.editing.keys import k_star
from rome_lab.facts.fact import Fact
from rome_lab.facts.prompts import read_prompt
from rome_lab.studies import anatomy as room
from rome_lab.studies.anatomy import drawings as anatomy_plots
from rome_lab.studies.anatomy import measures as anatomy
from rome_lab.tracing.one_fact import causal_trace

ALONE = replace(FEW, key="averaged")
TOLD = replace(FACT, templates=(FACT.template, "People say that the {} stands in", "{} belongs to"))
NEIGHBOURS = (OTHER, THIRD)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def text(lm, n=4):
    return [torch.randint(2, 300, (30,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(n)]


def test_sizes_are_those_of_the_vectors_and_hold_the_rank_one_identities() -> None:
    lm = tiny_model("llama")
    edit, C = make(lm, hparams=ALONE), covariance_of(lm, 1)
    table = anatomy.sizes(lm, edit, C)
    length = table["length"]
    W = lm.weight(1).double()
    assert length["W k*"] == pytest.approx(float((W @ edit.k_star.double()).norm()))
    assert length["dW = Lambda uT"] == pytest.approx(length["Lambda"] * length["u = C^-1 k*"])
    u_k = float(edit.u.double() @ edit.k_star.double())
    assert length["Lambda"] * abs(u_k) == pytest.approx(length["v* - W k*"], rel=1e-5)
    assert table["top"]["Lambda"] == pytest.approx(table["top"]["v* - W k*"], rel=1e-4)
    assert table["usual"]["k*"] == pytest.approx(float(C.double().diagonal().sum().sqrt()))
    assert table["size"]["dW = Lambda uT"] == "32 x 48" and ((0 < table["top"]) & (table["top"] <= 1)).all()


def test_u_avoids_the_directions_that_C_says_are_usual() -> None:
    lm = tiny_model("gpt2")
    edit, C = make(lm, hparams=ALONE), covariance_of(lm, 1)
    table = anatomy.directions(edit, C)
    assert table["n"].tolist() == list(range(1, len(C) + 1))
    np.testing.assert_allclose(table.iloc[-1, 1:].astype(float), 1)
    assert (table["u"] <= table["k*"] + 1e-9).all() and table["u"][0] < table["k*"][0]
    plain = replace(edit, u=edit.k_star)
    np.testing.assert_allclose(anatomy.directions(plain, C)["u"], table["k*"])


def test_an_edit_with_two_keys_is_refused_with_a_sentence() -> None:
    lm = tiny_model("llama")
    with pytest.raises(ValueError, match="has 2 keys, but is to have one; make it .*averaged"):
        anatomy.sizes(lm, make(lm), covariance_of(lm, 1))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_other_keys_are_the_inputs_of_W_at_the_places_that_are_named(family) -> None:
    lm = tiny_model(family)
    edit = replace(make(lm, hparams=ALONE), facts=(TOLD,))
    passages = text(lm)
    keys = anatomy.other_keys(lm, edit, NEIGHBOURS, passages)
    assert tuple(keys) == anatomy.GROUPS
    wording = read_prompt(lm, replace(TOLD, template=TOLD.templates[1]))
    other = read_prompt(lm, OTHER)
    expected = {
        ("same subject, other wording", 0): input_of_W(lm, 1, wording.ids, wording.subject_range[1] - 1),
        ("other subjects", 0): input_of_W(lm, 1, other.ids, other.subject_range[1] - 1),
        ("other tokens of the prompt", 0): input_of_W(lm, 1, read_prompt(lm, TOLD).ids, 1),
        ("running text", 0): input_of_W(lm, 1, torch.tensor(passages[0]), 1),
        ("first token of a text", 0): input_of_W(lm, 1, torch.tensor(passages[0]), 0),
    }  # fmt: skip
    for (group, row), key in expected.items():
        torch.testing.assert_close(keys[group][row].float(), key, rtol=1e-4, atol=1e-5 * float(key.abs().max()))
    tokens = len(read_prompt(lm, TOLD).ids)
    behind = (tokens - 1) * len(FEW.prefixes)  # all but the subject's last
    assert len(keys["other tokens of the prompt"]) == behind + tokens - 2, "nor, in the bare prompt, the text's first"
    assert len(keys["running text"]) == 4 * 29 and len(keys["same subject, other wording"]) == 2


def test_both_updates_meet_the_constraint_and_C_disturbs_the_text_behind_it_less() -> None:
    lm = tiny_model("llama")
    edit = make(lm, hparams=ALONE)
    W, k, v = lm.weight(1).double(), edit.k_star.double(), edit.v_star.double()
    seen = torch.linalg.cholesky(covariance_of(lm, 1).double()).T  # keys whose second moment is C
    table = anatomy.disturbance(lm, edit, {"k*": k[None], "text": seen})
    at_k = table[table["group"] == "k*"].set_index("update")["ratio"]
    assert at_k.tolist() == pytest.approx([float((v - W @ k).norm() / (W @ k).norm())] * 2, rel=1e-4)
    rows = table[table["group"] == "text"]
    said = (seen @ W.T).norm(dim=1).numpy()
    moved = {name: float(np.square(part["ratio"] * said).sum()) for name, part in rows.groupby("update")}
    assert moved["C"] < moved["identity"]


PROMPTS = {
    "subject inside": FACT,
    "subject first": Fact("Marie Curie", "{} was born in", "Warsaw"),
    "subject last": Fact("Japan", "The capital of {}", "Tokyo"),
    "braces, and characters of several tokens": Fact("Göbekli {} 東", "At {} is", "Turkey"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_key_can_be_read_at_any_token_and_the_prompt_stays(case) -> None:
    lm, fact = tiny_model("llama"), PROMPTS[case]
    prompt = read_prompt(lm, fact)
    moved = [anatomy.key_at(lm, fact, i) for i in range(len(prompt.ids))]
    for i, said in enumerate(moved):
        if said is not None:
            assert said.prompt == fact.prompt and read_prompt(lm, said).subject_range[1] - 1 == i
            behind = read_prompt(lm, said, prefix="She was born. ")
            assert len(behind.ids) - behind.subject_range[1] == len(prompt.ids) - 1 - i
    own = moved[prompt.subject_range[1] - 1]
    assert own.subject == fact.subject and own.template == fact.template
    passed_over = [prompt.tokens(lm)[i] for i, said in enumerate(moved) if said is None]
    assert set(passed_over) <= {" ", "\ufffd"} and passed_over.count("\ufffd") == (3 if "several" in case else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell_of_the_sweep_is_an_edit_and_what_it_does(family) -> None:
    lm = tiny_model(family)
    before, C = lm.fingerprint(), {1: covariance_of(lm, 1)}
    last = read_prompt(lm, TOLD).subject_range[1] - 1
    table = anatomy.edit_everywhere(lm, TOLD, "Rome", C, NEIGHBOURS, ALONE, [last], progress=False)
    assert lm.fingerprint() == before and len(table) == 1
    cell = table.iloc[0]
    own = sum(says(lm, x.prompt, x.object) for x in NEIGHBOURS)
    edit = rome(lm, TOLD, "Rome", 1, C=C[1], hparams=replace(ALONE, kl=0.0), progress=False)
    others = [replace(TOLD, template=x).prompt for x in TOLD.templates[1:]]
    with edit.applied(lm):
        assert cell["p_target"] == pytest.approx(says(lm, TOLD.prompt, "Rome"), rel=1e-3)
        assert cell["p_paraphrase"] == pytest.approx(np.mean([says(lm, x, "Rome") for x in others]), rel=1e-3)
        assert cell["kept"] == pytest.approx(sum(says(lm, x.prompt, x.object) for x in NEIGHBOURS) / own, rel=1e-3)
    assert cell["bucket"] == "subject_last" and cell["layer"] == 1 and cell["position"] == last
    three = [cell["p_target"], cell["p_paraphrase"], min(1, cell["kept"])]
    assert cell["together"] == pytest.approx(3 / sum(1 / x for x in three))
    assert table.attrs["p_target"] == pytest.approx(says(lm, TOLD.prompt, "Rome"), rel=1e-3)


def test_the_sweep_edits_every_token_and_layer_with_the_key_of_that_token() -> None:
    lm = tiny_model("llama")
    C = {layer: covariance_of(lm, layer) for layer in (2, 0)}
    settings = replace(ALONE, key="bare", steps=1)
    table = anatomy.edit_everywhere(lm, TOLD, "Rome", C, NEIGHBOURS, settings, progress=False)
    prompt = read_prompt(lm, TOLD)
    places = [i for i, token in enumerate(prompt.tokens(lm)) if token.strip()]
    assert table["position"].tolist() == [i for i in places for _ in C]
    assert table["layer"].tolist() == [0, 2] * len(places)
    assert "".join(table.drop_duplicates("position")["token"]) == TOLD.prompt.replace("The ", "The")
    key = k_star(lm, anatomy.key_at(lm, TOLD, 4), 2, "bare")[:, 0]
    expected = input_of_W(lm, 2, prompt.ids, 4)
    torch.testing.assert_close(key, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_sweep_without_paraphrases_or_neighbours_is_refused() -> None:
    lm = tiny_model("llama")
    for fact, neighbours in ((FACT, NEIGHBOURS), (TOLD, ())):
        with pytest.raises(ValueError, match="give at least one of each"):
            anatomy.edit_everywhere(lm, fact, "Rome", {}, neighbours, ALONE, progress=False)


def test_agreement_is_one_where_edits_work_exactly_where_restoring_does() -> None:
    lm = tiny_model("gpt2")
    trace = causal_trace(lm, FACT.prompt, FACT.subject, kind="mlp", samples=2)
    table = anatomy.edit_everywhere(
        lm, TOLD, "Rome", {1: covariance_of(lm, 1)}, NEIGHBOURS, replace(ALONE, steps=1), progress=False
    )
    same = table.assign(together=trace.indirect_effect[table["position"], 1])
    found = anatomy.agreement_with_traces(same, [trace]).set_index("cells")
    assert found.loc["all", "spearman"] == pytest.approx(1) and found.loc["all", "n"] == len(table)
    assert np.isnan(found.loc["last subject token", "spearman"]), "one layer is too few to rank"
    opposite = anatomy.agreement_with_traces(same.assign(together=-same["together"]), [trace]).set_index("cells")
    assert opposite.loc["all", "spearman"] == pytest.approx(-1)


def test_the_figures_show_the_tables() -> None:
    lm = tiny_model("llama")
    edit, C = make(lm, hparams=ALONE), covariance_of(lm, 1)
    lines = anatomy_plots.direction_lines(anatomy.directions(edit, C)).lines
    assert [line.get_label() for line in lines] == ["keys in text", "k*", "u = C$^{-1}$ k*"]
    before, after = (np.asarray(x.get_offsets()) for x in anatomy_plots.constraint(lm, edit).collections)
    assert np.abs(after[:, 0] - after[:, 1]).max() < 1e-4 < np.abs(before[:, 0] - before[:, 1]).max()
    changes = anatomy.disturbance(lm, edit, {"running text": torch.stack([edit.k_star.double(), C[0].double()])})
    boxes = anatomy_plots.quantiles(changes)
    assert boxes["n"].tolist() == [2, 2] and (boxes["p5"] <= boxes["median"]).all()
    ax = anatomy_plots.disturbance_boxes(changes)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["running text (2)"]


def test_the_heatmap_of_a_sweep_has_its_cells_tokens_and_layers() -> None:
    lm = tiny_model("llama")
    C = {layer: covariance_of(lm, layer) for layer in (0, 3)}
    table = anatomy.edit_everywhere(lm, TOLD, "Rome", C, NEIGHBOURS, replace(ALONE, steps=1), [2, 3], progress=False)
    ax = anatomy_plots.sweep_heatmap(table, "kept")
    (mesh,) = (x for x in ax.collections if isinstance(x, QuadMesh))
    assert mesh.get_array().shape == (4, 2) and mesh.get_array().mask[[0, 1]].all(), (
        "rows that were not edited are empty"
    )
    shown = mesh.get_array()[[2, 3]].flatten()
    np.testing.assert_allclose(shown, table["kept"])
    low, high = mesh.get_clim()
    assert ax.get_xticks().tolist() == [0, 3] and low <= table["kept"].min() and high >= table["kept"].max()
    assert (low + high) / 2 == pytest.approx(1), "nothing changed is in the middle of the scale"
    names = [label.get_text() for label in ax.get_yticklabels()]
    begin, end = table.attrs["subject_range"]
    assert [name.endswith("*") for name in names] == [begin <= i < end for i in range(4)]


def test_the_notebooks_figures_hold_the_panels_and_the_line_of_the_key() -> None:
    lm = tiny_model("llama")
    edit, C = make(lm, hparams=ALONE), covariance_of(lm, 1)
    left, right = room.vector_figure(lm, edit, anatomy.directions(edit, C)).axes
    assert len(left.lines) == 3 and len(right.collections) == 2
    changes = anatomy.disturbance(lm, edit, {"running text": torch.stack([edit.k_star.double(), C[0].double()])})
    (ax,) = room.disturbance_figure(changes, 0.25).axes
    assert [text.get_text() for text in ax.get_legend().get_texts()][-1] == "k* itself"
    boxes = room.quantiles(changes).set_index("update")["median"]
    assert f"{boxes['identity'] / boxes['C']:.1f} times" in room.medians(room.quantiles(changes)).to_html()
    traces = [causal_trace(lm, FACT.prompt, FACT.subject, kind, samples=2) for kind in ("state", "mlp")]
    table = anatomy.edit_everywhere(lm, TOLD, "Rome", {1: C}, NEIGHBOURS, replace(ALONE, steps=1), [3], progress=False)
    figure = room.sweep_figure(traces, table, "a note")
    assert figure.get_suptitle() == "a note"
    panels = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert [title[:3] for title in panels] == ["(a)", "(b)", "(c)", "(d)", "(e)", "(f)"]
    assert panels[2].endswith(room.COLUMNS["p_target"])


def test_sentences_say_the_numbers_of_the_tables() -> None:
    lm = tiny_model("llama")
    edit, C = make(lm, hparams=ALONE), covariance_of(lm, 1)
    table, shares = anatomy.sizes(lm, edit, C), anatomy.directions(edit, C)
    k, W = edit.k_star.double(), lm.weight(1).double()
    assert room.change_at_key(table) == pytest.approx(float((edit.delta @ k).norm() / (W @ k).norm()), rel=1e-4)
    lines = room.sizes_in_words(table, edit).splitlines()
    assert (
        lines[0] == f"|v* - W k*| / |W k*| = {room.change_at_key(table):.2f}; the clamp allows {edit.settings.clamp:g}"
    )
    assert lines[2] == f"|dW| / |W| = {float(edit.delta.norm() / W.norm()):.1%}"
    half = int((shares["text"] < 0.5).sum())
    assert room.directions_in_words(shares, table, edit).startswith(
        f"Half of all keys in text lies along {half + 1} of {len(shares)} directions; of k* {shares['k*'][half]:.1%} does"
    )


def test_the_best_cells_of_traces_and_edits_are_named() -> None:
    lm = tiny_model("gpt2")
    trace = causal_trace(lm, FACT.prompt, FACT.subject, kind="mlp", samples=2)
    token, layer = np.unravel_index(trace.indirect_effect.argmax(), trace.indirect_effect.shape)
    line = room.trace_in_words(trace)
    assert f"brought back most at {trace.tokens[token]!r}, layer {layer};" in line
    assert line.endswith(f"{trace.indirect_effect[trace.subject_range[1] - 1].max():+.1%}")
    cells = {"position": [1, 1, 2], "token": ["a", "a", "b"], "bucket": "last", "layer": [0, 3, 0]}
    results = {"p_target": [0.2, 0.6, 0.9], "p_paraphrase": 0.1, "kept": 1.0, "together": [0.1, 0.8, 0.3]}
    table = pd.DataFrame(cells | results)
    table.attrs |= {"p_target": 0.01, "p_paraphrase": 0.02}
    assert room.best_edit_in_words(table).splitlines() == [
        "the best edit is at 'a' (last), layer 3: 1.00 is kept,",
        "p_target 1.0% -> 60.0%,",
        "p_paraphrase 2.0% -> 10.0%,",
        "2 of 3 edits give the target more than 50% after the prompt",
    ]
    by_token = room.best_by_token(table, [trace])
    assert by_token["edits, all three: max"].tolist() == [0.8, 0.3]
    assert by_token["largest mlp effect"].tolist() == trace.indirect_effect.max(axis=1)[[1, 2]].tolist()
