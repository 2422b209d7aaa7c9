"""Facts that people type in or choose from a list.

fact_of(lm, subject, prompt)        the fact that a prompt asks for
paraphrased(fact, lines)            the fact in other words of one's own
of_others(lm, fact, subjects)       what the model says of other subjects in the same words
best_known(lm, fact)                the fact in words in which the model knows it
first_word(lm, prompt)              the word that the model says next
facts_to_show(lm, facts, ...)       those that Figure 1 shows one by one
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rome_lab.facts import Fact, known_among, known_facts, load_relations, template_of
from rome_lab.lab.looks import continued
from rome_lab.models import LanguageModel

logger = logging.getLogger(__name__)

WORD_TOKENS = 5  # tokens in which the first word of an answer is sought


def best_known(lm: LanguageModel, fact: Fact) -> Fact:
    """The fact in the first of its templates in which the model knows it, or as it is where there is none."""
    ways = [replace(fact, template=template) for template in fact.templates]
    return next(iter(known_among(lm, ways, "comparison")), fact)


def fact_of(lm: LanguageModel, subject: str, prompt: str, relation: str | None = None) -> Fact:
    """The fact that a prompt asks for. An embedded one brings its relation; the object of any other is what `lm` says now.

    Blanks around either do not count. A subject much like an embedded one of the prompt's relation is warned of, as a
    slip of the pen.

    Args:
        prompt: with the subject in it, or "{}" in its place.
        relation: whose other wordings mean the same as the prompt; by default that of the prompt, if it is an embedded one.

    Raises:
        ValueError: the subject or the prompt is empty, or the subject is not in the prompt; there is no such relation.
    """
    subject, prompt = subject.strip(), prompt.strip()
    for name, text in {"subject": subject, "prompt": prompt}.items():
        if not text:
            raise ValueError(f"The {name} is empty; write it out.")
    template = prompt if "{}" in prompt and subject not in prompt else template_in(prompt, subject)
    text = template.replace("{}", subject, 1)
    known = load_relations()
    if relation is not None and relation not in known:
        raise ValueError(f"There is no relation {relation!r}; choose one of {', '.join(known)}.")
    named = known[relation] if relation else next((x for x in known.values() if template in x.statements), None)
    if named is None:
        return Fact(subject, template, first_word(lm, text))
    objects = {x.subject: x.object for x in named.facts}
    object_ = objects.get(subject) or first_word(lm, text)
    if subject not in objects and (alike := difflib.get_close_matches(subject, objects, n=1)):
        logger.warning(
            "%r is not among the embedded facts, but %r is; if that is meant, correct it. The old object is what %s says "
            "now: %r.", subject, alike[0], lm.name, object_,
        )  # fmt: skip
    return Fact(subject, template, object_, named.name, named.statements)


def template_in(prompt: str, subject: str) -> str:
    """The prompt with "{}" for its subject; where only the capitals differ, the error names the subject that is meant."""
    if subject not in prompt and (other := re.search(re.escape(subject), prompt, re.IGNORECASE)):
        raise ValueError(f"The subject {subject!r} is not in the prompt; did you mean {other[0]!r}?")
    return template_of(prompt, subject)


def paraphrased(fact: Fact, lines: Iterable[str]) -> tuple[Fact, ...]:
    """The fact in other words, a prompt a line, with the subject or "{}" in it; empty lines are left out.

    Raises:
        ValueError: the subject is not in a line.
    """
    texts = [line.strip() for line in lines if line.strip()]
    return tuple(replace(fact, template=x if "{}" in x else template_in(x, fact.subject)) for x in texts)


def of_others(lm: LanguageModel, fact: Fact, subjects: Iterable[str]) -> tuple[Fact, ...]:
    """What the model says of other subjects in the fact's own words; empty names are left out."""
    names = [name.strip() for name in subjects if name.strip()]
    texts = (fact.template.replace("{}", name, 1) for name in names)
    return tuple(
        replace(fact, subject=name, object=first_word(lm, text)) for name, text in zip(names, texts, strict=True)
    )


def first_word(lm: LanguageModel, prompt: str) -> str:
    """The first word that the model finds most probable after the prompt.

    Raises:
        ValueError: no word follows within a few tokens.
    """
    words = continued(lm, prompt, 1, WORD_TOKENS, top_k=1)[0].split()
    if not words:
        raise ValueError(f"{lm.name} says no word after {prompt!r}; end the prompt where a word has to follow.")
    return words[0].strip(".,;:!?\"'()") or words[0]


def facts_to_show(
    lm: LanguageModel, facts: Iterable[Fact], subjects: Sequence[str], known: Iterable[Fact], store: str, seed: int = 0
) -> list[Fact]:
    """Facts for Figure 1: those about `subjects` that `lm` knows, then the first of `known`, as many as there are subjects.

    Args: store, seed: as in `known_facts`.
    """
    about = [fact for fact in facts if fact.subject in subjects]
    wished = known_facts(lm, about, n=None, seed=seed, store=store, progress=False) if about else []
    return list(dict.fromkeys([*wished, *known]))[: len(subjects)]
