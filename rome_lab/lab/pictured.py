"""The trace as a part of the panel: `TraceView` draws it as it grows, beside an earlier one, and suggests a layer.

MetricButtons    in which metric; it needs no new run
heads_picture    traces of heads as a picture of their own
"""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Callable, Sequence

import ipywidgets as w
import numpy as np
import traitlets

from rome_lab.editing import Edit, default_settings
from rome_lab.facts import Fact
from rome_lab.lab.form import EditForm
from rome_lab.lab.history import Step, edits_named
from rome_lab.lab.interactive import TracePicture, figure_file
from rome_lab.lab.live import LiveText, row
from rome_lab.lab.plots import heatmaps, shared_limits, trace_title
from rome_lab.models import LanguageModel
from rome_lab.tracing import TRACE_METRICS, Trace

HINT = "<b>Trace</b> shows here in which layers the MLPs recall the fact. <b>Edit</b> needs no trace."
BETWEEN_PICTURES = 0.5  # seconds, at least, while a trace grows
NO_FOIL = "A logit difference is against a foil: write another object into the field Foil, and trace again."


class MetricButtons:
    """A button for each metric; those that the traces do not have are grey, with the reason beside them.

    Attributes:
        chosen: the metric that was clicked last.
    """

    def __init__(self, choose: Callable[[], None]) -> None:
        self.chosen = "probability"
        self.buttons = {x: w.Button(description=x.replace("_", " ")) for x in TRACE_METRICS}
        self.reason, self.choose = w.HTML(), choose
        for metric, button in self.buttons.items():
            button.on_click(lambda _, metric=metric: self.click(metric))
        self.reason.add_class("rl-text")
        self.widget = row([w.HTML("Metric"), *self.buttons.values(), self.reason])
        self.offer(())

    def click(self, metric: str) -> None:
        self.chosen = metric
        self.choose()

    def of(self, traces: Sequence[Trace]) -> list[Trace]:
        """The traces in the chosen metric, or in probability where one of them has no such."""
        has = all(self.chosen in ("probability", *trace.further) for trace in traces)
        metric = self.chosen if has else "probability"
        return [trace if trace.metric == metric else trace.by(metric) for trace in traces]

    def offer(self, traces: Sequence[Trace]) -> None:
        """Show which of the metrics that all these have they are in; nothing where there are none."""
        self.widget.layout.display = None if traces else "none"
        for metric, button in self.buttons.items():
            button.disabled = not all(metric in ("probability", *trace.further) for trace in traces)
            button.button_style = "primary" if traces and metric == traces[0].metric else ""
            button.tooltip = NO_FOIL if button.disabled else "Needs no new run"
        self.reason.value = NO_FOIL * any(button.disabled for button in self.buttons.values())


