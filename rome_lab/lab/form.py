"""The fields of the editing notebook that say what to trace and edit, and how: `EditForm`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ipywidgets as w

from rome_lab.editing import EDITORS, ENOUGH, KEYS, default_settings, key_size
from rome_lab.facts import Fact, load_relations
from rome_lab.lab.trace_form import TRACE_TIPS, TraceForm
from rome_lab.lab.trials import EditRequest, ten_facts
from rome_lab.lab.typed_facts import best_known, fact_of, of_others, paraphrased
from rome_lab.models import LanguageModel

TEN_LABEL = "ten facts to try"
BY_WORDING = "that of its wording, if it is known"
TIPS = {
    "subject": "What the fact is about, as it stands in the prompt. Enter traces.",
    "prompt": "Ends right before the word that the model is to say. Enter traces.",
    "target": "What the model is to say instead. Enter edits.",
    "method": "rome changes one matrix; the others, made for many facts, several layers that end at the one below.",
    "layer": "Whose MLP to change; a click on a column of the trace chooses it, too.",
    "follow": "Whose probability is traced: of the word that the model says, or of the target.",
    "relation_of_fact": "Brings paraphrases and neighbours to a fact in words of your own.",
    "paraphrases": "Your own, one a line, with the subject in each; they take the place of the known ones.",
    "others": "Other subjects, one a line, asked about in the same words; they take the place of the known neighbours.",
    "steps": "Steps of Adam in the search for v*, the value with which the model says the target.",
    "tokens": "Text on which it is measured how keys vary (C); more is slower and not better.",
    "key": "Which keys of the subject get the new value; the README explains them.",
}
KEPT = (*TIPS, *TRACE_TIPS)


class EditForm(TraceForm):
    """The fields that say what to trace and edit, and how.

    Attributes:
        suggested: the layer that `suggest_layer` has found for the model, if it was asked.

    Args:
        request: what they say at first.
        refuse: told of the error where a chosen fact cannot be filled in.
    """

    def __init__(self, lm: LanguageModel, request: EditRequest, refuse: Callable[[Exception], None]) -> None:
        super().__init__()
        self.lm, self.relations, self.refuse = lm, load_relations(), refuse
        default = default_settings(lm)
        self.settings = request.settings or default.settings
        self.suggested: int | None = None
        layer = next((x for x in (request.layer, default.layer) if x is not None), lm.n_layers // 3)
        tokens = request.tokens or ENOUGH * key_size(lm, layer)
        self.relation = w.Dropdown(options=[TEN_LABEL, *self.relations], description="Relation")
        self.chosen = w.Dropdown(options=[("", -1)], description="Fact")
        self.subject = w.Text(request.fact.subject, description="Subject")
        self.prompt = w.Textarea(request.fact.prompt, description="Prompt", rows=2)
        self.target = w.Combobox(value=request.target, description="Target", placeholder="what the model is to say")
        self.layer = w.BoundedIntText(layer, min=0, max=lm.n_layers - 1, description="Layer")
        self.method = w.Dropdown(options=EDITORS, value=request.method, description="Method")
        self.follow = w.Dropdown(options=["what the model says", "the target"], description="Followed")
        self.relation_of_fact = w.Dropdown(options=[BY_WORDING, *self.relations], description="As relation")
        self.paraphrases = w.Textarea(description="Paraphrases", placeholder="one a line", rows=2)
        self.others = w.Textarea(description="Neighbours", placeholder="other subjects, one a line", rows=2)
        self.steps = w.BoundedIntText(self.settings.steps, min=1, max=1000, description="Adam steps")
        self.tokens = w.BoundedIntText(tokens, min=1, max=10**9, step=1024, description="Tokens for C")
        self.key = w.Dropdown(options=KEYS, value=self.settings.key, description="Key")
        for name, tip in TIPS.items():
            getattr(self, name).tooltip = tip
        self.offer()
        self.relation.observe(lambda _: self.offer(), "value")
        self.chosen.observe(lambda _: self.fill(), "value")
        self.widget = self.placed()

    def placed(self) -> w.VBox:
        """The fields in their places: what most need, and the rest folded away."""
        groups = {
            "Trace: what is restored, corruption, direction": (*self.trace_fields(), self.follow),
            "Questions before and after": (self.relation_of_fact, self.paraphrases, self.others),
            "Search settings of the edit": (self.steps, self.tokens, self.key),
        }
        folded = w.Accordion([w.VBox(fields) for fields in groups.values()], titles=tuple(groups), selected_index=None)
        folded.add_class("rl-more")
        basics = [self.relation, self.chosen, self.subject, self.prompt, self.target, self.method, self.layer]
        for field in (*basics, *(field for fields in groups.values() for field in fields)):
            field.style.description_width, field.layout.width = "90px", "auto"
        self.target.add_class("rl-target")
        box = w.VBox([*basics, folded])
        box.add_class("rl-fields")
        return box

    def offer(self) -> None:
        """List the facts of the chosen relation."""
        name = self.relation.value
        ten = name == TEN_LABEL
        self.offered = ten_facts() if ten else [EditRequest(fact, "") for fact in self.relations[name].facts]
        names = [(f"{x.fact.subject}: {x.fact.object}", place) for place, x in enumerate(self.offered)]
        self.chosen.options = [("choose one …", -1), *names]

    def fill(self) -> None:
        """Put the chosen fact into the fields, in words in which the model knows it, and offer other objects for it."""
        if self.chosen.value == -1:
            return
        request = self.offered[self.chosen.value]
        try:
            fact = request.fact if request.target else best_known(self.lm, request.fact)
        except Exception as error:  # a widget's callback has no caller to tell
            self.refuse(error)
            return
        self.subject.value, self.prompt.value, self.target.value = fact.subject, fact.prompt, request.target
        self.paraphrases.value = self.others.value = ""
        self.forget_other()
        self.relation_of_fact.value = BY_WORDING
        self.target.options = sorted({x.object for x in self.relations[fact.relation].facts} - {fact.object})

    def request(self) -> EditRequest:
        """What the fields say.

        Raises:
            ValueError: they name no fact.
        """
        settings = replace(self.settings, steps=self.steps.value, key=self.key.value)
        relation = None if self.relation_of_fact.value == BY_WORDING else self.relation_of_fact.value
        fact = fact_of(self.lm, self.subject.value.strip(), " ".join(self.prompt.value.split()), relation)
        return EditRequest(
            fact, self.target.value.strip(), self.layer.value, settings, self.tokens.value, self.method.value
        )

    def questions(self, fact: Fact) -> dict[str, tuple[Fact, ...]]:
        """The questions of one's own, by the attribute of a Probe that they replace.

        Raises:
            ValueError: the subject is not in a paraphrase.
        """
        own = {
            "paraphrases": paraphrased(fact, self.paraphrases.value.splitlines()),
            "neighbours": of_others(self.lm, fact, self.others.value.splitlines()),
        }
        return {name: facts for name, facts in own.items() if facts}

    @property
    def answer(self) -> str | None:
        """The text whose probability is traced; None for what the model says."""
        return self.target.value.strip() if self.follow.value == "the target" else None

    def wording(self) -> tuple[str, str]:
        """Subject and prompt as they are typed, without asking the model."""
        subject, prompt = self.subject.value.strip(), " ".join(self.prompt.value.split())
        return subject, prompt if subject in prompt else prompt.replace("{}", subject, 1)

    def take(self, other: EditForm) -> None:
        """Say what another form says."""
        for name in KEPT:
            getattr(self, name).value = getattr(other, name).value
        self.filled = other.filled
