"""The interactive parts of the editing notebook.

Panel    a form, a causal trace, what the model says before and after, and the edits in force

What takes longer than a moment runs as a `Job`, so that the kernel goes on hearing the Stop button.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ipywidgets as w
from matplotlib.figure import Figure

from rome_lab.editing import Edit, check_requests, default_settings, load_edit
from rome_lab.lab.form import EditForm
from rome_lab.lab.jobs import Job, Stopped, check_idle, wait_for_job
from rome_lab.lab.looks import Look, Probe, look_at, probe_of
from rome_lab.lab.page import compared_page
from rome_lab.lab.plots import heatmap
from rome_lab.lab.trials import EditRequest, make_edit
from rome_lab.models import LanguageModel
from rome_lab.tracing import Trace, causal_trace

STATUS_COLOURS = {"done": "#1a7f37", "busy": "#57606a", "warning": "#9a6700", "error": "#cf222e"}
HINT = (
    '<div style="height: 190px; display: flex; align-items: center; justify-content: center; color: #777; '
    'border: 1px dashed #bbb">Trace shows in which layers the MLPs recall the fact.</div>'
)


class Panel:
    """Choose a fact, trace it, edit it, compare before and after, undo; save, load and export edits.

    It shows the edits in force on `lm` and works on it. Making a new panel for the same model stops what the old one
    was doing; the edits stay in force, and the new panel lists them.

    Args:
        request: what the fields say at first.
        folder: where edits and models are saved, unless the user says otherwise.
        samples: of the noise, in the causal trace.
    """

    def __init__(self, lm: LanguageModel, request: EditRequest, folder: str = "edits", samples: int = 10) -> None:
        self.lm, self.folder, self.samples = lm, folder, samples
        self.stop()
        wait_for_job(lm)
        self.form = EditForm(lm, request, lambda error: self.say(sentence(error), "error"))
        self.traced: Trace | None = None
        self.probe: Probe | None = None
        self.before: Look | None = None
        self.weights_before = ""  # their fingerprint
        self.build()
        self.list_edits()
        self.say("Choose a fact or type one; then Trace or Edit.", "busy")

    def build(self) -> None:
        """Make the widgets and put them in their places."""
        form = self.form
        self.trace_button, self.edit_button = self.button("Trace", self.trace), self.button("Edit", self.edit)
        self.stop_button = w.Button(description="Stop", disabled=True, layout=w.Layout(width="90px"))
        self.stop_button.on_click(lambda _: self.stop())
        self.edit_button.button_style, self.stop_button.button_style = "primary", "danger"
        self.bar = w.FloatProgress(value=0, min=0, max=1, layout=w.Layout(width="200px", visibility="hidden"))
        self.status, self.picture, self.result = w.HTML(), w.HTML(HINT), w.HTML()
        self.edits = w.VBox()
        self.path = w.Text(f"{self.folder}/edit.safetensors", description="Edit file")
        self.model_folder = w.Text(f"{self.folder}/model", description="Model to")
        self.load_button, self.export_button = self.button("Load", self.load), self.button("Export", self.export)
        what = [form.relation, form.chosen, form.subject, form.prompt, form.target, form.steps, form.tokens, form.key]
        form.prompt.layout.height = "54px"
        for field in (*what, form.layer, self.path, self.model_folder):
            field.style.description_width, field.layout.width = "90px", "430px"
        form.layer.observe(lambda _: self.draw(), "value")
        self.widget = w.VBox(
            [
                w.HBox([w.VBox(what), w.VBox([self.picture, form.layer])], layout=w.Layout(grid_gap="24px")),
                w.HBox([self.trace_button, self.edit_button, self.stop_button, self.bar]),
                self.status,
                self.result,
                self.edits,
                w.HBox([self.path, self.load_button]),
                w.HBox([self.model_folder, self.export_button]),
            ],
            layout=w.Layout(width="920px", grid_gap="6px", overflow="hidden"),
        )
        self.widget.add_class("rl-panel")

    def button(self, name: str, action: Callable[[], str]) -> w.Button:
        """A button that starts `action`, which returns what to say when it has ended."""
        button = w.Button(description=name, layout=w.Layout(width="90px"))
        button.on_click(lambda _: self.start(action))
        return button

    def _repr_mimebundle_(self, **options: object) -> dict[str, object]:
        return self.widget._repr_mimebundle_(**options)

    # Jobs

    def start(self, action: Callable[[], str]) -> None:
        try:
            check_idle(self.lm)
        except RuntimeError as error:  # a second click, perhaps: the buttons stay as the job that runs has set them
            return self.say(str(error), "error")
        self.say("", "busy")
        self.busy(True)
        Job(self.lm, action, self.ended)

    def stop(self) -> None:
        """Stop what is being done on the model."""
        if job := Job.of(self.lm):
            job.stop()

    def ended(self, result: str | Exception, notes: list[str]) -> None:
        self.list_edits()
        if isinstance(result, Stopped):
            self.say("Stopped. Nothing is half done: the edits listed below are in force, and no others.", "warning")
        elif isinstance(result, Exception):
            self.say(sentence(result), "error")
        else:
            self.say(result, "done", notes)
        self.busy(False)

    def busy(self, on: bool) -> None:
        self.stop_button.disabled, self.bar.layout.visibility = not on, "visible" if on else "hidden"
        rows = [button for row in self.edits.children[1:] for button in row.children[1:]]
        choosers = (self.form.relation, self.form.chosen)  # they ask the model, which only the job may do
        buttons = (self.trace_button, self.edit_button, self.load_button, self.export_button, *rows)
        for control in (*choosers, *buttons):
            control.disabled = on

    def say(self, text: str, kind: str, notes: Sequence[str] = ()) -> None:
        lines = [(kind, text), *(("warning", note) for note in notes)]
        shown = "".join(f'<div style="color: {STATUS_COLOURS[x]}">{html.escape(line)}</div>' for x, line in lines)
        self.status.value = f'<div style="line-height: 1.5; min-height: 20px">{shown}</div>'

    def tell(self, doing: str, done: float) -> None:
        self.bar.value = done
        self.say(doing, "busy")

    # What the buttons do

    def trace(self) -> str:
        request = self.form.request()
        self.ask(request)
        self.show({"Now": look_at(self.lm, self.probe)})
        self.tell("Tracing …", 0.0)
        fact = request.fact
        self.traced = causal_trace(self.lm, fact.prompt, fact.subject, kind="mlp", samples=self.samples)
        if default_settings(self.lm).layer is None:
            last = self.traced.subject_range[1] - 1
            self.form.layer.value = int(self.traced.p_restored[last].argmax())
        self.draw()
        return f"Traced the answer {self.traced.answer.strip()!r}. The slider picks the layer to edit."

    def edit(self) -> str:
        request = self.form.request()
        check_requests(self.lm, [(request.fact, request.target)], request.layer)
        self.ask(request)
        self.before, self.weights_before = look_at(self.lm, self.probe), self.lm.fingerprint()
        self.show({"Before the edit": self.before})
        edit = make_edit(self.lm, request, self.tell)
        edit.apply(self.lm)
        self.list_edits()
        p = [look.table["p_target"][0] for look in (self.before, self.compare())]
        met = f"W_hat k* = v* holds to {edit.constraint_error:.0e}"
        best = "" if edit.converged else " v* did not converge, so this is the best so far; more steps may do better."
        return f"Edited layer {edit.layer}: P[{edit.target}] {p[0]:.3f} → {p[1]:.3f}; {met}.{best}"

    def undo(self, edit: Edit) -> str:
        edit.undo(self.lm)
        self.list_edits()
        self.compare()
        same = self.before and self.lm.fingerprint() == self.weights_before
        return "Undone." + (" The weights are bit for bit those before the edit." if same else "")

    def save(self, edit: Edit) -> str:
        words = re.sub(r"\W+", "-", f"{edit.fact.subject} {edit.target}").strip("-").lower()
        path = edit.save(Path(self.folder, f"{words}-layer-{edit.layer}-{edit.digest[:6]}.safetensors"))
        self.path.value = str(path)
        return f"Saved: {path}, {path.stat().st_size / 1024:.0f} KB."

    def load(self) -> str:
        edit = load_edit(self.path.value.strip())
        edit.apply(self.lm)
        self.list_edits()
        self.compare()
        return f"Loaded and in force: {edit}."

    def export(self) -> str:
        folder = Path(self.model_folder.value.strip()).expanduser()
        self.tell(f"Writing {folder} …", 0.0)
        self.lm.save_pretrained(folder)
        return f"Exported: {folder}, a model with {len(self.lm.edits)} edits that plain transformers loads."

    # What is shown

    def ask(self, request: EditRequest) -> None:
        """Take the request as what is asked about from now on."""
        self.tell("Asking the model …", 0.0)
        self.probe, self.before = probe_of(self.lm, request.fact, request.target or request.fact.object), None

    def compare(self) -> Look | None:
        """Show what the model says now beside what it said before the edit, where something was asked."""
        if self.probe is None:
            return None
        self.tell("Asking the model again …", 1.0)
        now = look_at(self.lm, self.probe)
        self.show({"Before the edit": self.before, "Now": now} if self.before else {"Now": now})
        return now

    def show(self, looks: dict[str, Look]) -> None:
        self.result.value = compared_page(self.probe, looks)

    def list_edits(self) -> None:
        rows = [w.HTML("<b>Edits in force</b>" if self.lm.edits else "<b>No edits in force</b>")]
        for edit in self.lm.edits:
            text = html.escape(f"{edit.fact.prompt} … {edit.target} (layer {edit.layer})")
            label = w.HTML(text, layout=w.Layout(width="720px"))
            undo, save = (self.button(x, partial(y, edit)) for x, y in (("Undo", self.undo), ("Save", self.save)))
            rows.append(w.HBox([label, undo, save]))
        self.edits.children = rows

    def draw(self) -> None:
        """The causal trace, with the chosen layer marked."""
        if self.traced is None:
            return
        figure = Figure(figsize=(4.3, 0.75 + 0.16 * len(self.traced.tokens)), layout="constrained")
        ax = heatmap(self.traced, figure.subplots())
        ax.axvline(self.form.layer.value, color="black", linewidth=1, linestyle="--")
        ax.set_title(f"{ax.get_title()}; dashed: layer {self.form.layer.value}", fontsize=7)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=220)
        data = base64.b64encode(picture.getvalue()).decode()
        self.picture.value = f'<img alt="causal trace" width="450" src="data:image/png;base64,{data}">'


def sentence(error: Exception) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"
