"""The history of a panel as a part of it: `HistoryView` shows any two steps side by side, and any step as code."""

from __future__ import annotations

import html

import ipywidgets as w

from rome_lab.lab.history import History, Step
from rome_lab.lab.interactive import TracePicture
from rome_lab.lab.live import LiveText, row
from rome_lab.lab.page import compared_page
from rome_lab.lab.pictured import heads_picture
from rome_lab.lab.plots import trace_title


class HistoryView:
    """Two lists of steps; below them the chosen ones, side by side, and the code of the first."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.first, self.second = w.Dropdown(description="Show step"), w.Dropdown(description="beside")
        self.shown = w.VBox()
        self.first.tooltip, self.second.tooltip = "Show this step, and it as code", "A second step, side by side"
        for field in (self.first, self.second):
            field.style.description_width = "70px"
            field.add_class("rl-wide")
        self.widget = w.VBox([w.HTML("<b>History</b>"), row([self.first, self.second]), self.shown])
        self.list_steps()
        for field in (self.first, self.second):
            field.observe(lambda _: self.show(), "value")

    def list_steps(self) -> None:
        """Offer all steps, the latest first; what is chosen stays."""
        options = [(f"{step.number}  {step.title}", step.number) for step in reversed(self.history.steps)]
        for field in (self.first, self.second):
            chosen = field.value or 0
            field.options = [("…", 0), *options]
            field.value = chosen

    def show(self) -> None:
        """The chosen steps: what belongs side by side in one picture or table, all else one after the other."""
        numbers = [field.value for field in (self.first, self.second) if field.value]
        steps = [self.history.steps[number - 1] for number in numbers]
        parts = [*self.traces(steps), *self.answers(steps)]
        if steps:
            code = html.escape(self.history.code(steps[0]))
            head = f'<div class="rl-busy">Step {steps[0].number} as code:</div>'
            text = f'{head}<div class="rl-code"><button data-copy="">Copy</button><pre>{code}</pre></div>'
            parts.append(LiveText(html=text))
        self.shown.children = parts

    def traces(self, steps: list[Step]) -> list[w.Widget]:
        """The traces of the steps, those of one prompt, metric and direction in one picture; heads in one of their own."""
        groups: dict[tuple[object, ...], list[tuple[Step, int]]] = {}
        for step in steps:
            for number, trace in enumerate(step.traces):
                like = (trace.kind == "head", trace.metric, trace.direction, trace.prompt, *trace.tokens)
                groups.setdefault(like, []).append((step, number))
        pictures = []
        for members in groups.values():
            traces = [step.traces[number] for step, number in members]
            titles = [f"{trace_title(step.traces[number])}, step {step.number}" for step, number in members]
            if traces[0].kind == "head":
                pictures.append(heads_picture(traces, titles))
                continue
            pictures.append(TracePicture(traces, self.history.lm, titles, [step.edits for step, _ in members]))
        return pictures

    def answers(self, steps: list[Step]) -> list[w.Widget]:
        """What the model said at the steps."""
        looks = [step for step in steps if step.look]
        if len(looks) == 2 and looks[0].probe.same_as(looks[1].probe):
            pages = [compared_page(looks[0].probe, {f"Step {step.number}: {step.title}": step.look for step in looks})]
        else:
            pages = [compared_page(step.probe, {f"Step {step.number}: {step.title}": step.look}) for step in looks]
        return [LiveText(html=page) for page in pages]
