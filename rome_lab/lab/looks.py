"""What a model says of a fact before and after an edit: the same questions asked twice, and the answers side by side.

probe_of(lm, fact, target)    the questions: the prompt, its paraphrases and neighbours
fact_of(lm, subject, prompt)  a fact that was typed in
look(lm, probe)               the model's answers, as it is now
side_by_side(probe, looks)    several looks as HTML, a column each
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.base import seed_from, uniform
from rome_lab.facts import Fact, completions, known_among, load_facts, load_relations, template_of
from rome_lab.models import LanguageModel, continue_randomly

logger = logging.getLogger(__name__)

MOST_NEIGHBOURS = 6  # most that are asked about
CANDIDATES = 24  # embedded facts among which neighbours are sought
BARS = 6  # next tokens that are shown
WORD = 5  # tokens in which the first word of an answer is sought
CONTINUATIONS, CONTINUATION_LENGTH, CONTINUATION_CHOICES = (
    3,
    20,
    10,
)  # continuations, their tokens, and the tokens among which each is drawn


@dataclass(frozen=True, eq=False)
class Probe:
    """What a model is asked before and after an edit; chosen once, so that both times it is the same.

    Attributes:
        fact, target: what is edited.
        paraphrases: the fact in the other templates of its relation.
        neighbours: facts about other subjects that the model knew when they were chosen, in the fact's own template.
    """

    fact: Fact
    target: str
    paraphrases: tuple[Fact, ...]
    neighbours: tuple[Fact, ...]


@dataclass(frozen=True, eq=False)
class Look:
    """What a model answered.

    Attributes:
        next_tokens: the most probable next tokens of the prompt, with their probabilities.
        continuations: texts that follow the prompt; the same seeds for every look.
        table: a row a question; kind (prompt, paraphrase or neighbour), text, object, p_object and p_target, the
            probabilities of all tokens of its own object and of the target.
        log_p: (questions, V), the next-token log probabilities of each.
    """

    next_tokens: tuple[tuple[str, float], ...]
    continuations: tuple[str, ...]
    table: pd.DataFrame
    log_p: Float[Tensor, "Q V"]

    def more_probable(self, kind: str, column: str) -> tuple[int, int]:
        """In how many of the questions of one kind p_object or p_target is the larger of the two, and of how many."""
        rows = self.table[self.table["kind"] == kind]
        other = {"p_object": "p_target", "p_target": "p_object"}[column]
        return int((rows[column] > rows[other]).sum()), len(rows)


def only_known(lm: LanguageModel, facts: Sequence[Fact]) -> list[Fact]:
    """Those of the facts whose object's first token is what the model finds most probable next."""
    return known_among(lm, facts, "comparison")


def best_known(lm: LanguageModel, fact: Fact) -> Fact:
    """The fact in the first of its templates in which the model knows it, or as it is where there is none."""
    return next(iter(only_known(lm, [replace(fact, template=template) for template in fact.templates])), fact)


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
    objects = [x.object for x in relation.facts if x.subject == subject] if relation else []
    found = objects[0] if objects else first_word(lm, template.replace("{}", subject, 1))
    subjects = [x.subject for x in relation.facts] if relation and not objects else []
    if alike := difflib.get_close_matches(subject, subjects, n=1):
        logger.warning(
            "%r is not among the embedded facts, but %r is; if that is meant, correct it. The old object is what %s says "
            "now: %r.", subject, alike[0], lm.name, found,
        )  # fmt: skip
    return Fact(subject, template, found, relation and relation.name, relation.statements if relation else ())


def first_word(lm: LanguageModel, prompt: str) -> str:
    """The first word that the model finds most probable after the prompt.

    Raises:
        ValueError: no word follows within a few tokens.
    """
    ids = lm.tokenizer(prompt)["input_ids"]
    (text,) = continue_randomly(lm, [ids], torch.zeros(1, length_with(lm, ids, WORD)), top_k=1)
    words = lm.tokenizer.decode(text[len(ids) :], skip_special_tokens=True).split()
    if not words:
        raise ValueError(f"{lm.name} says no word after {prompt!r}; end the prompt where a word has to follow.")
    return words[0].strip(".,;:!?\"'()") or words[0]


def probe_of(lm: LanguageModel, fact: Fact, target: str) -> Probe:
    """What to ask of the model about an edit.

    Neighbours are embedded facts of the same relation, or, where there is none, of any: those with the same object first,
    in an order that depends on nothing but their subjects. Facts whose object is the target say nothing and are left out.
    """
    others = [
        x for x in load_facts("embedded") if x.subject != fact.subject and x.object not in {target} - {fact.object}
    ]
    related = [replace(x, template=fact.template) for x in others if fact.relation and x.relation == fact.relation]
    ordered = sorted(related or others, key=lambda x: (x.object != fact.object, seed_from(x.subject)))
    paraphrases = tuple(replace(fact, template=x) for x in fact.templates if x != fact.template)
    return Probe(fact, target, paraphrases, tuple(only_known(lm, ordered[:CANDIDATES])[:MOST_NEIGHBOURS]))


def look_at(lm: LanguageModel, probe: Probe) -> Look:
    """The model's answers, as it is now."""
    asked = {"prompt": (probe.fact,), "paraphrase": probe.paraphrases, "neighbour": probe.neighbours}
    facts = [fact for group in asked.values() for fact in group]
    p_object, following = probabilities(lm, [(fact, fact.object) for fact in facts])
    p_target, _ = probabilities(lm, [(fact, probe.target) for fact in facts])
    table = pd.DataFrame(
        {
            "kind": [kind for kind, group in asked.items() for _ in group],
            "text": [fact.prompt for fact in facts],
            "object": [fact.object for fact in facts],
            "p_object": p_object,
            "p_target": p_target,
        }
    )
    p, ids = following[0].exp().topk(BARS)
    next_tokens = tuple(zip((lm.tokenizer.decode([i]) for i in ids.tolist()), p.tolist(), strict=True))
    return Look(next_tokens, continuations(lm, probe.fact.prompt), table, following)


def probabilities(lm: LanguageModel, asked: Sequence[tuple[Fact, str]]) -> tuple[list[float], Float[Tensor, "Q V"]]:
    """Of each text behind its fact's prompt: the probability of all its tokens; and the log probabilities of the first."""
    answers = completions(lm, [(fact.prompt, text) for fact, text in asked], "comparison", following=True)
    return [answer.p for answer in answers], torch.stack([answer.following for answer in answers])


def continuations(lm: LanguageModel, prompt: str) -> tuple[str, ...]:
    """`SAMPLES` texts that follow the prompt, each drawn with a seed of its own number and the prompt alone."""
    ids = lm.tokenizer(prompt)["input_ids"]
    length = length_with(lm, ids, CONTINUATION_LENGTH)
    draws = torch.stack([uniform(length, "continuation", number, prompt) for number in range(CONTINUATIONS)])
    texts = continue_randomly(lm, [ids] * CONTINUATIONS, draws, CONTINUATION_CHOICES)
    return tuple(lm.tokenizer.decode(text[len(ids) :], skip_special_tokens=True).rstrip("\ufffd") for text in texts)


def length_with(lm: LanguageModel, ids: Sequence[int], more: int) -> int:
    """Length of a text that goes on from `ids` by `more` tokens, or by as many as the model can still read.

    Raises:
        ValueError: the model can't read `ids` to their end.
    """
    lm.check_length(len(ids), "comparison")
    return min(len(ids) + more, lm.context_length)
