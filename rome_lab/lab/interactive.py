"""Traces that one can touch, in a notebook.

    show(trace, lm)               one trace; with a model, a click on a cell shows what its three runs say
    show([states, mlp, attn])     several traces of one prompt side by side, with one range of colours

The picture's numbers and colours come from Python, so that it agrees with `plots.heatmap`; interactive.js draws them.
Where scripts do not run, the heatmaps stand in as a PNG.
"""

from __future__ import annotations

import base64
import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import asdict

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import traitlets
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from rome_lab.base import visible
from rome_lab.editing import Edit
from rome_lab.lab.jobs import check_idle, sentence
from rome_lab.lab.live import HouseWidget
from rome_lab.lab.plots import PUT_IN, cell_table, heatmaps, metric_name, shared_limits
from rome_lab.models import LanguageModel
from rome_lab.tracing import KINDS, CellAnswers, RunAnswers, Trace, answers_at, restored_layers

COLOUR_STEPS = 512  # as many as `heatmap` tells apart
RESOLUTION = 200  # dots an inch, of the PNG that stands in
FILE_TYPES = {"png": "image/png", "pdf": "application/pdf", "csv": "text/csv"}


def show(
    trace: Trace | Sequence[Trace], lm: LanguageModel | None = None, *, titles: Sequence[str] = ()
) -> TracePicture:
    """An interactive picture of a trace, or of several traces of one prompt side by side with linked colour scales.

    Pointing at a cell, or moving there with the arrow keys, gives its numbers, and outlines what its run restores and
    which cells that can reach. A click, or Enter, asks the model for the most probable next tokens of the cell's three runs.

    Args:
        lm: the model that was traced, as it is now; without it a click shows no answers.
        titles: one for each trace, such as ("before the edit", "after it"); by default what is restored.

    Returns: a widget; its traits `selected`, (token, layer), and `layer` follow the clicks and can be observed and set.

    Raises:
        TypeError: what is given is no Trace, or no LanguageModel.
        ValueError: no trace at all, traces of different prompts, tokens or metrics, or another number of titles.
    """
    traces = (trace,) if isinstance(trace, Trace) else tuple(trace) if isinstance(trace, Sequence) else (trace,)
    check_traces(traces)
    if lm is not None and not isinstance(lm, LanguageModel):
        raise TypeError(f"show: the model is a {type(lm).__name__}; give the LanguageModel that was traced, or None.")
    if titles and len(titles) != len(traces):
        raise ValueError(
            f"show: there are {len(titles)} titles and {len(traces)} traces; give a title for each, or none."
        )
    return TracePicture(traces, lm, titles)


def check_traces(traces: Sequence[Trace]) -> None:
    """Raise where these are not traces of one prompt that can stand side by side."""
    if not traces:
        raise ValueError("show: there is no trace in the list; give causal_trace(...), or a list of several.")
    for trace in traces:
        if not isinstance(trace, Trace):
            raise TypeError(f"show: given is a {type(trace).__name__}; expected a Trace, which causal_trace returns.")
        if trace.label not in KINDS or trace.p_restored.shape[:-1] != (len(trace.tokens),):
            raise ValueError(
                f"show: traces of kind {trace.label!r} cannot be touched; expected {', '.join(KINDS)}. plots.heatmap(trace) "
                "draws heads."
            )
        if np.isnan(trace.p_restored).all():
            raise ValueError("show: the trace has no restored runs; restore at least one token.")
    first = traces[0]
    for other in traces[1:]:
        if other.prompt != first.prompt:
            raise ValueError(
                f"show: the traces are of different prompts, {first.prompt!r} and {other.prompt!r}; show each by itself."
            )
        if other.metric != first.metric:
            raise ValueError(
                f"show: the traces are in different metrics, {first.metric} and {other.metric}, which one range of colours "
                "cannot hold; show each by itself, or take trace.by(metric)."
            )
        if other.tokens != first.tokens:
            raise ValueError(
                "show: the traces cut the prompt into different tokens, as different models do; show each by itself."
            )


