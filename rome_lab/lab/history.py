"""What was done in a panel, step by step, and each step as code that runs.

Step       a trace, an edit, an undo or a load, with what the model said then
History    all steps on one model; `code(step)` does a step again in a notebook
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from rome_lab.editing import Edit, EditSettings
from rome_lab.facts import Fact
from rome_lab.lab.looks import Look, Probe
from rome_lab.lab.trace_form import TraceRequest
from rome_lab.lab.trials import EditRequest
from rome_lab.models import LanguageModel
from rome_lab.tracing import Trace

START = "import rome_lab as rl\n\n# lm is the model of the panel: lm = rl.load_model({name!r})\n"


@dataclass(frozen=True, eq=False)
class Step:
    """One thing that was done.

    Attributes:
        number: from 1.
        title: what it was, in a line.
        edits: in force when it had been done.
        fingerprint: of the weights then.
        traces: what was traced.
        request: what was to be traced.
        probe, look: the questions, and what the model answered then.
        action: the code that does it, between those of the edits in force before.
        before: the edits in force when it was done.
    """

    number: int
    title: str
    edits: tuple[Edit, ...]
    fingerprint: str
    traces: tuple[Trace, ...] = ()
    request: TraceRequest | None = None
    probe: Probe | None = None
    look: Look | None = None
    action: str = ""
    before: tuple[Edit, ...] = ()


class History:
    """The steps that were done on one model.

    Attributes:
        origins: by the digest of an edit, the code that makes it and the edits that were in force then.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.steps: list[Step] = []
        self.origins: dict[str, tuple[str, tuple[Edit, ...]]] = {}

    def add(self, title: str, **parts: object) -> Step:
        """A step more, done with the edits that are in force now."""
        step = Step(len(self.steps) + 1, title, tuple(self.lm.edits), self.lm.fingerprint(), **parts)
        self.steps.append(step)
        return step

    def fingerprint_of(self, edits: Sequence[Edit]) -> str | None:
        """Of the weights when exactly these edits were in force before; None where they never were."""
        digests = [edit.digest for edit in edits]
        same = (step for step in self.steps if [edit.digest for edit in step.edits] == digests)
        return next((step.fingerprint for step in same), None)

    def revise(self, number: int, **parts: object) -> Step:
        """The step with other parts, which takes its own place."""
        step = self.steps[number - 1] = replace(self.steps[number - 1], **parts)
        return step

    def like(self, traces: Sequence[Trace], request: TraceRequest, edits: Sequence[Edit]) -> Step | None:
        """The latest step that traced the same prompt, the same being asked for, with other edits in force."""
        now = [edit.digest for edit in edits]
        for step in reversed(self.steps):
            alike = step.request == request and [subject_place(x) for x in step.traces] == [
                subject_place(x) for x in traces
            ]
            if alike and [edit.digest for edit in step.edits] != now:
                return step
        return None

    def know(self, edit: Edit, code: str, before: Iterable[Edit] = ()) -> None:
        """Keep how an edit is made."""
        self.origins.setdefault(edit.digest, (code, tuple(before)))

    def code(self, step: Step) -> str:
        """The step as code: with the model as `lm` it gives `trace`, `traces` or an edit, whatever is in force now."""
        names: dict[str, str] = {}
        lines = [START.format(name=self.lm.name)]
        for edit in step.before if step.action else step.edits:
            self.write(edit, names, lines)
        if step.action:
            lines.append(f"with lm.overlay.only([{listed(step.before, names)}]):\n{indented(step.action)}")
        else:
            lines.append(f"lm.overlay.put([{listed(step.edits, names)}])  # exactly these are in force from here on")
        return "\n".join(lines) + "\n"

    def write(self, edit: Edit, names: dict[str, str], lines: list[str]) -> None:
        """Add the lines that make an edit, and before them those of the edits that were in force when it was made."""
        if edit.digest in names:
            return
        text, before = self.origins.get(edit.digest, (in_force(edit), None))
        for other in before or ():
            self.write(other, names, lines)
        name = names[edit.digest] = f"edit_{len(names) + 1}"
        if before is None:
            lines.append(f"{name} = {text}")
        else:
            lines.append(f"with lm.overlay.only([{listed(before, names)}]):\n{indented(f'{name} = {text}')}")


def subject_place(trace: Trace) -> tuple[object, ...]:
    """The prompt of a trace, and where the subject stands in it."""
    return (trace.prompt, trace.subject_range, trace.kind)


def counted(edits: Sequence[Edit]) -> str:
    """How many edits: "no edits", "1 edit", "2 edits"."""
    return f"{len(edits) or 'no'} edit{'' if len(edits) == 1 else 's'}"


def edits_named(edits: Sequence[Edit]) -> str:
    """How many edits, and what they make the model say: "2 edits: Rome; Tokyo"."""
    targets = textwrap.shorten("; ".join(edit.target for edit in edits), 40, placeholder=" …")
    return counted(edits) + (f": {targets}" if edits else "")


def listed(edits: Iterable[Edit], names: dict[str, str]) -> str:
    return ", ".join(names[edit.digest] for edit in edits)


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def in_force(edit: Edit) -> str:
    """The code for an edit that came from elsewhere: it is taken from the model."""
    return f"next(x for x in lm.edits if x.digest.startswith({edit.digest[:12]!r}))  # {edit.target}: made outside the panel"


def fact_code(fact: Fact) -> str:
    """A fact as code; what it has by default is left out."""
    parts = [repr(fact.subject), repr(fact.template), repr(fact.object)]
    if fact.relation is not None:
        parts.append(f"relation={fact.relation!r}")
    if fact.templates:
        parts.append(f"templates={fact.templates!r}")
    return f"rl.Fact({', '.join(parts)})"


def settings_code(settings: EditSettings) -> str:
    """Settings as code; what they have by default is left out."""
    default = EditSettings()
    names = [field.name for field in fields(settings) if getattr(settings, field.name) != getattr(default, field.name)]
    return f"rl.editing.EditSettings({', '.join(f'{name}={getattr(settings, name)!r}' for name in names)})"


def edit_code(request: EditRequest, layers: Sequence[int]) -> str:
    """The code that makes an edit of these layers anew."""
    settings = [f"    hparams={settings_code(request.settings or EditSettings())},", f"    tokens={request.tokens},"]
    fact, target = fact_code(request.fact), repr(request.target)
    if request.method == "rome":
        lines = [f"    {fact},", f"    {target},", f"    {layers[-1]},"]
    else:
        lines = [f"    [({fact}, {target})],", f"    {tuple(layers)},"]
    return "\n".join([f"rl.{request.method}(", "    lm,", *lines, *settings, ")"])
