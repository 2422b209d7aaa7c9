"""The interactive picture as Python sees it: what it draws, what stands in for it, and what a click gets back."""

from __future__ import annotations

import base64
import io
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from test_cell_answers import trace_of
from test_plots import TOKENS, make_trace, mesh_of
from test_tracing import telling_model
from traitlets import TraitError

import rome_lab
from rome_lab.lab import plots
from rome_lab.lab.interactive import TracePicture, show
from rome_lab.lab.jobs import Job, wait_for_job
from rome_lab.tracing import answers_at

KINDS = ("state", "mlp", "attn")


def made_traces(**more) -> list:
    return [replace(make_trace(kind), **more) for kind in KINDS]


def browser_of(picture: TracePicture) -> list[dict]:
    """A list that gets what the widget sends to the browser."""
    replies: list[dict] = []
    picture.send = lambda content, buffers=None: replies.append(json.loads(json.dumps(content)))
    return replies


def clicked(picture: TracePicture, **message) -> list[dict]:
    """The replies to one message from the browser, which comes the way that ipywidgets brings it."""
    replies = browser_of(picture)
    picture._handle_custom_msg(message, [])
    return replies


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_cells_have_the_colours_of_the_heatmap() -> None:
    traces = made_traces()
    for one, trace in zip(show(traces).picture["traces"], traces, strict=True):
        mesh = mesh_of(plots.heatmap(trace, **plots.shared_limits(*traces)))
        low, high = one["limits"]
        assert (low, high) == mesh.get_clim()
        p = np.array(one["p"])
        np.testing.assert_array_equal(p, trace.p_restored)
        places = np.minimum((p - low) / (high - low) * len(one["colours"]), len(one["colours"]) - 1).astype(int)
        expected = mesh.to_rgba(p.ravel())
        assert [one["colours"][i] for i in places.ravel()] == [to_hex(colour) for colour in expected]


def test_colour_scales_are_linked_and_white_at_p_corrupted() -> None:
    ones = show(made_traces()).picture["traces"]
    assert len({tuple(one["limits"]) for one in ones}) == 1
    for one in ones:
        low, high = one["limits"]
        white = one["colours"][int((one["p_corrupted"] - low) / (high - low) * len(one["colours"]))]
        assert min(int(white[i : i + 2], 16) for i in (1, 3, 5)) > 250


def test_what_the_browser_gets_is_json_also_where_tokens_were_left_out() -> None:
    trace = make_trace()
    p = trace.p_restored.copy()
    p[2] = np.nan
    one = json.loads(json.dumps(show(replace(trace, p_restored=p)).picture, allow_nan=False))["traces"][0]
    assert one["p"][2] == [None] * 12 and one["p"][3] == list(p[3])


def test_restored_layers_titles_and_tokens() -> None:
    trace = replace(make_trace("mlp"), tokens=("A$", *TOKENS[1:]), answer=" B$")
    picture = show([trace, trace], titles=("before", "after")).picture
    assert [one["title"] for one in picture["traces"]] == ["before", "after"]
    assert picture["traces"][0]["layers"] == [[max(0, x - 4), min(11, x + 5)] for x in range(12)]
    assert picture["tokens"][:2] == ["A$", "␣E"] and picture["traces"][0]["answer"] == "B$"


def test_a_png_and_text_stand_in_for_the_widget() -> None:
    picture = show(made_traces())
    data, _ = picture._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/png", "application/vnd.jupyter.widget-view+json"}
    assert data["text/plain"] == "TracePicture('The Eiffel Tower is in the 0', state, mlp, attn)"
    image = plt.imread(io.BytesIO(base64.b64decode(data["image/png"])))
    assert image.shape[1] > 3 * image.shape[0] and image.std() > 0.1


def test_the_public_name_and_the_packaged_files() -> None:
    assert rome_lab.show is show
    settings = tomllib.loads(Path(rome_lab.__file__).parents[1].joinpath("pyproject.toml").read_text())
    assert {"interactive.js", "interactive.css"} <= set(settings["tool"]["setuptools"]["package-data"]["rome_lab.lab"])


def test_script_and_style_are_inline_and_load_nothing() -> None:
    picture = show(make_trace())
    for source in (picture._esm, picture._css):
        assert len(source) > 1000
        assert not any(word in source for word in ("http:", "https:", "import(", "import ", "url(", "innerHTML"))


def test_a_click_gets_the_answers_of_the_three_runs() -> None:
    lm = telling_model("llama")
    traces = [trace_of(lm, kind) for kind in KINDS]
    (reply,) = clicked(show(traces, lm), ask="answers", trace=1, token=3, layer=2)
    cell = answers_at(lm, traces[1], 3, 2)
    assert (reply["trace"], reply["token"], reply["layer"]) == (1, 3, 2)
    for name in ("clean", "corrupted", "restored"):
        run, expected = reply["answers"][name], getattr(cell, name)
        assert (run["p_answer"], run["rank"]) == (expected.p_answer, expected.rank)
        assert [p for _, p in run["top"]] == [p for _, p in expected.top] and len(run["top"]) == 5


