"""The page that `report` writes, drawn from what it found: everything in one file, report.html filled in.

Findings, Edited      what there is to say
page_of(lm, findings) the page; all that a model or a user wrote is escaped by the template
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rome_lab.base import package_versions, visible
from rome_lab.editing import Edit, layers_in_words
from rome_lab.lab.history import fact_code, settings_code
from rome_lab.lab.interactive import TracePicture
from rome_lab.lab.looks import Look, Probe
from rome_lab.lab.page import compared_page
from rome_lab.lab.plots import TITLES, heatmaps, shared_limits
from rome_lab.models import LanguageModel
from rome_lab.tracing import CellAnswers, Trace, Traces, claims_at_fact

DRAWN = ("state", "mlp", "attn")  # the severed kinds are traced at one token only
REPORT_PACKAGES = ("rome_lab", "torch", "transformers", "numpy")
STILL_RESOLUTION = 250  # dots an inch, of the pictures that are printed


@dataclass(frozen=True, eq=False)
class Edited:
    """An edit, what the model says under it, and its audit.

    Attributes:
        method: one of `EDITORS`, by which it was made, with C measured on so many `tokens`; None where it was there already.
    """

    edit: Edit
    after: Look
    audited: pd.DataFrame
    tokens: int | None
    method: str | None


@dataclass(frozen=True, eq=False)
class Findings:
    """What there is to say about a fact.

    Attributes:
        before: what the model says, without the edit that is reported on.
        traces: of all kinds. cell: what the runs say at `strongest_of` the trace of states.
        known: whether the answer that is traced is that of the fact.
        in_force: other edits, in words.
    """

    probe: Probe
    before: Look
    traces: Traces
    cell: CellAnswers
    known: bool
    edited: Edited | None
    in_force: tuple[str, ...]


def strongest_of(trace: Trace) -> tuple[int, int]:
    """The token of the subject, and the layer, where restoring has most effect.

    The token that predicts is none of them, though the prompt may end with its subject: its state decides the answer.
    """
    begin, end = trace.subject_range
    effect = trace.indirect_effect[begin : max(begin + 1, min(end, len(trace.tokens) - 1))]
    token, layer = np.unravel_index(effect.argmax(), effect.shape)
    return begin + int(token), int(layer)


def page_of(lm: LanguageModel, findings: Findings) -> str:
    """The page as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"p": digits, "signed": difference_of, "short": short, "visible": visible}
    room = files("rome_lab.lab")
    template = environment.from_string(room.joinpath("report.html").read_text("utf-8"))
    drawn = [trace for kind in DRAWN for trace in findings.traces.of(kind)]
    picture = TracePicture(drawn)
    picture.close()  # in a notebook it would be held by the browser, which is never to show it
    return template.render(
        findings=findings,
        lm=lm,
        fact=findings.probe.fact,
        trace=drawn[0],
        word=visible(drawn[0].answer.strip() or drawn[0].answer),
        known=findings.known,
        places=[place_row(trace) for trace in drawn],
        claims=claims_at_fact(findings.traces).to_dict("records"),
        compared=compared(findings),
        changed=changed(findings),
        heads=heads_of_page(findings.traces),
        stills=[(TITLES[trace.label], still(trace, drawn)) for trace in drawn],
        style=Markup(picture._css),
        script=Markup(picture._esm.replace("export default", "const module =")),
        picture=Markup(json.dumps(picture.picture).replace("<", "\\u003c")),
        rests_on=basis(lm, findings),
        code=code_of(lm, findings),
    )


def digits(p: float) -> str:
    """Three digits after the point, and more where they would all be zero."""
    return f"{p:.3f}" if p == 0 or p >= 0.001 else f"{p:.1e}"


def difference_of(p: float) -> str:
    """A difference of probabilities, with its sign."""
    return f"{p:+.3f}".replace("-", "\u2212")


def short(x: float) -> str:
    """Three significant digits of what was measured; a dash of what was not."""
    return "\u2013" if np.isnan(x) else f"{x:.3g}"


def place_row(trace: Trace) -> dict[str, object]:
    """Where restoring one kind has most effect: in the subject, and at the prompt's last token."""
    token, layer = strongest_of(trace)
    word, last = visible(trace.tokens[token].strip()), trace.indirect_effect[-1]
    at_last = {"last_effect": float(last.max()), "last_layer": int(last.argmax())}
    effect = float(trace.indirect_effect[token, layer])
    return {"title": TITLES[trace.label], "token": word, "effect": effect, "layer": layer} | at_last


