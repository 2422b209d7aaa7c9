"""Parts of the panel that a click answers and whose words come while the kernel works: HTML with buttons of its own.

LiveText      HTML from Python; its buttons call back, and copy text
StatusLine    what is being done and how far it has come; it holds clicks back while the kernel is busy with other cells

panel.js draws them; panel.css is the look of the whole panel.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from importlib.resources import files

import anywidget
import traitlets


class LiveText(anywidget.AnyWidget):
    """HTML of the house's own making, in which `<button data-ask="name" data-value="...">` calls `answer(name, value)`."""

    html = traitlets.Unicode().tag(sync=True)
    gate = traitlets.Bool(False).tag(sync=True)
    _esm = traitlets.Unicode().tag(sync=True)
    _css = traitlets.Unicode().tag(sync=True)

    def __init__(self, answer: Callable[[str, str], None] | None = None, **traits: object) -> None:
        self.answer = answer
        super().__init__(**traits)
        self.on_msg(self.receive)

    @traitlets.default("_esm")
    def _script(self) -> str:
        return files("rome_lab.lab").joinpath("panel.js").read_text("utf-8")

    @traitlets.default("_css")
    def _style(self) -> str:
        return files("rome_lab.lab").joinpath("panel.css").read_text("utf-8")

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
