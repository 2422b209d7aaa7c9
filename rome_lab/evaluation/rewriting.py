"""Prompts at which the facts of cases are rewritten: such as a model completes with the object at once, or almost.

The prompt of a known fact (B.1) may hold words that the model said before the object. Some of them fit no other object
("a team in the sport of ice", of hockey), and some make the prompt untrue ("not", "red, but also").
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rome_lab.base import Store, seed_from
from rome_lab.facts import Fact, known_facts
from rome_lab.models import LanguageModel

# What a model may say before the object: words that go with whatever else of the kind.
FITTING = re.compile(r"(the|a|an)( (city|country|field|game|planet|religion|sport)( of)?)?")


def rewrite_prompts(
    lm: LanguageModel,
    known: Sequence[Fact],
    facts: Iterable[Fact],
    seed: int = 0,
    store: Store | str | Path | None = None,
    progress: bool = True,
) -> list[Fact]:
    """The known facts, each at a prompt without words of the model's own, or none but `FITTING` ones; others are left out.

    A known fact whose prompt is one of its templates keeps it. Of the others all templates are tried: a random one that the
    model completes at once is taken, otherwise the prompt that is known, where its words fit.

    Args:
        known: what `known_facts` has found among `facts`.
        seed: of the choice of a template.
        store: folder of results, in which the search is kept and found again.

    Returns: in the order of `known`.
    """
    templates: dict[tuple[str | None, str, str], list[str]] = {}
    for fact in facts:
        templates.setdefault(statement_of(fact), []).extend(fact.templates or (fact.template,))
    added = {fact: words_added(fact, templates[statement_of(fact)]) for fact in known}
    again = [
        replace(fact, template=template, templates=())
        for fact, words in added.items()
        for template in dict.fromkeys(templates[statement_of(fact)])
        if words
    ]
    at_once: dict[tuple[str | None, str, str], list[str]] = {}
    for fact in known_facts(lm, again, n=None, seed=seed, store=store, progress=progress) if again else ():
        if not words_added(fact, templates[statement_of(fact)]):
            at_once.setdefault(statement_of(fact), []).append(fact.template)
    chosen = []
    for fact, words in added.items():
        if words and (several := at_once.get(statement_of(fact))):
            at_random = min(several, key=lambda template: seed_from(json.dumps([seed, *statement_of(fact), template])))
            chosen.append(replace(fact, template=at_random))
        elif not words or FITTING.fullmatch(words):
            chosen.append(fact)
    return chosen


def words_added(fact: Fact, templates: Iterable[str]) -> str:
    """What stands in the prompt of a known fact behind the template that it was found by; "" where that is all."""
    begun = [template for template in templates if fact.template.startswith(template)]
    return fact.template[max(map(len, begun)) :].strip()


def statement_of(fact: Fact) -> tuple[str | None, str, str]:
    """What a fact says, however it is worded."""
    return fact.relation, fact.subject, fact.object
