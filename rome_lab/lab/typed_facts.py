"""Facts that people type in or choose from a list.

fact_of(lm, subject, prompt)    the fact that a prompt asks for
best_known(lm, fact)            the fact in words in which the model knows it
first_word(lm, prompt)          the word that the model says next
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import replace

from rome_lab.facts import Fact, known_among, load_relations, template_of
from rome_lab.lab.looks import continued
from rome_lab.models import LanguageModel

logger = logging.getLogger(__name__)

WORD_TOKENS = 5  # tokens in which the first word of an answer is sought


def best_known(lm: LanguageModel, fact: Fact) -> Fact:
    """The fact in the first of its templates in which the model knows it, or as it is where there is none."""
    ways = [replace(fact, template=template) for template in fact.templates]
    return next(iter(known_among(lm, ways, "comparison")), fact)


def fact_of(lm: LanguageModel, subject: str, prompt: str) -> Fact:
    """The fact that a prompt asks for. An embedded one brings its relation; the object of any other is what `lm` says now.

    Blanks around either do not count. A subject much like an embedded one of the prompt's relation is warned of, as a
    slip of the pen.

    Args:
        prompt: with the subject in it, or "{}" in its place.

    Raises:
        ValueError: the subject or the prompt is empty, or the subject is not in the prompt.
    """
    subject, prompt = subject.strip(), prompt.strip()
    for name, text in {"subject": subject, "prompt": prompt}.items():
        if not text:
            raise ValueError(f"The {name} is empty; write it out.")
    template = prompt if "{}" in prompt and subject not in prompt else template_of(prompt, subject)
    relation = next((x for x in load_relations().values() if template in x.statements), None)
    if relation is None:
        return Fact(subject, template, first_word(lm, template.replace("{}", subject, 1)))
    objects = {x.subject: x.object for x in relation.facts}
    object_ = objects.get(subject) or first_word(lm, template.replace("{}", subject, 1))
    if subject not in objects and (alike := difflib.get_close_matches(subject, objects, n=1)):
        logger.warning(
            "%r is not among the embedded facts, but %r is; if that is meant, correct it. The old object is what %s says "
            "now: %r.", subject, alike[0], lm.name, object_,
        )  # fmt: skip
    return Fact(subject, template, object_, relation.name, relation.statements)


def first_word(lm: LanguageModel, prompt: str) -> str:
    """The first word that the model finds most probable after the prompt.

    Raises:
        ValueError: no word follows within a few tokens.
    """
    words = continued(lm, prompt, 1, WORD_TOKENS, top_k=1)[0].split()
    if not words:
        raise ValueError(f"{lm.name} says no word after {prompt!r}; end the prompt where a word has to follow.")
    return words[0].strip(".,;:!?\"'()") or words[0]
