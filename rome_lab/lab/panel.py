"""The editing panel: its rooms put together, and what its buttons do.

Panel    a form, a trace to point at, what the model says before and after, the edits in force, files, the history

What takes longer than a moment runs as a `Job`, so that the kernel goes on hearing the Stop button.
"""

from __future__ import annotations

import base64
import html
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar
from weakref import WeakKeyDictionary, ref

import ipywidgets as w
import numpy as np
import traitlets

from rome_lab.editing import Edit, check_requests, default_settings
from rome_lab.facts import Fact
from rome_lab.lab.compared import HistoryView
from rome_lab.lab.form import EditForm
from rome_lab.lab.history import History, Step, edit_code, trace_code
from rome_lab.lab.interactive import TracePicture
from rome_lab.lab.jobs import Job, Stopped, check_idle, stop_when_interrupted, wait_for_job
from rome_lab.lab.live import LiveText, StatusLine
from rome_lab.lab.looks import Look, Probe, look_at, probe_of
from rome_lab.lab.page import compared_page
from rome_lab.lab.plots import TITLES
from rome_lab.lab.reporting import report
from rome_lab.lab.saved import SavedEdits
from rome_lab.lab.trials import EditRequest, make_edit
from rome_lab.models import LanguageModel
from rome_lab.tracing import Trace, causal_trace

HINT = "<b>Trace</b> shows here in which layers the MLPs recall the fact. <b>Edit</b> needs no trace."
OPERATION = re.compile(r"^(rome|causal_trace|comparison|load_edit|apply|undo|save_pretrained|report|show|edits): ")
BETWEEN_PICTURES = 0.5  # seconds, at least, while a trace grows