class TracePicture(HouseWidget):
    """The widget that `show` returns.

    Attributes:
        selected: (token, layer) of the cell that was clicked last, or None.
        layer: of that cell, or of a click on the axis of layers; marked in the picture.
        picture: what interactive.js draws.
        saves: whether it offers its picture and numbers as files.
    """

    selected = traitlets.Tuple(traitlets.Int(), traitlets.Int(), default_value=None, allow_none=True).tag(sync=True)
    layer = traitlets.Int(default_value=None, allow_none=True).tag(sync=True)
    picture = traitlets.Dict().tag(sync=True)
    saves = traitlets.Bool(True).tag(sync=True)
    drawn_by = "interactive"

    def __init__(
        self,
        traces: Sequence[Trace],
        lm: LanguageModel | None = None,
        titles: Sequence[str] = (),
        edits: Sequence[Sequence[Edit]] | None = None,
    ) -> None:
        """Args: edits: those in force in each trace; by default a click asks the model as it is now."""
        self.lm, self.edits = lm, edits
        super().__init__()
        self.put(traces, titles)
        self.on_msg(self.answer_click)

    def put(self, traces: Sequence[Trace], titles: Sequence[str] = ()) -> None:
        """Draw these traces instead."""
        self.traces, self.titles = tuple(traces), tuple(titles)
        self.picture = self.described()

    def figure(self) -> Figure:
        """The heatmaps of all traces in one figure of matplotlib, with linked colour scales."""
        return heatmaps(self.traces, shared_limits(*self.traces), self.titles)

    def png(self) -> bytes:
        """The figure, for where scripts do not run."""
        return self.file("png")

    def file(self, suffix: str) -> bytes:
        """The figure as "png" or "pdf", or its numbers, a row a cell, as "csv".

        Raises: ValueError: another suffix.
        """
        if suffix == "csv":
            names = self.titles or [trace.label for trace in self.traces]
            tables = [cell_table(trace).assign(trace=name) for name, trace in zip(names, self.traces, strict=True)]
            return pd.concat(tables).to_csv(index=False, lineterminator="\n").encode()
        if suffix not in FILE_TYPES:
            raise ValueError(f"show: a picture is saved as {', '.join(FILE_TYPES)}; given is {suffix!r}.")
        return figure_file(self.figure(), suffix)

    def answers(self, token: int, layer: int, trace: int = 0) -> CellAnswers:
        """What the three runs of a cell say, see `answers_at`; of which trace, where there are several.

        Raises:
            ValueError: there is no model, no such trace or cell, or the trace is not of the model as it is now.
            RuntimeError: the model is busy.
        """
        if self.lm is None:
            raise ValueError("show: this picture has no model to ask; write rl.show(trace, lm).")
        if trace not in range(len(self.traces)):
            raise ValueError(f"show: there is no trace {trace!r}; there are {len(self.traces)}, counted from 0.")
        check_idle(self.lm)
        with contextlib.nullcontext() if self.edits is None else self.lm.overlay.only(self.edits[trace]):
            return answers_at(self.lm, self.traces[trace], token, layer)

    def answer_click(self, widget: TracePicture, message: object, buffers: object) -> None:
        """Answer the browser's {"ask": "answers", "trace", "token", "layer"} with the runs, or with a sentence.

        {"ask": "file", "suffix"} is answered with the file.
        """
        if isinstance(message, dict) and message.get("ask") == "file" and message.get("suffix") in FILE_TYPES:
            suffix = message["suffix"]
            name = "-".join(re.findall(r"\w+", self.traces[0].subject.lower())) or "trace"
            return self.send_file(f"trace-{name}.{suffix}", FILE_TYPES[suffix], self.file(suffix))
        if not isinstance(message, dict) or message.get("ask") != "answers":
            return
        cell = {name: message.get(name) for name in ("trace", "token", "layer")}
        try:
            self.send(cell | {"answers": for_browser(self.answers(cell["token"], cell["layer"], cell["trace"]))})
        except (ValueError, RuntimeError, MemoryError) as error:
            self.send(cell | {"error": sentence(error)})

    def described(self) -> dict[str, object]:
        """All that the browser draws."""
        axes = self.figure().axes[: len(self.traces)]  # those of the colour bars follow
        return {
            "prompt": self.traces[0].prompt,
            "tokens": [drawn(token) for token in self.traces[0].tokens],
            "traces": [picture_of(*pair) for pair in zip(self.traces, axes, strict=True)],
            "has_model": self.lm is not None,
        }

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(trace.label for trace in self.traces))
        return f"TracePicture({self.traces[0].prompt!r}, {kinds})"

    def _repr_mimebundle_(self, **options: object) -> tuple[dict[str, object], dict[str, object]]:
        data, metadata = super()._repr_mimebundle_(**options)
        still = base64.b64encode(self.png()).decode()
        return data | {"image/png": still}, metadata


def figure_file(figure: Figure, suffix: str) -> bytes:
    """A figure as "png" or "pdf"."""
    picture = io.BytesIO()
    with plt.rc_context({"savefig.bbox": "tight", "savefig.pad_inches": 0.02}):
        figure.savefig(picture, format=suffix, dpi=RESOLUTION)
    return picture.getvalue()


def picture_of(trace: Trace, ax: Axes) -> dict[str, object]:
    """One trace for the browser; the colours are read from its heatmap in `ax`."""
    mesh, readings = ax.collections[0], trace.read()
    low, high = mesh.get_clim()
    return {
        "kind": trace.kind,
        "title": ax.get_title(),
        "layer_label": ax.get_xlabel(),
        "answer": drawn(trace.answer.strip() or trace.answer),
        "subject": list(trace.subject_range),
        "metric": metric_name(trace).replace(r"\$", "$"),  # its words are drawn already
        "done": PUT_IN[trace.direction],
        "names": names_of(trace),
        "p_clean": readings.clean,
        "p_corrupted": readings.corrupted,
        "base": trace.base,
        "samples": trace.samples,
        "p": [[p if np.isfinite(p) else None for p in row] for row in readings.restored.tolist()],
        "layers": [list(ends) for ends in restored_layers(trace)],
        "limits": [low, high],
        "colours": [to_hex(colour) for colour in mesh.cmap(np.arange(COLOUR_STEPS))],
    }


def names_of(trace: Trace) -> list[str]:
    """What the browser calls the number in a cell, how far it is from the run that is gone from, and those of both runs."""
    if trace.direction == "noise":  # into a clean run a corrupted piece is put
        return ["with this corrupted", "change", "clean", "corrupted"]
    if trace.metric == "probability":
        return ["p_restored", "indirect effect", "p_clean", "p_corrupted"]
    return ["restored", "effect", "clean", "corrupted"]


def for_browser(cell: CellAnswers) -> dict[str, object]:
    """The three runs, with tokens as they are drawn."""

    def run(answers: RunAnswers) -> dict[str, object]:
        return asdict(answers) | {"top": [[drawn(token.strip() or token), p] for token, p in answers.top]}

    return {name: run(getattr(cell, name)) for name in ("clean", "corrupted", "restored")}


def drawn(token: str) -> str:
    """A token's text as the browser shows it, where a dollar sign begins no mathematics."""
    return visible(token).replace(r"\$", "$")
