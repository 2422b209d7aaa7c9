"""One fact and one model on one page: `report` asks, traces and edits, and writes what came of it as a self-contained file.

The page is drawn by `rome_lab.lab.report_page`.
"""

from __future__ import annotations

import threading
from pathlib import Path

from tqdm.auto import tqdm

from rome_lab.base import Tell, check_file, check_whole, write_atomically
from rome_lab.editing import Edit, EditSettings, audit, check_requests
from rome_lab.facts import Fact, known_among
from rome_lab.lab.jobs import Job, check_idle
from rome_lab.lab.looks import Probe, look_at, probe_of
from rome_lab.lab.report_page import Edited, Findings, page_of, strongest_of
from rome_lab.lab.trials import EditRequest, make_edit
from rome_lab.models import LanguageModel, check_verified
from rome_lab.tracing import (
    KINDS,
    CellAnswers,
    Traces,
    TraceSettings,
    answers_at,
    run_clean_and_corrupted,
    trace_of_kind,
)


def report(
    lm: LanguageModel,
    fact: Fact,
    target: str | Edit | None = None,
    path: str | Path = "report.html",
    *,
    layer: int | None = None,
    hparams: EditSettings | None = None,
    tokens: int | None = None,
    method: str = "rome",
    samples: int = 10,
    seed: int = 0,
    progress: bool = True,
    tell: Tell | None = None,
) -> Path:
    """Write a page about one fact in one model, to be read in any browser, printed or sent: a single HTML file.

    It says what the model answers, where a trace finds the fact, and how that agrees with the paper's claims. With a target
    it also makes the edit and shows what the model says and writes before and after it, with its audit. Edits in force are
    taken as part of the model, and named on the page.

    Args:
        target: what the model is to say instead of the fact's object; or an Edit of this fact, in force or not.
        layer, hparams, tokens: of the edit, as in `rome`.
        method: one of `EDITORS`; those that change several layers change the ones that end at `layer`.
        samples, seed: of the trace's noise, as in `causal_trace`.
        tell: called with what is being done, in words, and how far it has come, from 0 to 1, in place of the bar.

    Returns: the path. `lm` is unchanged, whatever happens.

    Raises:
        TypeError, ValueError: no model, no Fact, or an edit that cannot be made, see `rome`.
        OSError: the file cannot be written; found before any work is done.
        RuntimeError: the panel works on the model.
    """
    path = Path(path).expanduser()
    check_report(lm, fact, path)
    given = target if isinstance(target, Edit) else None
    text = target_of(given, fact) if given else target
    if text is not None:
        check_requests(lm, [(fact, text)], layer)
        text = text.strip()
    check_whole("report", samples=(samples, 1), seed=(seed, 0))
    with tqdm(
        total=5 + len(KINDS) + 3 * (text is not None), unit="step", disable=not progress or tell is not None
    ) as bar:
        stages = Stages(bar, tell)
        others = [edit for edit in lm.edits if given is None or edit.digest != given.digest]
        with lm.overlay.only(others):
            stages.begin("Asking the model")
            probe = probe_of(lm, fact, text or fact.object)
            before = look_at(lm, probe)
            # The edit first: what it refuses is to be known before the traces, which take longest.
            request = EditRequest(fact, text or "", layer, hparams, tokens, method)
            edited = None if text is None else try_on(lm, probe, request, given, stages)
            known = bool(known_among(lm, [fact], "report"))
            seen = traced(lm, fact, known, {"samples": samples, "seed": seed}, stages)
            findings = Findings(probe, before, *seen, known, edited, tuple(map(str, others)))
        stages.begin(f"Writing {path}")
        page = page_of(lm, findings)
        write_atomically(path, lambda place: place.write_text(page, encoding="utf-8"))
        bar.update()
    return path


class Stages:
    """Tells what is being done, and how far all of it has come: on a bar, and to whoever asked to be told."""

    def __init__(self, bar: tqdm, tell: Tell | None) -> None:
        self.bar, self.tell, self.begun = bar, tell, 0

    def begin(self, doing: str) -> None:
        """The next stage begins, and the one before it has ended."""
        self.bar.update(min(1, self.begun))
        self.begun += 1
        self.within(doing, 0.0)

    def within(self, doing: str, done: float) -> None:
        """The stage has come so far, from 0 to 1."""
        self.bar.set_description(doing)
        if self.tell:
            self.tell(doing, min(1.0, (self.begun - 1 + done) / self.bar.total))


def check_report(lm: LanguageModel, fact: Fact, path: Path) -> None:
    """Raise where there is nothing to report on, or nowhere to write it, before any work."""
    if not isinstance(lm, LanguageModel):
        raise TypeError(
            f"report: the model is a {type(lm).__name__}; give a LanguageModel, such as load_model() returns."
        )
    if not isinstance(fact, Fact):
        raise TypeError(
            f"report: the fact is {fact!r}; expected a Fact, such as "
            'Fact(subject="Eiffel Tower", template="The {} is located in the city of", object="Paris").'
        )
    if Job.of(lm) is not threading.current_thread():
        check_idle(lm)
    check_file("report", path)


def target_of(edit: Edit, fact: Fact) -> str:
    """What the edit makes the model say of the fact.

    Raises: ValueError: it is an edit of other facts.
    """
    targets = {x.prompt: target for x, target in zip(edit.facts, edit.targets, strict=True)}
    if fact.prompt not in targets:
        raise ValueError(f"report: the {edit} is not about {fact.prompt!r}; give the fact that was edited, edit.fact.")
    return targets[fact.prompt]


def traced(
    lm: LanguageModel, fact: Fact, known: bool, settings: dict[str, int], stages: Stages
) -> tuple[Traces, CellAnswers]:
    """The traces of all kinds, and what the runs say where restoring one state of the subject brings most back.

    A fact that the model does not know is traced by what it says instead, its most probable next token.
    """
    stages.begin("Running the model clean and corrupted")
    check_verified(lm, "report")
    prompt = (fact, None) if known else (fact.prompt, fact.subject)
    runs = run_clean_and_corrupted(lm, *prompt, TraceSettings(**settings), with_heads=True)
    traces = []
    for label in KINDS:
        stages.begin(f"Tracing {label}")
        traces.append(trace_of_kind(runs, label))
    stages.begin("Tracing heads")
    if runs.recording.heads:  # in some models they cannot be told apart
        traces.append(trace_of_kind(runs, "head"))
    stages.begin("Asking at the strongest place")
    return Traces(traces), answers_at(lm, traces[0], *strongest_of(traces[0]))


def try_on(lm: LanguageModel, probe: Probe, request: EditRequest, given: Edit | None, stages: Stages) -> Edited:
    """The edit, what the model says under it, and its audit; undone again."""
    stages.begin("Editing")
    edit = given or make_edit(lm, request, stages.within)
    stages.begin("Asking the edited model")
    with edit.applied(lm):
        after = look_at(lm, probe)
    stages.begin("Auditing the edit")
    audited = audit(lm, edit)
    return Edited(edit, after, audited, request.tokens, None if given else request.method)
