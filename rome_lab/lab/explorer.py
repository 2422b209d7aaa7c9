"""Traces chosen by hand: `explore` opens an `Explorer`, on which the editing panel is built.

What takes longer than a moment runs as a `Job`, so that the kernel goes on hearing the Stop button.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import ipywidgets as w

from rome_lab.facts import Fact
from rome_lab.lab.history import History, Step, edits_named
from rome_lab.lab.history_view import HistoryView
from rome_lab.lab.jobs import Job, Stopped, check_idle, sentence, stop_when_interrupted, wait_for_job
from rome_lab.lab.live import StatusLine, placed, row
from rome_lab.lab.pictured import TraceView
from rome_lab.lab.plots import TITLES
from rome_lab.lab.trace_form import TraceForm
from rome_lab.lab.typed_facts import fact_of
from rome_lab.models import LanguageModel
from rome_lab.tracing import Trace


def explore(lm: LanguageModel, prompt: str | Fact, subject: str | None = None, samples: int = 10) -> Explorer:
    """A panel that traces one prompt as one picks: what is restored, the corruption, the direction, the metric, and heads.

    At first all is as the paper has it. Each trace is kept as a step, which can be shown beside another one, and as code.

    Args:
        prompt, subject: as in `causal_trace`; what the model says is followed.
        samples: of the noise.

    Returns: a widget; its `trace` is the one made last, in the metric that is shown.

    Raises: ValueError: the subject is missing or not in the prompt; the prompt is too long.
    """
    if not isinstance(prompt, Fact):
        prompt = fact_of(lm, subject or "", prompt)
    return Explorer(lm, prompt, samples)


class Explorer:
    """The panel that `explore` returns: fields, buttons, a trace to point at, and the history of what was traced."""

    def __init__(self, lm: LanguageModel, fact: Fact, samples: int = 10) -> None:
        self.fact = fact
        lm.check_length(len(lm.tokenizer(fact.prompt)["input_ids"]), "The prompt")
        self.take_over(lm, samples)
        self.form = TraceForm()
        self.view = TraceView(
            lm, None, self.revised, "<b>Trace</b> shows here which parts of the model recall the fact."
        )
        self.history = History(lm)
        self.history_view = HistoryView(self.history)
        fields = w.VBox(self.form.trace_fields())
        fields.add_class("rl-fields")
        left = placed("rl-left", [fields, row([self.trace_button, self.stop_button]), self.status])
        top = w.HBox([left, placed("rl-right", [self.view.box, self.view.metrics.widget])])
        top.add_class("rl-columns")
        self.history_view.widget.add_class("rl-part")
        self.widget = placed("rl-edit", [top, self.history_view.widget])
        self.status.say(f"{fact.prompt} … Choose how to trace it; then Trace.", "busy")

    def take_over(self, lm: LanguageModel, samples: int) -> None:
        """Stop what is being done on the model, and make the buttons that every panel has."""
        self.lm, self.samples = lm, samples
        self.stop()
        wait_for_job(lm)
        stop_when_interrupted()
        self.status, self.buttons = StatusLine(gate=True), []
        self.line = self.status
        self.status.add_class("rl-status")
        self.trace_button = self.button("Trace", self.run_trace, self.status)
        self.trace_button.add_class("rl-go-trace")
        self.stop_button = w.Button(description="Stop", disabled=True, tooltip="Leave the model as it was")
        self.stop_button.button_style = "danger"
        self.stop_button.on_click(lambda _: self.stop())

    def _repr_mimebundle_(self, **options: object) -> dict[str, object]:
        return self.widget._repr_mimebundle_(**options)

    @property
    def trace(self) -> Trace | None:
        """The trace that was made last, the first of several kinds."""
        return self.view.traces[0] if self.view.traces else None

    def button(self, name: str, action: Callable[[], str], line: StatusLine) -> w.Button:
        """A button that starts `action`, which returns what to say, on `line`, when it has ended."""
        button = w.Button(description=name)
        button.on_click(lambda _: self.start(action, line))
        self.buttons.append(button)
        return button

    def lines(self) -> tuple[StatusLine, ...]:
        """All the places where it speaks."""
        return (self.status,)

    def start(self, action: Callable[[], str], line: StatusLine) -> None:
        """Do it beside the kernel, and speak on `line`; a second click while it runs changes nothing."""
        if not self.stop_button.disabled:
            return
        try:
            check_idle(self.lm)
        except RuntimeError as error:  # of another panel
            return line.say(str(error), "error")
        for other in self.lines():
            other.say("", "busy")
        self.line, self.in_force = line, self.lm.edits
        self.busy(True)
        Job(self.lm, action, self.ended)

    def stop(self) -> None:
        """Stop what is being done on the model."""
        if job := Job.of(self.lm):
            job.stop()

    def ended(self, result: str | Exception, notes: list[str]) -> None:
        self.settled()
        now = [f"In force now: {edits_named(self.lm.edits)}."] * (self.lm.edits != self.in_force)
        if isinstance(result, Stopped):
            unchanged = "" if now else ": the edits in force are those that were"
            self.line.say(f"Stopped. Nothing is half done{unchanged}.", "warning", now)
        elif isinstance(result, Exception):
            self.line.say(sentence(result), "error", now)
        else:
            self.line.say(result, "done", [sentence(ValueError(note)) for note in notes])
        self.busy(False)
        self.view.restore()

    def settled(self) -> None:
        """Show what is so once a job has ended."""

    def busy(self, on: bool) -> None:
        self.stop_button.disabled = not on
        for control in self.buttons:
            control.disabled = on
        self.view.metrics.offer(() if on else self.view.traces)

    def tell(self, doing: str, done: float) -> None:
        self.line.progress(doing, done)

    def run_trace(self) -> str:
        return self.trace_fact(self.fact, None)

    def trace_fact(self, fact: Fact, answer: str | None) -> str:
        """Trace a fact as the fields say, draw it and keep it as a step; returns what to say of it."""
        self.tell("Reading the fields …", 0.0)
        with self.lm.overlay.only([]):
            request = self.form.trace_request(self.lm, fact, self.samples, answer)
        self.view.work_on(fact)
        complete = request.traces(self.lm, fact, partial(self.grow, len(request.kinds)))
        traces = tuple(self.view.metrics.of(complete))
        before = tuple(self.lm.edits)
        earlier = self.history.like(traces, request, before)
        names = ", ".join([*(TITLES[x.label].split()[0] for x in traces), *request.departures])
        title = f"trace ({names}) of {fact.prompt} …{traces[0].answer}"
        step = self.record(title, traces=traces, request=request, before=before, action=request.code(traces))
        suggested = self.view.draw(step, earlier)
        beside = f" Beside it, as it was in step {earlier.number}." if earlier else ""
        return f"Traced the answer {traces[0].answer.strip()!r}.{suggested}{beside}"

    def grow(self, kinds: int, complete: list[Trace], part: Trace) -> None:
        """Show how far the trace has come."""
        rows, total = self.view.grow(complete, part), len(part.tokens)
        which = f" ({len(complete) + 1} of {kinds} kinds)" if kinds > 1 else ""
        self.tell(f"Traced {rows} of {total} tokens{which}", (len(complete) + rows / total) / kinds)

    def revised(self, number: int, traces: tuple[Trace, ...]) -> None:
        """Keep the metric in which a step is shown."""
        request = self.history.steps[number - 1].request
        self.history.revise(number, traces=traces, action=request.code(traces))
        self.history_view.show()

    def record(self, title: str, **parts: object) -> Step:
        step = self.history.add(title, **parts)
        self.history_view.list_steps()
        return step
