"""The fields of the editing notebook that say what to edit and how: `EditForm`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import ipywidgets as w

from rome_lab.editing import ENOUGH, KEYS, default_settings, key_size
from rome_lab.facts import load_relations
from rome_lab.lab.trials import EditRequest, ten_facts
from rome_lab.lab.typed_facts import best_known, fact_of
from rome_lab.models import LanguageModel

TEN_LABEL = "ten facts to try"


class EditForm:
    """The fields that say what to edit and how.

    Args:
        request: what they say at first.
        refuse: told of the error where a chosen fact cannot be filled in.
    """

    def __init__(self, lm: LanguageModel, request: EditRequest, refuse: Callable[[Exception], None]) -> None:
        self.lm, self.relations, self.refuse = lm, load_relations(), refuse
        default = default_settings(lm)
        self.settings = request.settings or default.settings
        layer = next((x for x in (request.layer, default.layer) if x is not None), lm.n_layers // 3)
        tokens = request.tokens or ENOUGH * key_size(lm, layer)
        self.relation = w.Dropdown(options=[TEN_LABEL, *self.relations], description="Relation")
        self.chosen = w.Dropdown(options=[("", -1)], description="Fact")
        self.subject = w.Text(request.fact.subject, description="Subject")
        self.prompt = w.Textarea(request.fact.prompt, description="Prompt")
        self.target = w.Combobox(value=request.target, description="Target", placeholder="what the model is to say")
        self.steps = w.BoundedIntText(self.settings.steps, min=1, max=1000, description="Adam steps")
        self.tokens = w.BoundedIntText(tokens, min=1, max=10**9, step=1024, description="Tokens for C")
        self.key = w.Dropdown(options=KEYS, value=self.settings.key, description="Key")
        self.layer = w.IntSlider(layer, 0, lm.n_layers - 1, description="Layer", continuous_update=False)
        self.offer()
        self.relation.observe(lambda _: self.offer(), "value")
        self.chosen.observe(lambda _: self.fill(), "value")

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
        self.target.options = sorted({x.object for x in self.relations[fact.relation].facts} - {fact.object})

    def request(self) -> EditRequest:
        """What the fields say.

        Raises:
            ValueError: they name no fact.
        """
        settings = replace(self.settings, steps=self.steps.value, key=self.key.value)
        fact = fact_of(self.lm, self.subject.value.strip(), " ".join(self.prompt.value.split()))
        return EditRequest(fact, self.target.value.strip(), self.layer.value, settings, self.tokens.value)
