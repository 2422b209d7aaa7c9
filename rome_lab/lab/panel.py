"""The editing panel: its rooms put together, and what its buttons do.

Panel    a form, a trace to point at, what the model says before and after, the edits in force, files, the history

What it has in common with `explore` is in explorer.py.
"""

from __future__ import annotations

import html
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar
from weakref import WeakKeyDictionary, ref

import ipywidgets as w

from rome_lab.editing import Edit, check_requests, layers_in_words
from rome_lab.facts import Fact
from rome_lab.lab.explorer import Explorer
from rome_lab.lab.first_steps import FirstSteps
from rome_lab.lab.form import EditForm
from rome_lab.lab.history import History, Step, counted, edit_code, edits_named
from rome_lab.lab.history_view import HistoryView
from rome_lab.lab.jobs import sentence
from rome_lab.lab.live import LiveText, StatusLine, placed, row
from rome_lab.lab.looks import Look, Probe, look_at, probe_of
from rome_lab.lab.page import compared_page
from rome_lab.lab.pictured import TraceView
from rome_lab.lab.reporting import report
from rome_lab.lab.saved import SavedEdits, free_path
from rome_lab.lab.trials import EditRequest, make_edit, met_in_words
from rome_lab.models import LanguageModel
from rome_lab.tracing import Trace