class TraceView:
    """The picture, the metrics, and the layer that the trace suggests; a click on a column sets the form's layer.

    Attributes:
        traces: made last, in the metric that is shown.
        map: what is drawn of them, and of earlier ones beside them.
        peak: the layer where the MLPs of the subject's last token do most.

    Args:
        form: of the panel; where there is none, no layer is suggested.
        revised: called with the traces of the step that is shown once they are in another metric.
    """

    def __init__(
        self,
        lm: LanguageModel,
        form: EditForm | None,
        revised: Callable[[int, tuple[Trace, ...]], None],
        hint: str = HINT,
    ) -> None:
        self.lm, self.form, self.revised = lm, form, revised
        self.traces: tuple[Trace, ...] = ()
        self.map: TracePicture | None = None
        self.steps: list[Step] = []
        self.growing = False
        self.peak, self.drawn = 0, 0.0
        self.hint = LiveText(html=hint)
        self.hint.add_class("rl-hint-box")
        self.box = w.VBox([self.hint])
        self.box.add_class("rl-picture")
        self.metrics = MetricButtons(self.change_metric)
        self.layer_button = w.Button(layout=w.Layout(display="none"), tooltip="Choose this layer for the edit")
        self.layer_button.on_click(lambda _: self.choose_peak())
        if form:
            form.layer.observe(lambda _: self.offer_peak(), "value")

    def work_on(self, fact: Fact) -> None:
        """Take away what belongs to another prompt, or to another subject in it."""
        if self.traces and (self.traces[0].prompt, self.traces[0].subject) != (fact.prompt, fact.subject):
            self.traces, self.box.children = (), (self.hint,)
            self.metrics.offer(())
            self.offer_peak()

    def grow(self, complete: Sequence[Trace], part: Trace) -> int:
        """Show the rows that have come so far, but not more often than they can be drawn; returns how many they are."""
        if part.kind == "head":
            return len(part.tokens)
        if self.hint in self.box.children or time.monotonic() - self.drawn > BETWEEN_PICTURES:
            self.growing = True
            self.put(self.metrics.of([*complete, part]), [tuple(self.lm.edits)] * (len(complete) + 1))
        return int((~np.isnan(part.p_restored).all(axis=1)).sum())

    def draw(self, step: Step, earlier: Step | None) -> str:
        """The traces of a step, beside those of an earlier one; returns what they suggest, as a sentence."""
        self.steps = [x for x in (earlier, step) if x]
        self.redraw()
        return self.suggest(choose=earlier is None)

    def redraw(self) -> None:
        """Draw the steps in the chosen metric."""
        self.growing = False
        pairs = [(trace, step.edits) for step in self.steps for trace in step.traces]
        traces = self.metrics.of([trace for trace, _ in pairs])
        self.traces = tuple(traces[len(traces) - len(self.steps[-1].traces) :])
        self.metrics.offer(traces)
        self.put(traces, [edits for _, edits in pairs])

    def restore(self) -> None:
        """Show again what was complete, where a trace has not come to its end."""
        if self.traces and self.growing:
            self.redraw()

    def change_metric(self) -> None:
        self.redraw()
        self.suggest(choose=False)
        self.revised(self.steps[-1].number, self.traces)

    def suggest(self, choose: bool) -> str:
        """The layer where the MLPs do most at the subject's last token, as a sentence; chosen where none is known."""
        trace = next((x for x in self.traces if x.kind == "mlp"), None)
        if trace is None:
            return ""
        needed = trace.direction == "noise"
        effect = trace.effect[trace.subject_range[1] - 1]
        self.peak = int((-effect if needed else effect).argmax())
        self.layer_button.description = f"Edit layer {self.peak}, the trace's peak"
        if self.form:
            known = default_settings(self.lm).layer if self.form.suggested is None else self.form.suggested
            if known is None and choose:  # later, the layer is the user's choice
                self.choose_peak()
        self.offer_peak()
        does = "take away most" if needed else "bring back most"
        return f" At the subject's last token the MLPs around layer {self.peak} {does}."

    def put(self, traces: list[Trace], edits: list[tuple[Edit, ...]]) -> None:
        """Show traces of one prompt, each with the edits that were in force; those of heads below the others."""
        titles = [trace_title(x) + f", {edits_named(y)}" * any(edits) for x, y in zip(traces, edits, strict=True)]
        heads = [x for x in range(len(traces)) if traces[x].kind == "head"]
        rest = [x for x in range(len(traces)) if x not in heads]
        shown, names, in_force = ([values[x] for x in rest] for values in (traces, titles, edits))
        if self.map is None:
            self.map = TracePicture(shown, self.lm, names, in_force)
            if self.form:
                self.map.layer = self.form.layer.value
                traitlets.link((self.map, "layer"), (self.form.layer, "value"))
        else:
            self.map.edits = in_force
            self.map.put(shown, names)
        self.drawn = time.monotonic()
        below = (heads_picture([traces[x] for x in heads], [titles[x] for x in heads]),) if heads else ()
        self.box.children = (self.map, *below)

    def choose_peak(self) -> None:
        self.form.layer.value = self.peak

    def offer_peak(self) -> None:
        """Show the button where it would change something."""
        useful = self.form and any(x.kind == "mlp" for x in self.traces) and self.form.layer.value != self.peak
        self.layer_button.layout.display = None if useful else "none"


def heads_picture(traces: Sequence[Trace], titles: Sequence[str]) -> LiveText:
    """Traces of heads, side by side, by layer and head."""
    png = figure_file(heatmaps(traces, shared_limits(*traces), titles), "png")
    words = f"{', '.join(titles)}: {len(traces[0].p_restored)} layers, at token {traces[0].token}"
    image = f'<img alt="{html.escape(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    picture = LiveText(html=image)
    picture.add_class("rl-heads")
    return picture
