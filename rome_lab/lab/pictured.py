"""The trace as a part of the panel: `TraceView` draws it as it grows, beside an earlier one, and suggests a layer."""

from __future__ import annotations

import time
from collections.abc import Sequence

import ipywidgets as w
import numpy as np
import traitlets

from rome_lab.editing import Edit, default_settings
from rome_lab.lab.form import EditForm
from rome_lab.lab.history import Step, edits_named
from rome_lab.lab.interactive import TracePicture
from rome_lab.lab.live import LiveText
from rome_lab.lab.plots import TITLES
from rome_lab.models import LanguageModel
from rome_lab.tracing import Trace

HINT = "<b>Trace</b> shows here in which layers the MLPs recall the fact. <b>Edit</b> needs no trace."
BETWEEN_PICTURES = 0.5  # seconds, at least, while a trace grows


class TraceView:
    """The picture and, below it, the layer that the trace suggests; a click on a column of the one sets the form's layer.

    Attributes:
        traces: made last.
        map: what is drawn of them, and of earlier ones beside them.
        peak: the layer where the MLPs of the subject's last token bring back most.
    """

    def __init__(self, lm: LanguageModel, form: EditForm) -> None:
        self.lm, self.form = lm, form
        self.traces: tuple[Trace, ...] = ()
        self.map: TracePicture | None = None
        self.peak, self.drawn = 0, 0.0
        hint = LiveText(html=HINT)
        hint.add_class("rl-hint-box")
        self.box = w.VBox([hint])
        self.box.add_class("rl-picture")
        self.layer_button = w.Button(layout=w.Layout(display="none"), tooltip="Choose this layer for the edit")
        self.layer_button.on_click(lambda _: self.choose_peak())
        form.layer.observe(lambda _: self.offer_peak(), "value")

    def work_on(self, prompt: str) -> None:
        """Take away what belongs to another prompt."""
        if self.traces and self.traces[0].prompt != prompt:
            self.traces, self.box.children = (), ()
            self.offer_peak()

    def grow(self, complete: Sequence[Trace], part: Trace) -> int:
        """Show the rows that have come so far, but not more often than they can be drawn; returns how many they are."""
        if not self.box.children or time.monotonic() - self.drawn > BETWEEN_PICTURES:
            self.put([*complete, part], [tuple(self.lm.edits)] * (len(complete) + 1))
        return int((~np.isnan(part.p_restored).all(axis=1)).sum())

    def draw(self, step: Step, earlier: Step | None) -> str:
        """The traces of a step, beside those of an earlier one; returns what they suggest, as a sentence."""
        pairs = [(trace, x.edits) for x in (earlier, step) if x for trace in x.traces]
        self.traces = step.traces
        self.put([trace for trace, _ in pairs], [edits for _, edits in pairs])
        trace = next((x for x in self.traces if x.kind == "mlp"), None)
        if trace is None:
            return ""
        self.peak = int(trace.p_restored[trace.subject_range[1] - 1].argmax())
        self.layer_button.description = f"Edit layer {self.peak}, the trace's peak"
        known = default_settings(self.lm).layer if self.form.suggested is None else self.form.suggested
        if known is None and earlier is None:  # later, the layer is the user's choice
            self.choose_peak()
        self.offer_peak()
        return f" At the subject's last token the MLPs around layer {self.peak} bring back most."

    def put(self, traces: list[Trace], edits: list[tuple[Edit, ...]]) -> None:
        """Show traces of one prompt, each with the edits that were in force."""
        titles = [TITLES[x.label] + f", {edits_named(y)}" * any(edits) for x, y in zip(traces, edits, strict=True)]
        if self.map is None:
            self.map = TracePicture(traces, self.lm, titles, edits)
            self.map.layer = self.form.layer.value
            traitlets.link((self.map, "layer"), (self.form.layer, "value"))
        else:
            self.map.edits = edits
            self.map.put(traces, titles)
        self.drawn = time.monotonic()
        self.box.children = (self.map,)

    def choose_peak(self) -> None:
        self.form.layer.value = self.peak

    def offer_peak(self) -> None:
        """Show the button where it would change something."""
        useful = any(x.kind == "mlp" for x in self.traces) and self.form.layer.value != self.peak
        self.layer_button.layout.display = None if useful else "none"
