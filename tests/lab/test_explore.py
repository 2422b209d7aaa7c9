"""A trace chosen by hand is the one that was chosen, in any metric without a new run, and its code gives the same."""

from __future__ import annotations

import html
import re
from dataclasses import replace

import numpy as np
import pytest
from test_comparison import FACT, REQUEST, model_of_long_texts

from rome_lab import GaussianNoise, SubjectSwap, explore
from rome_lab.facts.sources import load_relations
from rome_lab.lab import trace_form
from rome_lab.lab.interactive import TracePicture
from rome_lab.lab.jobs import wait_for_job
from rome_lab.lab.panel import Panel
from rome_lab.lab.trace_form import TraceForm, TraceRequest
from rome_lab.tracing import causal_trace

OTHER, FOIL = "Effiel Toxer", "Rome"  # as many tokens in the tiny tokenizer
SWAP = SubjectSwap(OTHER, FOIL)


@pytest.fixture(scope="module")
def tiny():
    return model_of_long_texts()


def press(panel) -> str:
    panel.trace_button.click()
    wait_for_job(panel.lm)
    return html.unescape(re.sub("<[^>]+>", "", panel.line.html))


def test_what_is_picked_is_traced_shown_by_any_metric_and_copied_as_code(tiny) -> None:
    panel = explore(tiny, FACT.prompt, FACT.subject, samples=1)
    form, metrics = panel.form, panel.view.metrics
    assert "Traced the answer" in press(panel)
    paper = causal_trace(tiny, FACT.prompt, FACT.subject, "mlp", samples=1)
    np.testing.assert_allclose(panel.trace.p_restored, paper.p_restored, atol=1e-9)
    assert metrics.buttons["logit_difference"].disabled and "against a foil" in metrics.reason.value

    form.corruption.value, form.other.value, form.foil.value = 0.0, OTHER, FOIL
    form.direction.value, form.restored.value, form.heads.value = "noise", ("state",), True
    text = press(panel)
    assert "Traced the answer" in text, text
    before = panel.trace
    metrics.buttons["logit_difference"].click()
    options = {"corruption": SWAP, "direction": "noise", "metric": "logit_difference"}
    for kind, trace in zip(("state", "head"), panel.view.traces, strict=True):
        expected = causal_trace(tiny, FACT.prompt, FACT.subject, kind, **options)
        np.testing.assert_allclose(trace.effect, expected.effect, atol=1e-6)
        assert (trace.metric, trace.direction, trace.swapped) == ("logit_difference", "noise", OTHER)
    assert panel.trace.p_restored is before.p_restored, "another metric needs no new run"
    assert panel.view.map.traces == panel.view.traces[:1] and "logit" in panel.view.map.picture["traces"][0]["metric"]
    assert "data:image/png" in panel.view.box.children[1].html and not metrics.reason.value

    step = panel.history.steps[-1]
    assert f"{OTHER} in its place, corrupted into clean" in step.title
    names = {"lm": tiny}
    exec(panel.history.code(step), names)
    for trace, again in zip(panel.view.traces, names["traces"], strict=True):
        np.testing.assert_array_equal(trace.effect, again.effect)
        assert trace.metric == again.metric
    assert isinstance(names["picture"], TracePicture) and names["axes"].get_ylabel() == "layer"
    panel.history_view.first.value, panel.history_view.second.value = 2, 1
    kinds = [
        [trace.kind for trace in x.traces] for x in panel.history_view.shown.children if isinstance(x, TracePicture)
    ]
    assert kinds == [["state"], ["mlp"]], "what is in another metric is a picture of its own"

    form.other.value = "Tower"
    assert "choose one of as many" in press(panel) and panel.view.traces[0].swapped == OTHER, "nothing is lost"


def test_the_defaults_are_the_papers_and_only_departures_are_in_the_code() -> None:
    request = TraceForm().trace_request(None, FACT, 10, None)
    assert request == TraceRequest(("mlp",), None, GaussianNoise(3.0), "denoise", None, 10, 10)
    assert request.departures == () and replace(request, corruption=GaussianNoise(5)).departures == (
        "noise of 5 sigma",
    )


def test_another_subject_is_looked_for_where_the_relation_is_known_and_renewed_with_the_fact(tiny, monkeypatch) -> None:
    form, facts = TraceForm(), load_relations()["landmark_city"].facts
    form.corruption.label = trace_form.ANOTHER
    partners = iter([facts[1], facts[2]])
    monkeypatch.setattr(trace_form, "partner_of", lambda lm, fact, among, seed: next(partners, None))
    fact = replace(facts[0], template="The {} is in")
    for place in (1, 1, 2):
        asked = replace(fact, template="Go to {} in") if place == 2 else fact
        corruption = form.trace_request(tiny, asked, 1, None).corruption
        assert corruption == SubjectSwap(facts[place].subject, facts[place].object)
    assert all(x.object != fact.object for x in facts if x.subject in form.other.options)
    form.other.value, form.foil.value = "", ""
    with pytest.raises(ValueError, match="no other subject of as many tokens is known to the model; write one"):
        form.trace_request(tiny, fact, 1, None)
    with pytest.raises(ValueError, match="its relation is not known"):
        form.trace_request(tiny, replace(fact, relation=None), 1, None)


def test_the_panel_keeps_the_choices_and_shows_other_metrics(tiny) -> None:
    panel = Panel(tiny, REQUEST, samples=1)
    panel.form.foil.value, panel.form.direction.value, panel.form.corruption.value = "Oslo", "noise", 1.0
    text = press(panel)
    assert "take away most" in text, text
    panel.view.metrics.buttons["logit_difference"].click()
    assert panel.trace.foil and panel.trace.metric == "logit_difference"
    assert "foil='Oslo'" in (code := panel.history.code(panel.history.steps[-1])) and "rl.GaussianNoise(1)" in code
    again = Panel(tiny, REQUEST, samples=1)
    assert (again.form.foil.value, again.form.direction.value, again.form.corruption.value) == ("Oslo", "noise", 1.0)
    panel.form.chosen.value = 0
    assert panel.form.foil.value == "", "another fact has another foil"