def heads_of_page(traces: Traces, n: int = 5) -> dict[str, object] | None:
    """The heatmap of the heads and the n of most effect; None where heads were not traced."""
    for trace in traces.of("head"):
        order = np.argsort(trace.indirect_effect, axis=None)[::-1][:n]
        places = zip(*np.unravel_index(order, trace.indirect_effect.shape), strict=True)
        rows = [{"layer": x, "head": y, "effect": float(trace.indirect_effect[x, y])} for x, y in places]
        return {"still": still(trace, [trace]), "rows": rows}
    return None


def compared(findings: Findings) -> Markup:
    """What the model says: by itself, or before and after the edit."""
    looks = {"Now": findings.before}
    if findings.edited:
        looks = {"Before the edit": findings.before, "After the edit": findings.edited.after}
    return Markup(compared_page(findings.probe, looks))


def changed(findings: Findings) -> dict[str, object] | None:
    """The edit in numbers."""
    if findings.edited is None:
        return None
    edit, after, audited = findings.edited.edit, findings.edited.after, findings.edited.audited
    return {
        "edit": edit,
        "p": [float(look.table["p_target"][0]) for look in (findings.before, after)],
        "follow": after.more_probable("paraphrase", "p_target"),
        "stay": after.more_probable("neighbour", "p_object"),
        "where": layers_in_words(findings.edited.edit.layers),
        "several": len(findings.edited.edit.layers) > 1,
        "size": float(audited["after"]["|dW| / |W|"]),
        "error": float(audited["after"]["constraint error"]),
        "audit": audited.reset_index().to_dict("records"),
    }


def still(trace: Trace, together: list[Trace]) -> str:
    """The heatmap as a PNG, for print and for where scripts do not run; its colours are those of the others."""
    file = io.BytesIO()
    heatmaps([trace], shared_limits(*together)).savefig(file, format="png", dpi=STILL_RESOLUTION)
    return base64.b64encode(file.getvalue()).decode()


def basis(lm: LanguageModel, findings: Findings) -> dict[str, str]:
    """What the numbers rest on."""
    trace = findings.traces[0]
    versions = package_versions(REPORT_PACKAGES)
    rows = {
        "model": f"{lm.name}, {lm.n_layers} layers, {str(lm.dtype).removeprefix('torch.')}",
        "weights": f"fingerprint {lm.identity(edited=False).fingerprint[:16]}",
        "trace": f"{trace.samples} samples of noise with standard deviation {trace.noise_std:.3g}, seed {trace.seed}; "
        f"MLP and attention outputs restored in runs of {trace.window} layers",
    }
    if findings.edited:
        edit = findings.edited.edit
        settings = edit.settings
        rows["edit"] = (
            f"{findings.edited.method or 'given'}, {layers_in_words(edit.layers)} ({edit.module}), key {settings.key!r}, "
            f"{settings.steps} steps of Adam at "
            f"{settings.learning_rate}, weight decay {settings.weight_decay}; edit {edit.digest[:12]}"
        )
    return rows | {
        "versions": ", ".join(f"{name} {version or 'from a checkout'}" for name, version in versions.items())
    }


def code_of(lm: LanguageModel, findings: Findings) -> str:
    """Python that makes the page again, but for other edits in force, which the page names."""
    trace, edited = findings.traces[0], findings.edited
    dtype = str(lm.dtype).removeprefix("torch.")
    loaded = repr(lm.name) if dtype == "float32" else f"{lm.name!r}, dtype={dtype!r}"
    lines = ["import rome_lab as rl", "", f"lm = rl.load_model({loaded})", f"fact = {fact_code(findings.probe.fact)}"]
    options = f"samples={trace.samples}, seed={trace.seed}"
    if edited and edited.method is None:
        lines.append(f'edit = rl.load_edit("...")  # the file of edit {edited.edit.digest[:12]}')
        options = f"edit, {options}"
    elif edited:
        lines.append(f"settings = {settings_code(edited.edit.settings)}")
        how = f"layer={edited.edit.layer}, hparams=settings, tokens={edited.tokens}"
        how += "" if edited.method == "rome" else f", method={edited.method!r}"
        options = f"{findings.probe.target!r}, {how}, {options}"
    return "\n".join([*lines, f"rl.report(lm, fact, {options})"])
