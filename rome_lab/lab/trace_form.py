"""What a trace is to be: `TraceRequest`, and the fields in which it is chosen by hand, `TraceForm`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import ipywidgets as w

from rome_lab.facts import Fact, load_relations, read_prompt
from rome_lab.models import LanguageModel
from rome_lab.tracing import GaussianNoise, SubjectSwap, Trace, causal_trace, partner_of

logger = logging.getLogger(__name__)

RESTORED = {
    "MLP outputs": ("mlp",),
    "states": ("state",),
    "attention outputs": ("attn",),
    "all three, side by side": ("state", "mlp", "attn"),
}
ANOTHER = "another subject"
CORRUPTIONS = {**{f"noise of {x} sigma": float(x) for x in (1, 3, 5)}, ANOTHER: 0.0}  # a value of None is no choice
WAYS = {"clean into corrupted": "denoise", "corrupted into clean": "noise"}
TRACE_TIPS = {
    "restored": "Which piece of the one run is put into the other.",
    "heads": "Each head at the last token, as a second picture.",
    "window": "Layers whose MLP or attention outputs are put back together; states are put back one by one.",
    "corruption": "What disturbs the subject: noise, the paper's is of 3 sigma; or another subject in its place.",
    "other": "Another subject of as many tokens. Left empty: one of the same relation that the model knows.",
    "foil": "What a logit difference is against: another object, here that of the other subject. May be empty.",
    "direction": "Does a piece suffice (clean into corrupted), or is it needed (corrupted into clean)?",
}


@dataclass(frozen=True)
class TraceRequest:
    """Traces to be made of one prompt.

    Attributes:
        kinds: what is restored, "head" last.
        answer: whose probability they follow; None for what the model says.
        corruption, direction, foil, window, samples: see `causal_trace`.
    """

    kinds: tuple[str, ...]
    answer: str | None = None
    corruption: GaussianNoise | SubjectSwap = GaussianNoise()
    direction: str = "denoise"
    foil: str | None = None
    window: int = 10
    samples: int = 10

    def traces(self, lm: LanguageModel, fact: Fact, grow: Callable[[Sequence[Trace], Trace], None]) -> list[Trace]:
        """All of them; heads that cannot be told apart are left out, with a warning.

        Args: grow: called with those that are complete and with a part of the next one.
        """
        options = {name: getattr(self, name) for name in ("corruption", "direction", "foil", "window", "samples")}
        complete: list[Trace] = []
        for kind in self.kinds:
            options |= {"kind": kind, "answer": self.answer, "callback": partial(grow, complete)}
            try:
                complete.append(causal_trace(lm, fact.prompt, fact.subject, **options))
            except ValueError as error:
                if kind != "head":
                    raise
                logger.warning("%s", error)
        return complete

    @property
    def departures(self) -> tuple[str, ...]:
        """In words, what is not as the paper has it."""
        swapped = isinstance(self.corruption, SubjectSwap)
        corruption = (
            f"{self.corruption.subject} in its place" if swapped else f"noise of {self.corruption.multiplier:g} sigma"
        )
        way = next(name for name, direction in WAYS.items() if direction == self.direction)
        return (corruption,) * (self.corruption != GaussianNoise()) + (way,) * (self.direction != "denoise")

    def code(self, traces: Sequence[Trace]) -> str:
        """The code that makes traces of this request anew, with the metric that they are in."""
        first, kinds = traces[0], tuple(trace.kind for trace in traces)
        swapped = isinstance(self.corruption, SubjectSwap)
        further = {
            "corruption": f"rl.{self.corruption!r}" if swapped else f"rl.GaussianNoise({self.corruption.multiplier:g})",
            "foil": repr(None if swapped else self.foil),
            "direction": repr(self.direction),
            "metric": repr(first.metric),
        }
        default = ("rl.GaussianNoise(3)", "None", "'denoise'", "'probability'")
        chosen = [f"{name}={x}" for (name, x), y in zip(further.items(), default, strict=True) if x != y]
        lines = [
            "traces = [",
            "    rl.causal_trace(",
            f"        lm, {first.prompt!r}, {first.subject!r}, kind,",
            f"        samples={self.samples}, window={self.window}, seed={first.seed}, answer={self.answer!r},",
            *(f"        {x}," for x in chosen),
            "    )",
            f"    for kind in {kinds!r}",
            "]",
        ]
        heads = kinds[-1] == "head"
        lines += [f"picture = rl.show(traces{'[:-1]' * heads}, lm)"]
        return "\n".join([*lines, *["axes = rl.plots.heatmap(traces[-1])  # heads"] * heads])


class TraceForm:
    """The fields that say how to trace; as they are at first, it is done the paper's way."""

    def __init__(self) -> None:
        self.restored = w.Dropdown(options=RESTORED, description="Restored")
        self.heads = w.Checkbox(description="heads, too", indent=False)
        self.window = w.BoundedIntText(10, min=1, max=1000, description="Window")
        self.corruption = w.Dropdown(options=CORRUPTIONS, value=3.0, description="Corruption")
        self.other = w.Combobox(description="In its place", placeholder="a subject; if empty, one is looked for")
        self.foil = w.Text(description="Foil", placeholder="an object, for the logit difference")
        self.direction = w.Dropdown(options=WAYS, description="Direction")
        self.objects: dict[str, str] = {}
        self.filled = ("", "", "")  # prompt, other subject and foil, as they were filled in here
        self.corruption.observe(lambda _: self.show_other(), "value")
        self.other.observe(lambda change: self.take_object(change["new"]), "value")
        self.show_other()
        for field in self.trace_fields():
            field.style.description_width, field.layout.width = "90px", "auto"
        for name, tip in TRACE_TIPS.items():
            getattr(self, name).tooltip = tip

    def trace_fields(self) -> tuple[w.DOMWidget, ...]:
        """In their order."""
        names = ("restored", "heads", "window", "corruption", "other", "foil", "direction")
        return tuple(getattr(self, name) for name in names)

    def show_other(self) -> None:
        """Show the field for another subject where one is wanted."""
        self.other.layout.display = "none" if self.corruption.value else None

    def take_object(self, subject: str) -> None:
        """The object of a subject that is offered is the foil."""
        self.foil.value = self.objects.get(subject, self.foil.value)

    def forget_other(self) -> None:
        self.other.value = self.foil.value = ""

    def trace_request(self, lm: LanguageModel, fact: Fact, samples: int, answer: str | None) -> TraceRequest:
        """What the fields say; another subject that is not named is looked for among facts of the same relation.

        Raises: ValueError: none is known.
        """
        corruption = GaussianNoise(self.corruption.value) if self.corruption.value else self.swap(lm, fact)
        kinds = self.restored.value + ("head",) * self.heads.value
        foil = self.foil.value.strip() or None
        return TraceRequest(kinds, answer, corruption, self.direction.value, foil, self.window.value, samples)

    def swap(self, lm: LanguageModel, fact: Fact) -> SubjectSwap:
        """The other subject with its object: the one that was typed, or else one that the model knows."""
        self.offer_subjects(lm, fact)
        typed = (self.other.value.strip(), self.foil.value.strip())
        if not typed[0] or (typed == self.filled[1:] and fact.prompt != self.filled[0]):
            relation = load_relations().get(fact.relation or "")
            partner = relation and partner_of(lm, fact, relation.facts, 0)
            if not partner:
                why = (
                    "no other subject of as many tokens is known to the model"
                    if relation
                    else "its relation is not known"
                )
                raise ValueError(
                    f"Another subject: {why}; write one into the field 'In its place', and its object as foil."
                )
            self.other.value, self.foil.value = typed = (partner.subject, partner.object)
            self.filled = (fact.prompt, *typed)
        return SubjectSwap(typed[0], typed[1] or None)

    def offer_subjects(self, lm: LanguageModel, fact: Fact) -> None:
        """List the subjects of the relation that have another object and fit into the prompt."""
        relation, read = load_relations().get(fact.relation or ""), read_prompt(lm, fact.prompt, fact.subject)
        self.objects = {}
        for other in relation.facts if relation else ():
            with suppress(ValueError):
                if other.object != fact.object and SubjectSwap(other.subject).swapped_ids(lm, read) is not None:
                    self.objects[other.subject] = other.object
        self.other.options = sorted(self.objects)