class Panel(Explorer):
    """Choose a fact, trace it, edit it, compare before and after, undo; save, load and export edits.

    It shows the edits in force on `lm` and works on it. Making a new panel for the same model stops what the old one
    was doing; the edits stay in force, and the new panel lists them. Where it is made anew with the same request, what was
    typed and the history stay, too.

    Args:
        request: what the fields say at first.
        folder: where edits, models and reports are saved, unless the user says otherwise.
        samples: of the noise, in the causal trace.
    """

    latest: ClassVar[WeakKeyDictionary[LanguageModel, ref[Panel]]] = WeakKeyDictionary()

    def __init__(self, lm: LanguageModel, request: EditRequest, folder: str = "edits", samples: int = 10) -> None:
        self.first_request, self.folder = request, folder
        self.take_over(lm, samples)
        self.edits_line = StatusLine()
        self.form = EditForm(lm, request, lambda error: self.status.say(sentence(error), "error"))
        self.view = TraceView(lm, self.form, self.revised)
        self.probe: Probe | None = None
        self.original: Look | None = None
        self.shown_of: dict[w.Widget, tuple[str, ...]] = {}
        self.begun_with = self.words()
        old = self.latest.get(lm, lambda: None)()
        same = old is not None and old.first_request == request
        self.history = old.history if same else History(lm)
        self.build()
        if same:
            self.steps.take(old.steps.suggestion)
            self.form.take(old.form)
        else:
            self.record("the model at first")
        self.latest[lm] = ref(self)
        self.list_edits()
        self.status.say("Choose a fact or type one; then Trace or Edit.", "busy")

    def build(self) -> None:
        """Make the widgets and put them in their places."""
        form = self.form
        self.edit_button = self.button("Edit", self.run_edit, self.status)
        self.report_button = self.button("Report", self.run_report, self.status)
        self.report_button.tooltip = "A page about this fact and edit, as one file to keep or to send"
        self.edit_button.button_style = "primary"
        self.steps = FirstSteps(self.lm, form, self.button, self.tell)
        self.result = LiveText(self.ask_row)
        self.answers = placed("rl-answers-box", [self.result])
        self.edits = w.VBox()
        self.saved = SavedEdits(self.lm, self.folder, self.button, self.loaded)
        self.history_view = HistoryView(self.history)
        self.edit_button.add_class("rl-go-edit")
        buttons = row([self.trace_button, self.edit_button, self.stop_button, self.report_button])
        left = placed("rl-left", [form.widget, buttons, self.status, self.steps.widget])
        right = placed("rl-right", [self.view.box, self.view.metrics.widget, row([self.view.layer_button])])
        top = w.HBox([left, right])
        top.add_class("rl-columns")
        parts = (w.VBox([self.edits, self.edits_line]), self.saved.widget, self.history_view.widget)
        for part in parts:
            part.add_class("rl-part")
        self.widget = placed("rl-edit", [top, self.answers, *parts])
        for field in (form.subject, form.prompt, form.target, form.layer):
            field.observe(lambda _: self.typing(), "value")

    def typing(self) -> None:
        """Mark what the fields no longer name; a job, which puts edits aside now and then, does it at its end."""
        if self.stop_button.disabled:
            self.mark()

    # Jobs

    def lines(self) -> tuple[StatusLine, ...]:
        return (self.status, self.edits_line, self.saved.line, self.steps.line)

    def settled(self) -> None:
        self.list_edits()
        self.mark()

    def busy(self, on: bool) -> None:
        super().busy(on)
        rows = [button for line in self.edits.children[1:] for button in line.children[1:]]
        # The choosers ask the model, which only the job may do.
        for control in (self.form.relation, self.form.chosen, *rows):
            control.disabled = on

    # What the buttons do

    def run_trace(self, fact: Fact | None = None) -> str:
        """Trace what the fields name, or another fact of the same questions."""
        if fact is None:
            request = self.typed()
            fact = request.fact
            self.ask(request)
            self.compare()
        return self.trace_fact(fact, self.form.answer)

    def grow(self, kinds: int, complete: list[Trace], part: Trace) -> None:
        super().grow(kinds, complete, part)
        self.shown_of[self.view.box] = self.about(self.view.box, self.begun_with)
        self.mark()

    def run_edit(self) -> str:
        request = self.typed()
        check_requests(self.lm, [(request.fact, request.target)], request.layer)
        self.view.work_on(request.fact)
        self.ask(request)
        before, others = self.compare(), tuple(self.lm.edits)
        edit = make_edit(self.lm, request, self.tell)
        edit.apply(self.lm)
        code = edit_code(request, edit.layers)
        self.history.know(edit, code, others)
        step = self.change(f"edit: {request.fact.prompt} … {edit.target}", before=others, action=f"edit = {code}")
        p = [look.table["p_target"][0] for look in (before, step.look)]
        started = f" (before it, with {counted(others)} in force)" if others else ""
        change = f"P[{edit.target}] {p[0]:.3f}{started} → {p[1]:.3f}"
        return f"Edited {layers_in_words(edit.layers)}: {change}; {met_in_words(edit)}."

    def undo(self, edit: Edit) -> str:
        edit.undo(self.lm)
        earlier = self.history.fingerprint_of(self.lm.edits)
        same = earlier == self.change(f"undo: {edit.fact.prompt} … {edit.target}").fingerprint
        return "Undone." + (" The weights are bit for bit those before the edit." if same else "")

    def loaded(self, edit: Edit, code: str) -> None:
        """List an edit that a file brought, and ask again."""
        self.history.know(edit, code)
        self.change(f"load: {edit.fact.prompt} … {edit.target}")

    def change(self, title: str, **parts: object) -> Step:
        """Keep a change of the edits in force as a step, then ask again; a stop meanwhile leaves it without answers."""
        number = self.record(title, **parts).number
        self.list_edits()
        return self.history.revise(number, probe=self.probe, look=self.compare())

    def run_report(self) -> str:
        """Write the report of what the fields name, and give it to the browser."""
        request = self.typed()
        name = "-".join(re.findall(r"\w+", f"{request.fact.prompt} {request.target}".lower()))[-60:].strip("-")
        with self.lm.overlay.only([]):
            given = {
                "layer": request.layer,
                "hparams": request.settings,
                "tokens": request.tokens,
                "method": request.method,
            }
            path = free_path(Path(self.folder).expanduser(), f"report-{name}", ".html")
            report(self.lm, request.fact, request.target or None, path, samples=self.samples, tell=self.tell, **given)
        self.status.send_file(path.name, "text/html", path.read_bytes())
        return f"Written: {path}, of the model without the edits in force; your browser has it, too."

    # What is shown

    def typed(self) -> EditRequest:
        """What the fields say; the object of a fact that is not embedded is what the model says without edits.

        Raises: ValueError: they name no fact, or the prompt is too long.
        """
        tokens = len(self.lm.tokenizer(self.form.prompt.value)["input_ids"])
        self.tell(f"Reading the prompt of {tokens} tokens …", 0.0)
        self.lm.check_length(tokens, "The prompt")
        self.begun_with = self.words()
        with self.lm.overlay.only([]):
            return self.form.request()

    def ask(self, request: EditRequest) -> None:
        """Take the request as what is asked about from now on, and ask the model without edits."""
        self.tell("Asking the model …", 0.0)
        fact = request.fact
        with self.lm.overlay.only([]):
            probe = probe_of(self.lm, fact, request.target or fact.object)
            self.probe = replace(probe, **self.form.questions(fact))
            self.original = look_at(self.lm, self.probe)

    def compare(self) -> Look | None:
        """Show what the model says now beside what it says without any edit, where something was asked."""
        if self.probe is None:
            return None
        edits = self.lm.edits
        now = look_at(self.lm, self.probe) if edits else self.original
        looks = {"Original model, no edits": self.original}
        if edits:
            looks[f"Now, with {edits_named(edits)}"] = now
        self.result.html = compared_page(self.probe, looks, "trace")
        self.shown_of[self.answers] = self.about(self.answers, self.begun_with)
        return now

    def ask_row(self, name: str, row: str) -> None:
        """Trace the question that was clicked."""
        if self.probe and row.isdecimal() and int(row) < len(self.probe.questions):
            self.start(partial(self.run_trace, self.probe.questions[int(row)]), self.status)

    def words(self) -> tuple[str, ...]:
        """What the fields say of the fact, as they are now."""
        return (*self.form.wording(), self.form.target.value.strip())

    def about(self, place: w.Widget, words: tuple[str, ...]) -> tuple[str, ...]:
        """What `place` depends on, of such words; answers also on the edits in force, which a picture names."""
        return (*words, *(edit.digest for edit in self.lm.edits)) if place is self.answers else words[:2]

    def mark(self) -> None:
        """Grey out what belongs to another fact than the fields name, or to other edits than are in force."""
        words = self.words()
        for place, about in self.shown_of.items():
            stale = about != self.about(place, words) and (place is not self.view.box or self.view.traces)
            (place.add_class if stale else place.remove_class)("rl-stale")

    def list_edits(self) -> None:
        rows = [w.HTML(f"<b>{counted(self.lm.edits).capitalize()} in force</b>")]
        for edit in self.lm.edits:
            label = w.HTML(html.escape(f"{edit.fact.prompt} … {edit.target} ({layers_in_words(edit.layers)})"))
            label.add_class("rl-text")
            undo = w.Button(description="Undo")
            undo.on_click(lambda _, edit=edit: self.start(partial(self.undo, edit), self.edits_line))
            save = w.Button(description="Save")
            save.on_click(lambda _, edit=edit: self.start(partial(self.saved.save, edit), self.edits_line))
            rows.append(row([label, undo, save]))
        self.edits.children = rows
