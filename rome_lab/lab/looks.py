"""What a model says of a fact before and after an edit: the same questions asked twice, and the answers side by side.

probe_of(lm, fact, target)    a Probe: the questions, which are the prompt, its paraphrases and neighbours
look_at(lm, probe)            a Look: the model's answers, as it is now
continued(lm, prompt, ...)    texts that follow a prompt

`rome_lab.lab.page` draws them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.base import uniform
from rome_lab.editing import nearest_facts
from rome_lab.facts import Fact, completions, known_among, load_facts
from rome_lab.models import LanguageModel, continue_randomly

MOST_NEIGHBOURS = 6  # most that are asked about
CANDIDATES = 24  # embedded facts among which neighbours are sought
BARS = 6  # next tokens that are shown
# Continuations, their tokens, and the tokens among which each is drawn.
CONTINUATIONS, CONTINUATION_LENGTH, CONTINUATION_CHOICES = 3, 20, 10


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

    @property
    def questions(self) -> tuple[Fact, ...]:
        """In the order of the rows of `Look.table`."""
        return (self.fact, *self.paraphrases, *self.neighbours)

    def same_as(self, other: Probe) -> bool:
        """Whether looks with the one stand beside looks with the other."""
        return (self.questions, self.target) == (other.questions, other.target)


@dataclass(frozen=True, eq=False)
class Look:
    """What a model answered.

    Attributes:
        next_tokens: the most probable next tokens of the prompt, with their probabilities.
        continuations: texts that follow the prompt, first the greedy one; the same seeds for every look.
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

    def mean(self, kind: str, column: str) -> float:
        """Mean of p_object or p_target over the questions of one kind."""
        return float(self.table.loc[self.table["kind"] == kind, column].mean())


def probe_of(lm: LanguageModel, fact: Fact, target: str) -> Probe:
    """What to ask of the model about an edit.

    Neighbours are the nearest embedded facts of its relation, none where that is not known; those whose object is the
    target say nothing and are left out.
    """
    related = [x for x in load_facts("embedded") if x.relation == fact.relation]
    ordered = nearest_facts(fact, (x for x in related if x.object not in {target} - {fact.object}))
    paraphrases = tuple(replace(fact, template=x) for x in fact.templates if x != fact.template)
    neighbours = known_among(lm, ordered[:CANDIDATES], "comparison")[:MOST_NEIGHBOURS]
    return Probe(fact, target, paraphrases, tuple(neighbours))


def look_at(lm: LanguageModel, probe: Probe) -> Look:
    """The model's answers, as it is now."""
    groups = {"prompt": (probe.fact,), "paraphrase": probe.paraphrases, "neighbour": probe.neighbours}
    facts = [fact for group in groups.values() for fact in group]
    pairs = [(fact.prompt, fact.object) for fact in facts] + [(fact.prompt, probe.target) for fact in facts]
    answers = completions(lm, pairs, "comparison", following=True)
    own, target = answers[: len(facts)], answers[len(facts) :]
    kinds = [kind for kind, group in groups.items() for _ in group]
    rows = [
        (kind, fact.prompt, fact.object, p_object.p, p_target.p)
        for kind, fact, p_object, p_target in zip(kinds, facts, own, target, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["kind", "text", "object", "p_object", "p_target"])
    log_p = torch.stack([answer.following for answer in own])  # (Q, V)
    p, ids = log_p[0].exp().topk(BARS)
    next_tokens = tuple(zip((lm.tokenizer.decode([i]) for i in ids.tolist()), p.tolist(), strict=True))
    greedy = continued(lm, probe.fact.prompt, 1, CONTINUATION_LENGTH, 1)
    texts = (*greedy, *continued(lm, probe.fact.prompt, CONTINUATIONS, CONTINUATION_LENGTH, CONTINUATION_CHOICES))
    whole = tuple(text.rstrip("\ufffd") for text in texts)  # the last character may lack bytes
    return Look(next_tokens, whole, table, log_p)


def continued(lm: LanguageModel, prompt: str, n: int, tokens: int, top_k: int) -> tuple[str, ...]:
    """What follows the prompt, `n` times, each drawn with a seed of its own number and the prompt alone.

    Args: tokens: length of each, or less where the model can read no more. top_k: tokens among which each is drawn.
    Raises: ValueError: the model can't read the prompt to its end.
    """
    ids = lm.tokenizer(prompt)["input_ids"]
    lm.check_length(len(ids), "comparison")
    length = min(len(ids) + tokens, lm.context_length)
    draws = torch.stack([uniform(length, "continuation", number, prompt) for number in range(n)])
    texts = continue_randomly(lm, [ids] * n, draws, top_k)
    return tuple(lm.tokenizer.decode(text[len(ids) :], skip_special_tokens=True) for text in texts)