class Panel:
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
        self.lm, self.first_request, self.folder, self.samples = lm, request, folder, samples
        self.stop()
        wait_for_job(lm)
        stop_when_interrupted()
        self.status, self.edits_line = StatusLine(gate=True), StatusLine()
        self.line = self.status
        self.form = EditForm(lm, request, lambda error: self.status.say(sentence(error), "error"))
        self.traces: tuple[Trace, ...] = ()
        self.map: TracePicture | None = None
        self.drawn, self.best = 0.0, 0  # when the picture was; the layer that a trace suggests
        self.probe: Probe | None = None
        self.original: Look | None = None
        self.shown_of: dict[w.Widget, tuple[str, ...]] = {}
        old = self.latest.get(lm, lambda: None)()
        same = old is not None and old.first_request == request
        self.history = old.history if same else History(lm)
        self.build()
        if same:
            self.form.take(old.form)
        if not same:
            self.record("the model at first")
        self.latest[lm] = ref(self)
        self.list_edits()
        self.status.say("Choose a fact or type one; then Trace or Edit.", "busy")

    @property
    def trace(self) -> Trace | None:
        """The trace that was made last, the first of several kinds."""
        return self.traces[0] if self.traces else None

    def build(self) -> None:
        """Make the widgets and put them in their places."""
        form, self.buttons = self.form, []
        self.trace_button = self.button("Trace", self.run_trace, self.status)
        self.edit_button = self.button("Edit", self.run_edit, self.status)
        self.stop_button = w.Button(description="Stop", disabled=True, tooltip="Leave the model as it was")
        self.stop_button.on_click(lambda _: self.stop())
        self.report_button = self.button("Report", self.run_report, self.status)
        self.report_button.tooltip = "A page about this fact and edit, as one file to keep or to send"
        self.edit_button.button_style, self.stop_button.button_style = "primary", "danger"
        self.layer_button = w.Button(layout=w.Layout(display="none"))
        self.layer_button.on_click(lambda _: self.choose_best())
        self.picture = placed("rl-picture", [LiveText(html=HINT)])
        self.picture.children[0].add_class("rl-hint-box")
        self.result = LiveText(self.ask_row)
        self.answers = placed("rl-answers-box", [self.result])
        self.edits = w.VBox()
        self.saved = SavedEdits(self.lm, self.folder, self.button, self.loaded)
        self.history_view = HistoryView(self.history)
        self.status.add_class("rl-status")
        self.trace_button.add_class("rl-go-trace")
        self.edit_button.add_class("rl-go-edit")
        buttons = row([self.trace_button, self.edit_button, self.stop_button, self.report_button])
        left = placed("rl-left", [form.widget, buttons, self.status])
        right = placed("rl-right", [self.picture, row([self.layer_button])])
        top = w.HBox([left, right])
        top.add_class("rl-columns")
        parts = (w.VBox([self.edits, self.edits_line]), self.saved.widget, self.history_view.widget)
        for part in parts:
            part.add_class("rl-part")
        for box in self.saved.widget.children[:2]:
            box.add_class("rl-row")
        self.widget = placed("rl-edit", [top, self.answers, *parts])
        for field in (form.subject, form.prompt, form.target, form.layer):
            field.observe(lambda _: self.mark(), "value")

    def button(self, name: str, action: Callable[[], str], line: StatusLine) -> w.Button:
        """A button that starts `action`, which returns what to say, on `line`, when it has ended."""
        button = w.Button(description=name)
        button.on_click(lambda _: self.start(action, line))
        self.buttons.append(button)
        return button

    def _repr_mimebundle_(self, **options: object) -> dict[str, object]:
        return self.widget._repr_mimebundle_(**options)

    # Jobs

    def start(self, action: Callable[[], str], line: StatusLine) -> None:
        """Do it beside the kernel, and speak on `line`; a second click while it runs changes nothing."""
        if not self.stop_button.disabled:
            return
        try:
            check_idle(self.lm)
        except RuntimeError as error:  # of another panel
            return line.say(str(error), "error")
        for other in (self.status, self.edits_line, self.saved.line):
            other.say("", "busy")
        self.line = line
        self.busy(True)
        Job(self.lm, action, self.ended)

    def stop(self) -> None:
        """Stop what is being done on the model."""
        if job := Job.of(self.lm):
            job.stop()

    def ended(self, result: str | Exception, notes: list[str]) -> None:
        self.list_edits()
        if isinstance(result, Stopped):
            kept = "Stopped. Nothing is half done: the edits listed below are in force, and no others."
            self.line.say(kept, "warning")
        elif isinstance(result, Exception):
            self.line.say(sentence(result), "error")
        else:
            self.line.say(result, "done", [sentence(ValueError(note)) for note in notes])
        self.mark()
        self.busy(False)

    def busy(self, on: bool) -> None:
        self.stop_button.disabled = not on
        rows = [button for line in self.edits.children[1:] for button in line.children[1:]]
        choosers = (self.form.relation, self.form.chosen)  # they ask the model, which only the job may do
        for control in (*choosers, *self.buttons, *rows):
            control.disabled = on

    def tell(self, doing: str, done: float) -> None:
        self.line.progress(doing, done)

    # What the buttons do

    def run_trace(self, fact: Fact | None = None) -> str:
        """Trace what the fields name, or another fact of the same questions."""
        if fact is None:
            request = self.typed()
            fact = request.fact
            self.ask(request)
            self.compare()
        if self.traces and self.traces[0].prompt != fact.prompt:
            self.traces = ()
            self.picture.children = ()
        kinds, answer = self.form.restored.value, self.form.answer
        settings = {"samples": self.samples, "window": self.form.window.value, "answer": answer}
        complete: list[Trace] = []
        for kind in kinds:
            grow = partial(self.grow, complete, len(kinds))
            complete.append(causal_trace(self.lm, fact.prompt, fact.subject, kind=kind, callback=grow, **settings))
        self.traces, before = tuple(complete), tuple(self.lm.edits)
        earlier = self.history.like(complete, before)
        names = ", ".join(TITLES[x.label].split()[0] for x in complete)
        title = f"trace ({names}) of {fact.prompt} …{complete[0].answer}"
        step = self.record(title, traces=self.traces, before=before, action=trace_code(complete, answer))
        self.draw(*([earlier] if earlier else []), step)
        beside = f" Beside it, as it was in step {earlier.number}." if earlier else ""
        return f"Traced the answer {complete[0].answer.strip()!r}.{self.suggest()}{beside}"

    def run_edit(self) -> str:
        request = self.typed()
        check_requests(self.lm, [(request.fact, request.target)], request.layer)
        if self.traces and self.traces[0].prompt != request.fact.prompt:
            self.traces = ()
            self.picture.children = ()
        self.ask(request)
        before, others = self.compare(), tuple(self.lm.edits)
        edit = make_edit(self.lm, request, self.tell)
        edit.apply(self.lm)
        self.list_edits()
        after = self.compare()
        code = edit_code(request, edit.layer)
        self.history.know(edit, code, others)
        title = f"edit: {request.fact.prompt} … {edit.target}"
        self.record(title, probe=self.probe, look=after, before=others, action=f"edit = {code}")
        p = [look.table["p_target"][0] for look in (before, after)]
        started = f" (before it, with {counted(others)} in force)" if others else ""
        met = f"W_hat k* = v* holds to {edit.constraint_error:.0e}"
        best = "" if edit.converged else " v* did not converge, so this is the best so far; more steps may do better."
        return f"Edited layer {edit.layer}: P[{edit.target}] {p[0]:.3f}{started} → {p[1]:.3f}; {met}.{best}"

    def undo(self, edit: Edit) -> str:
        edit.undo(self.lm)
        self.list_edits()
        earlier = self.history.fingerprint_of(self.lm.edits)
        step = self.record(f"undo: {edit.fact.prompt} … {edit.target}", probe=self.probe, look=self.compare())
        same = earlier == step.fingerprint
        return "Undone." + (" The weights are bit for bit those before the edit." if same else "")

    def loaded(self, edit: Edit, code: str) -> None:
        """List an edit that a file brought, and ask again."""
        self.history.know(edit, code)
        self.list_edits()
        self.record(f"load: {edit.fact.prompt} … {edit.target}", probe=self.probe, look=self.compare())

    def run_report(self) -> str:
        """Write the report of what the fields name, and give it to the browser."""
        request = self.typed()
        name = "-".join(re.findall(r"\w+", request.fact.subject.lower()))
        with self.lm.overlay.only([]):
            given = {"layer": request.layer, "hparams": request.settings, "tokens": request.tokens}
            path = Path(self.folder).expanduser() / f"report-{name}.html"
            report(self.lm, request.fact, request.target or None, path, samples=self.samples, tell=self.tell, **given)
        data = base64.b64encode(path.read_bytes()).decode()
        self.status.send({"file": {"name": path.name, "type": "text/html", "data": data}})
        return f"Written: {path}, of the model without the edits in force; your browser has it, too."

    # What is shown

    def typed(self) -> EditRequest:
        """What the fields say; the object of a fact that is not embedded is what the model says without edits.

        Raises: ValueError: they name no fact, or the prompt is too long.
        """
        tokens = len(self.lm.tokenizer(self.form.prompt.value)["input_ids"])
        self.tell(f"Reading the prompt of {tokens} tokens …", 0.0)
        self.lm.check_length(tokens, "The prompt")
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
            looks[f"Now, with {counted(edits)}: {'; '.join(edit.target for edit in edits)}"] = now
        self.result.html = compared_page(self.probe, looks, "trace")
        self.shown_of[self.answers] = self.about(self.answers)
        return now

    def ask_row(self, name: str, row: str) -> None:
        """Trace the question that was clicked."""
        if self.probe and row.isdecimal() and int(row) < len(self.probe.questions):
            self.start(partial(self.run_trace, self.probe.questions[int(row)]), self.status)

    def grow(self, complete: list[Trace], kinds: int, part: Trace) -> None:
        """Show the rows that have come so far, but not more often than they can be drawn."""
        rows = int((~np.isnan(part.p_restored).all(axis=1)).sum())
        total = len(part.tokens)
        done = (len(complete) + rows / total) / kinds
        which = f" ({len(complete) + 1} of {kinds} kinds)" if kinds > 1 else ""
        self.tell(f"Traced {rows} of {total} tokens{which}", done)
        if self.map is None or not self.picture.children or time.monotonic() - self.drawn > BETWEEN_PICTURES:
            self.put([*complete, part], [tuple(self.lm.edits)] * (len(complete) + 1))

    def draw(self, *steps: Step) -> None:
        """The traces of these steps, side by side."""
        pairs = [(trace, step.edits) for step in steps for trace in step.traces]
        self.put([trace for trace, _ in pairs], [edits for _, edits in pairs])

    def put(self, traces: list[Trace], edits: list[tuple[Edit, ...]]) -> None:
        """Show traces of one prompt, each with the edits that were in force."""
        apart = len({len(x) for x in edits} | {0}) > 1
        titles = [TITLES[x.label] + f", {counted(y)}" * apart for x, y in zip(traces, edits, strict=True)]
        if self.map is None:
            self.map = TracePicture(traces, self.lm, titles, edits)
            self.map.layer = self.form.layer.value
            traitlets.link((self.map, "layer"), (self.form.layer, "value"))
        else:
            self.map.edits = edits
            self.map.put(traces, titles)
        self.drawn = time.monotonic()
        self.picture.children = (self.map,)
        self.shown_of[self.picture] = self.about(self.picture)
        self.mark()

    def suggest(self) -> str:
        """Name the layer where the MLPs of the subject's last token bring back most, and offer to take it."""
        trace = next((x for x in self.traces if x.kind == "mlp"), None)
        if trace is None:
            return ""
        self.best = int(trace.p_restored[trace.subject_range[1] - 1].argmax())
        self.layer_button.description = f"Edit layer {self.best}, the trace's peak"
        if default_settings(self.lm).layer is None:
            self.choose_best()
        self.mark()
        return f" At the subject's last token the MLPs around layer {self.best} bring back most."

    def choose_best(self) -> None:
        self.form.layer.value = self.best

    def about(self, place: w.Widget) -> tuple[str, ...]:
        """What the fields say, as far as `place` depends on it."""
        return (*self.form.wording(), self.form.target.value.strip()) if place is self.answers else self.form.wording()

    def mark(self) -> None:
        """Grey out what belongs to another fact than the fields name."""
        for place, about in self.shown_of.items():
            (place.remove_class if about == self.about(place) else place.add_class)("rl-stale")
        useful = any(x.kind == "mlp" for x in self.traces) and self.form.layer.value != self.best
        self.layer_button.layout.display = None if useful else "none"

    def record(self, title: str, **parts: object) -> Step:
        step = self.history.add(title, **parts)
        self.history_view.list_steps()
        return step

    def list_edits(self) -> None:
        rows = [w.HTML(f"<b>{counted(self.lm.edits).capitalize()} in force</b>")]
        for edit in self.lm.edits:
            label = w.HTML(html.escape(f"{edit.fact.prompt} … {edit.target} (layer {edit.layer})"))
            label.add_class("rl-text")
            undo = w.Button(description="Undo")
            undo.on_click(lambda _, edit=edit: self.start(partial(self.undo, edit), self.edits_line))
            save = w.Button(description="Save")
            save.on_click(lambda _, edit=edit: self.start(partial(self.saved.save, edit), self.edits_line))
            rows.append(row([label, undo, save]))
        self.edits.children = rows


def placed(name: str, children: list[w.Widget]) -> w.VBox:
    """A box that panel.css lays out."""
    box = w.VBox(children)
    box.add_class(name)
    return box


def row(children: list[w.Widget]) -> w.HBox:
    """Widgets side by side, in more lines where there is no room."""
    box = w.HBox(children)
    box.add_class("rl-row")
    return box


def counted(edits: tuple[Edit, ...] | list[Edit]) -> str:
    """How many edits, in words: "no edits", "1 edit", "2 edits"."""
    return f"{len(edits) or 'no'} edit{'' if len(edits) == 1 else 's'}"


def sentence(error: Exception) -> str:
    """What went wrong, in one line, without the name of the function that says so."""
    text = " ".join(str(error).split())
    if not (isinstance(error, ValueError | OSError | MemoryError) and text):
        return f"{type(error).__name__}: {text}"
    plain = OPERATION.sub("", text)
    return plain[:1].upper() + plain[1:] if plain.split()[0].isalpha() else plain  # a model's name stays as it is