def test_where_clean_runs_get_a_corrupted_piece_nothing_is_called_restored() -> None:
    needed = show(replace(trace_of(telling_model("llama"), "mlp"), direction="noise")).picture["traces"][0]
    assert needed["done"] == "corrupted" and needed["title"].startswith("MLP corrupted")
    assert not any("restored" in name for name in needed["names"])
    assert show(trace_of(telling_model("llama"))).picture["traces"][0]["done"] == "restored"


def test_what_cannot_be_answered_is_one_sentence() -> None:
    lm = telling_model("llama")
    trace = trace_of(lm)
    cell = {"ask": "answers", "trace": 0, "token": 3, "layer": 2}
    (reply,) = clicked(show(trace), **cell)
    assert "write rl.show(trace, lm)" in reply["error"] and "answers" not in reply
    (reply,) = clicked(show(replace(trace, p_clean=trace.p_clean / 2), lm), **cell)
    assert "trace again with this model" in reply["error"] and "\n" not in reply["error"]
    for wrong in ({"token": 99}, {"layer": None}, {"trace": 4}, {"token": "3"}, {"trace": [1]}):
        (reply,) = clicked(show(trace, lm), **cell | wrong)
        assert reply["error"]
    assert clicked(show(trace, lm), ask="something else") == []


def test_a_click_while_the_model_works_says_so() -> None:
    lm = telling_model("llama")
    picture = show(trace_of(lm), lm)
    replies = []

    def work() -> str:
        replies.extend(clicked(picture, ask="answers", trace=0, token=3, layer=2))
        return ""

    Job(lm, work, lambda *ended: None)
    wait_for_job(lm)
    assert "is busy; wait until that is done" in replies[0]["error"]


def test_selected_and_layer_can_be_observed_and_set() -> None:
    picture, changes = show(make_trace()), []
    picture.observe(lambda change: changes.append((change["name"], change["new"])), ["selected", "layer"])
    assert picture.selected is None and picture.layer is None
    picture.set_state({"selected": [3, 2], "layer": 2})  # as it comes from the browser
    assert sorted(changes) == [("layer", 2), ("selected", (3, 2))]
    picture.selected = None
    with pytest.raises(TraitError):
        picture.selected = (1, 2, 3)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "no trace in the list"),
        (None, TypeError, "given is a NoneType; expected a Trace"),
        ([make_trace(), "x"], TypeError, "given is a str"),
        ([make_trace(fact=0), make_trace(fact=1)], ValueError, "different prompts, 'The Eiffel Tower is in the 0' and"),
        (
            [make_trace(), replace(make_trace(), tokens=TOKENS[::-1])],
            ValueError,
            "different tokens, as different models",
        ),
        ([make_trace(), replace(make_trace(), metric="log_probability")], ValueError, "in different metrics"),
        (replace(make_trace(), kind="unheard of"), ValueError, "of kind 'unheard of' cannot be touched"),
        (replace(make_trace(), p_restored=np.full((7, 12), np.nan)), ValueError, "no restored runs"),
    ],
)
def test_what_is_no_trace_of_one_prompt_is_refused(given, error, message) -> None:
    with pytest.raises(error, match=message):
        show(given)


def test_a_wrong_model_or_number_of_titles_is_refused() -> None:
    with pytest.raises(TypeError, match="the model is a str"):
        show(make_trace(), "smollm2-135m")
    with pytest.raises(ValueError, match="2 titles and 1 traces"):
        show(make_trace(), titles=("a", "b"))


def test_the_picture_and_its_numbers_are_saved_as_files() -> None:
    traces = made_traces()
    picture = show(traces, titles=("a", "b", "c"))
    for suffix, start in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("csv", b"kind,position,token")):
        (reply,) = clicked(picture, ask="file", suffix=suffix)
        assert base64.b64decode(reply["file"]["data"]).startswith(start)
        assert reply["file"]["name"] == f"trace-eiffel-tower.{suffix}"
    table = pd.read_csv(io.BytesIO(picture.file("csv")), keep_default_na=False)
    assert table.groupby("trace").size().to_dict() == dict.fromkeys("abc", traces[0].p_restored.size)
    expected = np.concatenate([trace.p_restored.ravel() for trace in traces])
    np.testing.assert_allclose(table["p_restored"].astype(float), expected)
    assert clicked(picture, ask="file", suffix="exe") == []
    with pytest.raises(ValueError, match="saved as png, pdf, csv"):
        picture.file("exe")


def test_a_click_asks_the_model_with_the_edits_of_the_trace() -> None:
    lm = telling_model("llama")
    trace = trace_of(lm)
    W, u = lm.weight(1), torch.zeros(lm.weight(1).shape[1])
    u[0] = 1.0
    delta = torch.outer(torch.ones(len(W)), u).double()
    change = SimpleNamespace(layers=(1,), delta_at=lambda layer: delta, digest="x")
    with lm.overlay.only([change]):
        edited = trace_of(lm)
    picture = TracePicture([trace, edited], lm, ("before", "after"), [(), (change,)])
    for number, each in enumerate((trace, edited)):
        assert picture.answers(3, 2, number).clean.p_answer == pytest.approx(each.p_clean, abs=1e-5)
    assert trace.p_clean != edited.p_clean and lm.overlay.changes == []
