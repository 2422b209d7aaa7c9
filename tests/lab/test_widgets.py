"""The panel does what its buttons say, on the model it was given; errors are one sentence, and what runs can be stopped."""

from __future__ import annotations

import gc
import logging
import re
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from test_comparison import FACT, REQUEST, model_of_long_texts, round_by_batch
from tiny import LLAMA
from transformers import AutoModelForCausalLM, LlamaConfig

from rome_lab.facts.sources import load_relations
from rome_lab.lab.jobs import Job, Stopped, wait_for_job
from rome_lab.lab.looks import look_at
from rome_lab.lab.panel import Panel, sentence
from rome_lab.models.batching import Batching
from rome_lab.models.language_model import LanguageModel


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return model_of_long_texts()


def press(panel, button) -> str:
    """What the panel says once the button has done its work."""
    assert not button.disabled
    button.click()
    wait_for_job(panel.lm)
    return said(panel)


def said(panel) -> str:
    return re.sub("<[^>]+>", "", panel.status.value)


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
    assert "Before the edit" in panel.result.value and "Now" in panel.result.value
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
    assert not torch.equal(look_at(tiny, panel.probe).log_p, panel.before.log_p), "as the batches are smaller now"


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


def test_a_trace_is_drawn_with_the_chosen_layer_marked(tiny) -> None:
    panel = Panel(tiny, REQUEST, samples=2)
    assert "Traced the answer" in press(panel, panel.trace_button)
    peak = panel.traced.p_restored[panel.traced.subject_range[1] - 1].argmax()
    assert panel.form.layer.value == peak, "of a model for which no layer is known, the slider goes to the peak"
    picture = panel.picture.value
    assert "data:image/png;base64" in picture
    panel.form.layer.value = (peak + 1) % tiny.n_layers
    assert panel.picture.value != picture


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


BAD = {
    "subject": ("", "The subject is empty; write it out."),
    "prompt": ("It is in", "the subject 'Eiffel Tower' is not in the prompt 'It is in'"),
    "target": (" ", "rome: the target is ''"),
}


@pytest.mark.parametrize("field", BAD)
def test_a_bad_field_is_one_inline_sentence_and_an_unchanged_model(tiny, field) -> None:
    before = tiny.fingerprint()
    panel = Panel(tiny, REQUEST)
    value, expected = BAD[field]
    getattr(panel.form, field).value = value
    text = press(panel, panel.edit_button)
    assert expected in text.replace("&#x27;", "'") and "Traceback" not in text and "\n" not in text
    assert tiny.fingerprint() == before and not panel.edit_button.disabled


def test_too_few_tokens_for_C_are_refused_inline(tiny) -> None:
    config = LlamaConfig(**LLAMA | {"intermediate_size": 96, "max_position_embeddings": 256})
    wide = LanguageModel(
        AutoModelForCausalLM.from_config(config), tiny.tokenizer
    )  # a text has 64 tokens, too few for it
    before = wide.fingerprint()
    panel = Panel(wide, replace(REQUEST, tokens=1))
    text = press(panel, panel.edit_button)
    assert re.search(r"C of \d+ tokens cannot be inverted", text) and "3072 tokens of varied text would do" in text
    assert wide.fingerprint() == before


def test_an_edit_is_saved_and_loaded_and_a_model_exported(tiny, tmp_path) -> None:
    panel = Panel(tiny, REQUEST, folder=str(tmp_path / "kept"))
    press(panel, panel.edit_button)
    edited = logits(tiny)
    assert "Saved: " in press(panel, save_button(panel))
    assert "eiffel-tower-rome-layer-1-" in panel.path.value
    assert "Exported: " in press(panel, panel.export_button)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "kept" / "model")
    ids = torch.tensor([tiny.tokenizer(FACT.prompt)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, edited)
    assert "is not empty; name a new folder" in press(panel, panel.export_button)
    assert "is in force already" in press(panel, panel.load_button)
    press(panel, undo_button(panel))
    assert "Loaded and in force: " in press(panel, panel.load_button)
    assert torch.equal(logits(tiny), edited)


@pytest.mark.parametrize(("content", "expected"), [(None, "there is no file"), (b"garbage", "is no edit")])
def test_a_file_that_is_no_edit_is_refused_inline(tiny, tmp_path, content, expected) -> None:
    panel = Panel(tiny, REQUEST)
    panel.path.value = str(tmp_path / "x.safetensors")
    if content:
        (tmp_path / "x.safetensors").write_bytes(content)
    assert expected in press(panel, panel.load_button)
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
    panel.start(panel.edit)  # as a click that was on its way when the button was switched off
    assert not panel.stop_button.disabled and panel.edit_button.disabled
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


def test_a_stopped_job_ends_at_its_next_block_and_leaves_other_threads_alone(tiny) -> None:
    began, results = threading.Event(), []

    def work() -> str:
        began.set()
        while True:
            logits(tiny)

    job = Job(tiny, work, lambda result, notes: results.append(result))
    began.wait()
    job.stop()
    original = logits(tiny)  # of this thread, which nobody stopped
    wait_for_job(tiny)
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


def test_an_unexpected_error_is_named_in_one_line() -> None:
    assert sentence(KeyError("a\nb")) == r"KeyError: 'a\nb'"
    assert sentence(ValueError("rome: this\nand that.")) == "rome: this and that."


def test_an_error_while_a_chosen_fact_is_filled_in_is_said_in_the_panel(tiny) -> None:
    panel = Panel(tiny, REQUEST)
    with torch.no_grad():
        tiny.memory(0).weight[0, 0] = float("nan")
    panel.form.relation.value = "landmark_city"
    panel.form.chosen.value = 0
    assert "comparison: tiny-llama gives what is not a number" in said(panel)
    assert panel.form.subject.value == FACT.subject, "the fields are as they were"


def test_a_model_is_freed_after_its_last_job(tiny) -> None:
    lm = model_of_long_texts()
    held, job = weakref.ref(lm), Job(lm, lambda: "", lambda result, notes: None)
    job.join()
    del lm, job
    gc.collect()
    assert held() is None
