"""The panel does what its buttons say, on the model it was given; errors are one sentence, and what runs can be stopped."""

from __future__ import annotations

import base64
import gc
import html
import logging
import re
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_comparison import FACT, REQUEST, model_of_long_texts, round_by_batch
from test_layer_search import QUICK, cases_of
from tiny import LLAMA, talkative_model
from transformers import AutoModelForCausalLM, LlamaConfig
from unheard import unheard_model

from rome_lab import known_facts, rome
from rome_lab.editing import ENOUGH, subject_keys, suggest_layer
from rome_lab.facts import completions, read_prompt
from rome_lab.facts.sources import load_relations
from rome_lab.lab import first_steps
from rome_lab.lab.interactive import TracePicture
from rome_lab.lab.jobs import Job, Stopped, wait_for_job
from rome_lab.lab.live import StatusLine
from rome_lab.lab.looks import look_at
from rome_lab.lab.panel import Panel, sentence
from rome_lab.models.batching import Batching
from rome_lab.models.language_model import LanguageModel
from rome_lab.models.verdicts import verdicts_of
from rome_lab.tracing import causal_trace


@pytest.fixture
def tiny(shared_cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return model_of_long_texts()


def press(panel, button) -> str:
    """What the panel says once the button has done its work."""
    assert not button.disabled
    button.click()
    wait_for_job(panel.lm)
    return said(panel)


def said(panel) -> str:
    return html.unescape(re.sub("<[^>]+>", "", panel.line.html))


def undo_button(panel, number=0):
    return panel.edits.children[1 + number].children[1]


def save_button(panel, number=0):
    return panel.edits.children[1 + number].children[2]


def logits(lm):
    with torch.no_grad():
        return lm.model(torch.tensor([lm.tokenizer(FACT.prompt)["input_ids"]])).logits


def test_an_edit_is_made_shown_listed_and_undone_to_the_last_bit(tiny) -> None:
    before, original = tiny.fingerprint(), logits(tiny)
    panel = Panel(tiny, REQUEST)
    assert "Edited layer 1: P[Rome]" in press(panel, panel.edit_button)
    assert [edit.target for edit in tiny.edits] == ["Rome"] and not torch.equal(logits(tiny), original)
    assert "Original model, no edits" in panel.result.html and "Now, with 1 edit: Rome" in panel.result.html
    assert len(panel.edits.children) == 2
    assert "Undone. The weights are bit for bit those before the edit." in press(panel, undo_button(panel))
    assert tiny.fingerprint() == before and torch.equal(logits(tiny), original)
    assert "No edits in force" in panel.edits.children[0].value and len(panel.edits.children) == 1


def test_that_an_edit_is_undone_is_said_also_where_fewer_texts_go_together_by_then(tiny) -> None:
    round_by_batch(tiny)
    panel = Panel(tiny, REQUEST)
    press(panel, panel.edit_button)
    Batching.learned[tiny] = 1  # byte
    assert "The weights are bit for bit those before the edit." in press(panel, undo_button(panel))
    assert not torch.equal(look_at(tiny, panel.probe).log_p, panel.original.log_p), "as the batches are smaller now"


def test_edits_are_undone_in_any_order(tiny) -> None:
    before = tiny.fingerprint()
    panel = Panel(tiny, REQUEST)
    press(panel, panel.edit_button)
    panel.form.target.value = "Tokyo"
    press(panel, panel.edit_button)
    assert [edit.target for edit in tiny.edits] == ["Rome", "Tokyo"]
    press(panel, undo_button(panel, 0))
    assert [edit.target for edit in tiny.edits] == ["Tokyo"]
    press(panel, undo_button(panel, 0))
    assert tiny.fingerprint() == before


def test_a_trace_can_be_pointed_at_and_its_columns_choose_the_layer(tiny) -> None:
    panel = Panel(tiny, REQUEST, samples=2)
    assert panel.trace is None
    assert "Traced the answer" in press(panel, panel.trace_button)
    peak = panel.trace.p_restored[panel.trace.subject_range[1] - 1].argmax()
    assert panel.form.layer.value == panel.view.map.layer == peak, (
        "no layer is known of this model: it goes to the peak"
    )
    assert f"around layer {peak} bring back most" in said(panel)
    assert panel.view.box.children == (panel.view.map,) and panel.view.map.traces == panel.view.traces
    panel.view.map.layer = other = (peak + 1) % tiny.n_layers  # as a click on a column does
    assert panel.form.layer.value == other and panel.view.layer_button.layout.display is None
    panel.view.layer_button.click()
    assert panel.form.layer.value == peak and panel.view.layer_button.layout.display == "none"
    assert panel.view.map.answers(1, 0).clean.p_answer == pytest.approx(panel.trace.p_clean, abs=1e-5)


def test_kind_window_and_target_are_traced_as_chosen_and_rows_come_one_by_one(tiny) -> None:
    panel, rows = Panel(tiny, REQUEST, samples=2), []
    panel.form.restored.value, panel.form.window.value = ("state", "mlp", "attn"), 1
    panel.form.follow.value = "the target"
    panel.status.observe(lambda change: rows.extend(re.findall(r"Traced (\d+) of", change["new"])), "html")
    press(panel, panel.trace_button)
    assert [(x.kind, x.window) for x in panel.view.traces] == [("state", 1), ("mlp", 1), ("attn", 1)]
    assert rows == [str(n) for n in range(1, len(panel.trace.tokens) + 1)] * 3
    expected = causal_trace(tiny, FACT.prompt, FACT.subject, "state", samples=2, window=1, answer="Rome")
    assert panel.trace.answer == expected.answer
    np.testing.assert_allclose(panel.trace.p_restored, expected.p_restored, atol=1e-9)


def test_a_trace_stands_beside_an_earlier_one_only_where_both_follow_the_same(tiny) -> None:
    panel = Panel(tiny, REQUEST, samples=2)
    press(panel, panel.trace_button)
    panel.form.follow.value = "the target"
    press(panel, panel.edit_button)
    assert "Beside it" not in press(panel, panel.trace_button), "what the model said is not what is followed now"
    panel.form.follow.value = "what the model says"
    assert "Beside it, as it was in step 2" in press(panel, panel.trace_button)


def test_a_trace_after_an_edit_stands_beside_the_one_before_and_both_answer_clicks(tiny) -> None:
    panel = Panel(tiny, REQUEST, samples=2)
    press(panel, panel.trace_button)
    first = panel.trace
    press(panel, panel.edit_button)
    assert "Beside it, as it was in step 2" in press(panel, panel.trace_button)
    assert panel.view.map.traces == (first, panel.trace) and panel.trace is not first
    assert [title.split(", ")[1] for title in panel.view.map.titles] == ["no edits", "1 edit: Rome"]
    for number, trace in enumerate(panel.view.map.traces):
        assert panel.view.map.answers(1, 0, number).clean.p_answer == pytest.approx(trace.p_clean, abs=1e-5)
    assert [edit.target for edit in tiny.edits] == ["Rome"], "a click leaves the edits in force as they are"


def test_what_belongs_to_another_fact_is_greyed_and_cleared_when_that_is_worked_on(tiny) -> None:
    panel = Panel(tiny, REQUEST, samples=2)
    press(panel, panel.trace_button)
    stale = lambda: ["rl-stale" in place._dom_classes for place in (panel.view.box, panel.answers)]  # noqa: E731
    assert stale() == [False, False]
    panel.form.target.value = "Tokyo"
    assert stale() == [False, True]
    panel.form.target.value, panel.form.subject.value = "Rome", "Tower"
    assert stale() == [True, True]
    panel.form.subject.value = FACT.subject
    assert stale() == [False, False]
    panel.form.subject.value, panel.form.prompt.value = "Louvre", "The Louvre is in"
    press(panel, panel.edit_button)
    assert panel.view.box.children == (panel.view.hint,) and panel.trace is None
    assert "rl-stale" not in panel.view.box._dom_classes, "there is no picture that could be of something else"
    assert "Louvre" in panel.result.html and stale()[1] is False


def test_questions_of_ones_own_are_asked_and_traced_by_a_click(tiny) -> None:
    panel = Panel(tiny, REQUEST, samples=2)
    panel.form.paraphrases.value = "Where the Eiffel Tower is\n\nIn Rome the {} stands in"
    panel.form.others.value = "Louvre\n"
    press(panel, panel.trace_button)
    texts = ["Where the Eiffel Tower is", "In Rome the Eiffel Tower stands in", "The Louvre is in"]
    assert [x.prompt for x in panel.probe.questions[1:]] == texts
    assert panel.result.html.count('data-ask="trace"') == 3
    for row, text in enumerate(texts, 1):
        panel.result.receive(panel.result, {"ask": "trace", "value": str(row)}, [])
        wait_for_job(tiny)
        assert panel.trace.prompt == text and panel.form.prompt.value == FACT.prompt
    panel.form.paraphrases.value = "Where it is"
    assert "is not in the prompt" in press(panel, panel.trace_button)


def test_a_relation_gives_questions_to_a_wording_of_ones_own(tiny) -> None:
    panel = Panel(tiny, REQUEST, samples=2)
    press(panel, panel.trace_button)
    assert "No paraphrases" in panel.result.html and "No neighbours" in panel.result.html
    panel.form.relation_of_fact.value = "landmark_city"
    press(panel, panel.trace_button)
    assert len(panel.probe.paraphrases) == len(load_relations()["landmark_city"].statements)
    assert panel.probe.fact.object == "Paris"


def test_each_step_is_code_that_gives_the_same(tiny) -> None:
    panel = Panel(tiny, REQUEST, samples=2)
    press(panel, panel.trace_button)
    press(panel, panel.edit_button)
    panel.form.target.value = "Tokyo"
    press(panel, panel.edit_button)
    press(panel, undo_button(panel, 0))
    press(panel, panel.trace_button)
    before = tiny.fingerprint()
    _, first, rome, tokyo, undone, last = panel.history.steps
    for step in (first, last):
        names = {"lm": tiny}
        exec(panel.history.code(step), names)
        for trace, again in zip(step.traces, names["traces"], strict=True):
            np.testing.assert_array_equal(trace.p_restored, again.p_restored)
        assert isinstance(names["picture"], TracePicture)
    for step in (rome, tokyo):
        names = {"lm": tiny}
        exec(panel.history.code(step), names)
        assert names["edit"].digest in [edit.digest for edit in step.edits]
    assert tiny.fingerprint() == before, "copied code leaves the edits in force as they are"
    exec(panel.history.code(rome).split("with")[0] + "lm.overlay.put([])", {"lm": tiny})
    exec(panel.history.code(undone), {"lm": tiny})
    assert tiny.fingerprint() == undone.fingerprint


@pytest.mark.parametrize("method", ["memit", "emmet", "alphaedit"])
def test_another_method_edits_several_layers_as_code_that_gives_the_same(tiny, method) -> None:
    panel = Panel(tiny, REQUEST, samples=2)
    panel.form.method.value, before = method, tiny.fingerprint()
    text = press(panel, panel.edit_button)
    (edit,) = tiny.edits
    assert edit.layers == tuple(range(panel.form.layer.value + 1)) and "Edited layers 0" in text
    assert ("holds to" in text) == edit.solution.is_exact == (method == "emmet")
    code = panel.history.code(panel.history.steps[-1])
    assert f"rl.{method}(" in code
    names = {"lm": tiny}
    exec(code, names)
    assert names["edit"].digest == edit.digest
    press(panel, undo_button(panel, 0))
    assert tiny.fingerprint() == before


def test_any_two_steps_stand_side_by_side(tiny) -> None:
    panel = Panel(tiny, REQUEST, samples=2)
    press(panel, panel.trace_button)
    press(panel, panel.edit_button)
    press(panel, undo_button(panel))
    press(panel, panel.trace_button)
    view = panel.history_view
    view.first.value, view.second.value = 2, 5
    picture, code = view.shown.children
    assert picture.traces == (*panel.history.steps[1].traces, *panel.view.traces)
    assert "step 2" in picture.titles[0] and "step 5" in picture.titles[1] and "rl.causal_trace" in code.html
    view.first.value, view.second.value = 3, 4
    page, code = view.shown.children
    assert "Step 3: edit" in page.html and "Step 4: undo" in page.html and "rl.rome" in code.html
    view.first.value = view.second.value = 0
    assert view.shown.children == ()


def test_with_several_edits_the_answers_are_compared_with_the_original(tiny) -> None:
    panel = Panel(tiny, REQUEST)
    press(panel, panel.edit_button)
    panel.form.target.value = "Tokyo"
    assert "(before it, with 1 edit in force)" in press(panel, panel.edit_button)
    assert "Now, with 2 edits: Rome; Tokyo" in panel.result.html
    with tiny.overlay.only([]):
        assert torch.equal(look_at(tiny, panel.probe).log_p, panel.original.log_p)


def test_a_panel_made_again_keeps_what_was_typed_and_done(tiny) -> None:
    panel = Panel(tiny, REQUEST, samples=2)
    panel.form.target.value, panel.form.window.value, panel.form.others.value = "Tokyo", 3, "Louvre"
    press(panel, panel.trace_button)
    again = Panel(tiny, REQUEST, samples=2)
    assert (again.form.target.value, again.form.window.value, again.form.others.value) == ("Tokyo", 3, "Louvre")
    assert [step.title for step in again.history.steps] == [step.title for step in panel.history.steps]
    other = Panel(tiny, replace(REQUEST, target="Oslo"), samples=2)
    assert other.form.target.value == "Oslo" and len(other.history.steps) == 1


def test_a_stopped_edit_leaves_the_model_as_it_was(tiny) -> None:
    before = tiny.fingerprint()
    panel = Panel(tiny, replace(REQUEST, settings=replace(REQUEST.settings, steps=1000)))
    panel.edit_button.click()
    assert panel.edit_button.disabled and not panel.stop_button.disabled
    panel.stop_button.click()
    wait_for_job(tiny)
    assert said(panel).startswith("Stopped.")
    assert tiny.fingerprint() == before and tiny.edits == []
    assert not panel.edit_button.disabled and panel.stop_button.disabled
    assert all(not block._forward_pre_hooks for block in tiny.blocks)


@pytest.mark.parametrize("how", ["stop", "error"])
@pytest.mark.parametrize("what", ["edit", "undo", "load"])
def test_a_change_after_which_nothing_could_be_asked_is_told_kept_as_a_step_and_greys_the_answers(
    tiny, tmp_path, monkeypatch, what, how
) -> None:
    panel = Panel(tiny, REQUEST, folder=str(tmp_path), samples=2)
    if what != "edit":
        press(panel, panel.edit_button)
    if what == "load":
        press(panel, save_button(panel))
        press(panel, undo_button(panel))
    n_steps, before = len(panel.history.steps), len(tiny.edits)

    def looked(lm, probe):  # the first look after the change ends the job
        if len(lm.edits) == before:
            return look_at(lm, probe)
        raise Stopped if how == "stop" else MemoryError("no memory is left; close something.")

    monkeypatch.setattr("rome_lab.lab.panel.look_at", looked)
    if what == "undo":  # what is said without edits is kept, so that nothing is run
        monkeypatch.setattr("rome_lab.lab.panel.compared_page", lambda *rest: looked(tiny, None))
    buttons = {"edit": panel.edit_button, "load": panel.saved.load_button}
    text = press(panel, buttons[what] if what in buttons else undo_button(panel))
    assert len(tiny.edits) == before + (-1 if what == "undo" else 1)
    assert (
        "those that were" not in text and f"In force now: {'no edits' if what == 'undo' else '1 edit: Rome'}." in text
    )
    assert len(panel.edits.children) == 1 + len(tiny.edits) and "rl-stale" in panel.answers._dom_classes
    step = panel.history.steps[-1]
    assert len(panel.history.steps) == n_steps + 1 and step.title.startswith(what) and step.edits == tuple(tiny.edits)
    assert "made outside the panel" not in panel.history.code(step)


def test_a_trace_stopped_as_it_grows_leaves_the_picture_of_the_last_one(tiny, monkeypatch) -> None:
    panel = Panel(tiny, REQUEST, samples=2)
    press(panel, panel.trace_button)
    complete, grow = panel.trace, Panel.grow
    panel.form.restored.value = ("state",)

    def stopped(*arguments):
        monkeypatch.setattr("rome_lab.lab.pictured.BETWEEN_PICTURES", 0)
        grow(*arguments)
        raise Stopped

    monkeypatch.setattr(Panel, "grow", stopped)
    assert "those that were" in press(panel, panel.trace_button)
    assert panel.view.map.traces == (complete,) and not np.isnan(panel.view.map.traces[0].p_restored).any()


def test_what_is_greyed_is_by_what_the_fields_said_when_the_work_began(tiny, monkeypatch) -> None:
    panel, tell = Panel(tiny, REQUEST, samples=2), Panel.tell
    monkeypatch.setattr(Panel, "tell", lambda panel, *told: (typed(), tell(panel, *told)))

    def typed():
        if panel.shown_of:
            panel.form.target.value = "Tokyo"

    press(panel, panel.trace_button)
    assert panel.form.target.value == "Tokyo" and "rl-stale" in panel.answers._dom_classes


def test_a_link_to_nowhere_is_no_saved_edit_and_a_model_needs_a_name(tiny, tmp_path) -> None:
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    panel = Panel(tiny, REQUEST, folder=str(tmp_path))
    assert len(panel.saved.files.options) == 1
    panel.saved.export_folder.value = " "
    assert "is empty; write the name" in press(panel, panel.saved.export_button)


BAD = {
    "subject": ("", "The subject is empty; write it out."),
    "prompt": ("It is in", "The subject 'Eiffel Tower' is not in the prompt 'It is in'"),
    "target": (" ", "The target is ''"),
}


@pytest.mark.parametrize("field", BAD)
def test_a_bad_field_is_one_inline_sentence_and_an_unchanged_model(tiny, field) -> None:
    before = tiny.fingerprint()
    panel = Panel(tiny, REQUEST)
    value, expected = BAD[field]
    getattr(panel.form, field).value = value
    text = press(panel, panel.edit_button)
    assert expected in text and "Traceback" not in text and "\n" not in text
    assert tiny.fingerprint() == before and not panel.edit_button.disabled


def test_too_few_tokens_for_C_are_refused_inline(tiny) -> None:
    config = LlamaConfig(**LLAMA | {"intermediate_size": 96, "max_position_embeddings": 256})
    wide = LanguageModel(
        AutoModelForCausalLM.from_config(config), tiny.tokenizer
    )  # a text has 64 tokens, too few for it
    before = wide.fingerprint()
    panel = Panel(wide, replace(REQUEST, tokens=1))
    text = press(panel, panel.edit_button)
    assert re.search(r"C of \d+ tokens cannot be inverted", text) and f"{ENOUGH * 96} tokens of varied text" in text
    assert wide.fingerprint() == before


def test_an_edit_is_saved_listed_downloaded_and_loaded_and_a_model_exported(tiny, tmp_path) -> None:
    panel = Panel(tiny, REQUEST, folder=str(tmp_path / "kept"))
    saved = panel.saved
    assert "No saved edit is chosen" in press(panel, saved.load_button)
    press(panel, panel.edit_button)
    edited = logits(tiny)
    assert "Saved: " in press(panel, save_button(panel))
    assert panel.line is panel.edits_line, "said beside the button"
    assert "eiffel-tower-rome-layer-1-" in saved.files.value and len(saved.files.options) == 2
    files = []
    saved.line.send = files.append
    saved.download_button.click()
    (file,) = files
    assert base64.b64decode(file["file"]["data"]) == Path(saved.files.value).read_bytes()
    assert "Exported: " in press(panel, saved.export_button) and panel.line is saved.line
    assert saved.export_folder.value == str(tmp_path / "kept" / "model-2"), "a free name is proposed"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "kept" / "model")
    ids = torch.tensor([tiny.tokenizer(FACT.prompt)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, edited)
    saved.export_folder.value = str(tmp_path / "kept" / "model")
    assert "is not empty; name a new folder" in press(panel, saved.export_button)
    assert "is in force already" in press(panel, saved.load_button)
    press(panel, undo_button(panel))
    assert "Loaded and in force: " in press(panel, saved.load_button)
    assert torch.equal(logits(tiny), edited)


def test_reports_of_two_questions_about_one_subject_are_two_files(tiny, tmp_path, monkeypatch) -> None:
    panel, written = Panel(tiny, REQUEST, folder=str(tmp_path)), []
    monkeypatch.setattr(
        "rome_lab.lab.panel.report", lambda lm, fact, target, path, **rest: written.append(path) or path.write_text("")
    )
    for target in ("Rome", "Tokyo", ""):
        panel.form.target.value = target
        assert press(panel, panel.report_button).startswith("Written: ")
    panel.form.target.value, panel.form.layer.value = "Rome", 0
    assert press(panel, panel.report_button).startswith("Written: "), "of another layer"
    panel.form.prompt.value = "The Eiffel Tower is made of " + "very " * 5 + "pure"
    assert press(panel, panel.report_button).startswith("Written: ")
    assert len({*written}) == 5 and all(len(path.name) < 80 for path in written)


def test_a_file_that_is_no_edit_is_refused_inline(tiny, tmp_path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"garbage")
    panel = Panel(tiny, REQUEST, folder=str(tmp_path))
    panel.saved.files.value = str(tmp_path / "x.safetensors")
    assert "is no edit" in press(panel, panel.saved.load_button)
    (tmp_path / "x.safetensors").unlink()
    assert "There is no file" in press(panel, panel.saved.load_button)
    assert tiny.edits == []


def test_a_new_panel_stops_the_old_ones_work_and_lists_the_edits_in_force(tiny) -> None:
    panel = Panel(tiny, REQUEST)
    press(panel, panel.edit_button)
    panel.form.steps.value, panel.form.target.value = 1000, "Tokyo"
    panel.edit_button.click()
    again = Panel(tiny, REQUEST)
    assert said(panel).startswith("Stopped.") and len(tiny.edits) == 1
    press(again, undo_button(again))
    assert tiny.edits == []


def test_one_job_a_model_at_a_time(tiny) -> None:
    first, second = Panel(tiny, REQUEST), Panel(tiny, REQUEST)
    first.form.steps.value = 1000
    first.edit_button.click()
    second.trace_button.click()
    assert "is busy; wait" in said(second) and not second.trace_button.disabled
    first.stop_button.click()
    wait_for_job(tiny)
    assert "Traced" in press(second, second.trace_button)


def test_a_second_click_leaves_the_running_job_its_stop_button(tiny) -> None:
    panel = Panel(tiny, REQUEST)
    panel.form.steps.value = 1000
    panel.edit_button.click()
    panel.start(panel.run_edit, panel.status)  # as a click that was on its way when the button was switched off
    assert not panel.stop_button.disabled and panel.edit_button.disabled and "busy" not in said(panel)
    panel.stop_button.click()
    wait_for_job(tiny)
    assert said(panel).startswith("Stopped.") and panel.stop_button.disabled


def test_what_the_library_warns_of_is_shown(tiny) -> None:
    slow = replace(REQUEST.settings, learning_rate=1e-4, enough=0.99)
    panel = Panel(tiny, replace(REQUEST, settings=slow))
    text = press(panel, panel.edit_button)
    assert "v* did not converge" in text and "the best so far" in text


def test_choosing_a_fact_fills_the_fields(tiny) -> None:
    panel = Panel(tiny, REQUEST)
    panel.form.chosen.value = 0
    assert panel.form.request().target == "London" and panel.form.subject.value == "Taj Mahal"
    assert panel.form.request().fact.relation == "landmark_city"
    panel.form.relation.value = "landmark_city"
    facts = load_relations()["landmark_city"].facts
    panel.form.chosen.value = 3
    assert panel.form.subject.value == facts[3].subject and panel.form.target.value == ""
    assert facts[3].object not in panel.form.target.options and len(panel.form.target.options) > 3


# Jobs


def test_a_stopped_job_ends_at_its_next_block_and_leaves_cells_after_it_alone(tiny) -> None:
    began, results = threading.Event(), []

    def work() -> str:
        began.set()
        while True:
            logits(tiny)

    job = Job(tiny, work, lambda result, notes: results.append(result))
    began.wait()
    job.stop()
    wait_for_job(tiny)
    original = logits(tiny)
    assert isinstance(results[0], Stopped)
    assert torch.equal(logits(tiny), original)


def test_a_job_hands_over_its_own_warnings_only(tiny) -> None:
    logger, kept = logging.getLogger("rome_lab.test"), []

    def work() -> str:
        logger.warning("of the job")
        logger.info("of no interest")
        return "well done"

    job = Job(tiny, work, lambda result, notes: kept.append((result, notes)))
    logger.warning("of this thread")
    job.join()
    assert kept == [("well done", ["of the job"])]


def test_what_is_said_is_text_and_never_html_and_odd_messages_change_nothing() -> None:
    asks: list[tuple[str, str]] = []
    line = StatusLine(lambda name, value: asks.append((name, value)))
    line.say("<script>", "done", ["<b>"])
    assert "<script>" not in line.html and "&lt;script&gt;" in line.html and "&lt;b&gt;" in line.html
    line.progress("<i>", 0.5)
    assert "&lt;i&gt;" in line.html and 'aria-valuenow="50"' in line.html
    replies = []
    line.send = replies.append
    for message in ("x", None, {}, {"ask": 3}, {"ask": "trace"}, {"ping": 7}):
        line.receive(line, message, [])
    assert asks == [("trace", "")] and replies == [{"pong": 7}]


def test_an_unexpected_error_is_named_in_one_line() -> None:
    assert sentence(KeyError("a\nb")) == r"KeyError: 'a\nb'"
    assert sentence(ValueError("rome: this\nand that.")) == "This and that."
    assert sentence(ValueError("covariance: C of few tokens.")) == "C of few tokens."
    assert sentence(ValueError("my-model: has none, C:/x: neither")) == "my-model: has none, C:/x: neither"


def test_an_error_while_a_chosen_fact_is_filled_in_is_said_in_the_panel(tiny) -> None:
    panel = Panel(tiny, REQUEST)
    with torch.no_grad():
        tiny.memory(0).weight[0, 0] = float("nan")
    panel.form.relation.value = "landmark_city"
    panel.form.chosen.value = 0
    assert re.search("not a number|nan times", said(panel))
    assert panel.form.subject.value == FACT.subject, "the fields are as they were"


def test_the_hook_that_stops_a_job_is_none_to_warn_of(tiny) -> None:
    kept = []
    Job(tiny, lambda: tiny.fingerprint(), lambda result, notes: kept.append((result, notes))).join()
    assert kept == [(tiny.fingerprint(), [])]


def test_a_model_that_a_job_works_on_is_neither_run_nor_changed_in_a_cell(tiny) -> None:
    edit = rome(tiny, FACT, "Rome", 1, C=torch.eye(48), hparams=REQUEST.settings, progress=False)
    before = tiny.fingerprint()
    go, begun, kept = threading.Event(), threading.Event(), []
    job = Job(tiny, lambda: begun.set() or str(go.wait(30)), lambda result, notes: kept.append(result))
    assert begun.wait(30)
    with pytest.raises(RuntimeError, match="at work in another thread"):
        causal_trace(tiny, FACT.prompt, FACT.subject, samples=1)
    with pytest.raises(RuntimeError, match="at work in another thread"):
        edit.apply(tiny)
    for run in (
        lambda: completions(tiny, [(FACT.prompt, "Rome")], "test"),
        lambda: known_facts(tiny, [FACT], progress=False),
        lambda: subject_keys(tiny, 1, [read_prompt(tiny, FACT)]),
        lambda: rome(tiny, FACT, "Tokyo", 1, C=torch.eye(48), hparams=REQUEST.settings, progress=False),
        lambda: logits(tiny),
    ):
        with pytest.raises(RuntimeError, match="is at work in the panel.*or press Stop"):
            run()
    go.set()
    job.join()
    assert tiny.fingerprint() == before and not tiny.edits
    assert kept == ["True"] and causal_trace(tiny, FACT.prompt, FACT.subject, samples=1).p_clean > 0


def test_a_model_is_freed_after_its_last_job(tiny) -> None:
    lm = model_of_long_texts()
    held, job = weakref.ref(lm), Job(lm, lambda: "", lambda result, notes: None)
    job.join()
    del lm, job
    gc.collect()
    assert held() is None


def test_a_layer_is_suggested_where_none_is_known_and_stays(shared_cache, monkeypatch) -> None:
    lm = talkative_model()
    lm.model.config.max_position_embeddings = 256
    cases = cases_of(lm)
    told = []

    def of_these_cases(lm, tell, **options):
        tell_all = lambda *doing: (told.append(doing), tell(*doing))  # noqa: E731
        return suggest_layer(lm, cases, layers=[0, 2], n=2, tell=tell_all, **QUICK | options)

    monkeypatch.setattr(first_steps, "suggest_layer", of_these_cases)
    panel = Panel(lm, replace(REQUEST, layer=None), samples=2)
    assert panel.steps.suggest_button in panel.steps.widget.children[0].children
    assert panel.steps.verify_button not in panel.steps.widget.children[0].children, "the family is known by name"
    text = press(panel, panel.steps.suggest_button)
    best = panel.steps.suggestion.layer
    assert text.startswith(f"Layer {best} of") and panel.form.layer.value == best and len(told) > 4
    assert "<table" in panel.steps.table.html and "suggested" in panel.steps.table.html
    press(panel, panel.trace_button)
    assert panel.form.layer.value == best, "a trace does not choose another"
    again = Panel(lm, panel.first_request)
    assert again.steps.table.html == panel.steps.table.html and again.form.suggested == best
    named = Panel(LanguageModel(lm.model, lm.tokenizer, "smollm2-135m"), REQUEST)
    assert named.steps.widget.children == ()


def test_a_model_of_no_known_family_is_verified_by_a_button(shared_cache) -> None:
    lm = unheard_model()
    panel = Panel(lm, REQUEST)
    assert panel.steps.verify_button in panel.steps.widget.children[0].children
    assert press(panel, panel.steps.verify_button).startswith("Verified: traces and an edit are what plain runs")
    assert "exact to float" in panel.steps.verdict.html and [x.check for x in verdicts_of(lm)][:2]
    assert (
        panel.steps.verify_button not in Panel(lm, replace(REQUEST, target="Tokyo")).steps.widget.children[0].children
    )
