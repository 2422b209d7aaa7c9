"""Parts of the panel that a click answers and whose words come while the kernel works: HTML with buttons of its own.

HouseWidget   a widget drawn by a script of this room; it hands files to the browser
LiveText      HTML from Python; its buttons call back, and copy text
StatusLine    what is being done and how far it has come; it holds clicks back while the kernel is busy with other cells
row, placed   widgets side by side, and one below the other, for panel.css to lay out

panel.js draws them; panel.css is the look of the whole panel.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import ClassVar

import anywidget
import ipywidgets as w
import traitlets


class HouseWidget(anywidget.AnyWidget):
    """A widget whose script and look are files of this room, `drawn_by`.js and .css, and are sent along with it."""

    drawn_by: ClassVar[str]
    _esm = traitlets.Unicode().tag(sync=True)
    _css = traitlets.Unicode().tag(sync=True)

    @traitlets.default("_esm")
    def _script(self) -> str:
        return files("rome_lab.lab").joinpath(f"{self.drawn_by}.js").read_text("utf-8")

    @traitlets.default("_css")
    def _style(self) -> str:
        return files("rome_lab.lab").joinpath(f"{self.drawn_by}.css").read_text("utf-8")

    def send_file(self, name: str, kind: str, data: bytes) -> None:
        """Give the browser a file to keep; `kind` is its media type."""
        self.send({"file": {"name": name, "type": kind, "data": base64.b64encode(data).decode()}})


class LiveText(HouseWidget):
    """HTML of the house's own making, in which `<button data-ask="name" data-value="...">` calls `answer(name, value)`."""

    html = traitlets.Unicode().tag(sync=True)
    gate = traitlets.Bool(False).tag(sync=True)
    drawn_by = "panel"

    def __init__(self, answer: Callable[[str, str], None] | None = None, **traits: object) -> None:
        self.answer = answer
        super().__init__(**traits)
        self.on_msg(self.receive)

    def receive(self, widget: LiveText, message: object, buffers: object) -> None:
        """Answer the browser: {"ping": n} with {"pong": n}, {"ask": name, "value": text} by the callback."""
        if not isinstance(message, dict):
            return
        if "ping" in message:
            self.send({"pong": message["ping"]})
        elif self.answer and isinstance(message.get("ask"), str):
            self.answer(message["ask"], str(message.get("value", "")))


class StatusLine(LiveText):
    """One place where the panel speaks, beside the buttons that it answers.

    With `gate`, a click on a button of the panel reaches Python only once the kernel is free; until then the line says what
    the click waits for, and it can be withdrawn. Fields that were filled in before it arrive before it, too.
    """

    def say(self, text: str, kind: str = "done", notes: Sequence[str] = ()) -> None:
        """Show a sentence; kind is "done", "busy", "warning" or "error"."""
        lines = [(kind, text), *(("warning", note) for note in notes)]
        self.html = "".join(f'<div class="rl-{x}">{html.escape(line)}</div>' for x, line in lines if line)

    def progress(self, doing: str, done: float) -> None:
        """Show what is being done, and a bar from 0 to 1."""
        role = f'role="progressbar" aria-valuenow="{100 * done:.0f}" aria-valuemin="0" aria-valuemax="100"'
        bar = f'<div class="rl-progress" {role}><i style="width: {done:.1%}"></i></div>'
        self.html = f'<div class="rl-busy">{html.escape(doing)}</div>{bar}'


def placed(name: str, children: Sequence[w.Widget]) -> w.VBox:
    """A box that panel.css lays out."""
    box = w.VBox(children)
    box.add_class(name)
    return box


def row(children: Sequence[w.Widget]) -> w.HBox:
    """Widgets side by side, in more lines where there is no room."""
    box = w.HBox(children)
    box.add_class("rl-line")
    return box
