"""What a panel offers first for a model that nobody has settled: to verify it, and to suggest which layer to edit."""

from __future__ import annotations

import html
from collections.abc import Callable

import ipywidgets as w

from rome_lab.base import Tell
from rome_lab.editing import LayerSuggestion, default_settings, suggest_layer, verify
from rome_lab.lab.form import EditForm
from rome_lab.lab.live import LiveText, StatusLine, row
from rome_lab.models import IMPOSSIBLE, LAYOUTS, WRONG, LanguageModel, verdicts_of


class FirstSteps:
    """A row for each thing that is open: no verdict on a model of no family known by name, and no layer known to edit.

    Attributes:
        suggestion: once it was made; its layer is in the form then.

    Args:
        button: makes a button of a name, an action, which returns what to say, and the line that says it.
        tell: told how far an action has come.
    """

    def __init__(
        self,
        lm: LanguageModel,
        form: EditForm,
        button: Callable[[str, Callable[[], str], StatusLine], w.Button],
        tell: Tell,
    ) -> None:
        self.lm, self.form, self.tell, self.line = lm, form, tell, StatusLine()
        self.suggestion: LayerSuggestion | None = None
        self.verify_button = button("Verify", self.run_verify, self.line)
        self.verify_button.tooltip = (
            "Compares traces and an edit of this model with plain runs of it, in a minute or two"
        )
        self.suggest_button = button("Suggest a layer", self.run_suggest, self.line)
        self.suggest_button.tooltip = (
            "Edits some layers for facts that the model knows, and counts what follows; minutes"
        )
        self.verdict, self.table = LiveText(), LiveText()
        self.widget = w.VBox()
        unknown = lm.layout not in LAYOUTS and verdicts_of(lm) is None
        self.rows = [
            (f"{lm.name} is of no family known by name, and was never verified here.", self.verify_button, unknown),
            (f"No layer to edit is known for {lm.name}.", self.suggest_button, default_settings(lm).layer is None),
        ]
        self.offer()

    def offer(self) -> None:
        """Show what is open, and what came of the rest."""
        shown = []
        for text, button, is_open in self.rows:
            label = w.HTML(html.escape(text))
            label.add_class("rl-text")
            shown += [row([label, button])] if is_open else []
        results = [x for x in (self.verdict, self.table) if x.html]
        self.widget.children = [*shown, *results, self.line] if shown or results else ()

    def run_verify(self) -> str:
        table = verify(self.lm, progress=False, tell=self.tell)
        self.verdict.html = as_html(table.drop(columns="limit").to_html(index=False, border=0, na_rep=""))
        self.offer()
        for verdict in (WRONG, IMPOSSIBLE):
            if checks := table.loc[table["verdict"] == verdict, "check"].tolist():
                return f"{verdict.capitalize()}: {', '.join(checks)}."
        return "Verified: traces and an edit are what plain runs of the model give."

    def run_suggest(self) -> str:
        self.take(suggest_layer(self.lm, progress=False, tell=self.tell))
        return str(self.suggestion)

    def take(self, suggestion: LayerSuggestion | None) -> None:
        """Put the suggested layer into the form, and show the trials behind it."""
        self.suggestion = suggestion
        if suggestion:
            self.form.layer.value = self.form.suggested = suggestion.layer
            self.table.html = as_html(suggestion.for_people().to_html(index=False, border=0))
            self.offer()


def as_html(table: str) -> str:
    """A table that scrolls where there is no room for it."""
    return f'<div class="rl-wide-table">{table}</div>'
