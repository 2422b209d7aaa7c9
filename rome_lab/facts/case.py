"""Cases as things: what a model is asked about one fact, before and after it is made to say something else.

Case, Cases                     one request with the prompts that judge it, and a sequence of them
shares_first_token(lm, case)    whether target and true object begin alike
success(own, other)             ES, PS or NS: at how many of a case's prompts the one text is more probable than the other
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from rome_lab.facts.fact import Fact
from rome_lab.facts.prompts import continuation_ids
from rome_lab.models import LanguageModel

CASE_KINDS = ("counterfact", "zsre")


@dataclass(frozen=True)
class Case:
    """One request to a method, and the prompts by which its effect is judged.

    Attributes:
        id: unique within its data set.
        fact: its prompt is the rewrite prompt, its object the true object.
        target: the counterfactual object; in form "zsre" the answer to be taught, which is the fact's own object.
        paraphrases: whole prompts that ask for the same as the rewrite prompt.
        neighbours, neighbour_answers: prompts about other subjects, and what is true of each.
        generation_prompts: beginnings of free text about the subject.
        references: sentences about other subjects, of which the target is true.
        form: "counterfact" or "zsre"; says which metrics apply.
        neighbour_subjects: whom each neighbour is about, where that is known.
        entailed: prompts about the subject whose answer follows from the fact, each with the answer once the target is true
            and the one until then.
        kept: prompts about the subject whose answer does not depend on the fact, each with it.
        choices: further objects of the relation, true neither of the subject nor of a neighbour's, among which to choose.
    """

    id: str
    fact: Fact
    target: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]
    neighbour_answers: tuple[str, ...]
    generation_prompts: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    form: str = "counterfact"
    neighbour_subjects: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    entailed: tuple[tuple[str, str, str], ...] = ()
    kept: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.form not in CASE_KINDS:
            raise ValueError(f"Case: the form is {self.form!r}; expected one of {', '.join(map(repr, CASE_KINDS))}.")
        if len(self.neighbours) != len(self.neighbour_answers):
            raise ValueError(
                f"Case {self.id!r}: {len(self.neighbours)} neighbours have {len(self.neighbour_answers)} answers; "
                "give each neighbour its own."
            )

    @property
    def pairs(self) -> dict[str, list[tuple[str, str]]]:
        """Prompts with the texts whose probabilities are compared: at each prompt the target's and the object's."""
        texts = {"": self.target, "_true": self.fact.object}
        asking = {"rewrite": (self.fact.prompt,), "paraphrases": self.paraphrases}
        own = [(f"{name}{end}", prompts, text) for name, prompts in asking.items() for end, text in texts.items()]
        return {name: [(prompt, text) for prompt in prompts] for name, prompts, text in own} | {
            "neighbours": list(zip(self.neighbours, self.neighbour_answers, strict=True)),
            "neighbours_target": [(prompt, self.target) for prompt in self.neighbours],
        }

    @property
    def dependent_pairs(self) -> dict[str, list[tuple[str, str]]]:
        """Prompts with what follows from the target, with what followed from the object, and with what stays."""
        return {
            "entailed": [(prompt, new) for prompt, new, _ in self.entailed],
            "entailed_old": [(prompt, old) for prompt, _, old in self.entailed],
            "kept": list(self.kept),
        }

    @property
    def choice_pairs(self) -> dict[str, list[tuple[str, str]]]:
        """At each prompt, in turn, with each of the choices."""
        return {
            f"{name}_choices": [(prompt, choice) for prompt, _ in self.pairs[name] for choice in self.choices]
            for name in ("rewrite", "paraphrases", "neighbours")
        }


@dataclass(frozen=True, repr=False)
class Cases(Sequence[Case]):
    """Cases that can be judged, and how many could not be, by reason."""

    cases: tuple[Case, ...]
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int | slice) -> Case | tuple[Case, ...]:
        return self.cases[index]

    def __str__(self) -> str:
        return f"{len(self)} cases{self.reasons()}"

    def __repr__(self) -> str:
        return f"Cases({self})"

    def first(self, n: int) -> Cases:
        """The first n, with the same counts of what was dropped."""
        return Cases(self.cases[:n], self.dropped)

    def reasons(self) -> str:
        """What was dropped, most first, as the end of a sentence."""
        most_first = sorted(self.dropped.items(), key=lambda item: -item[1])
        return "".join(f"; {count} dropped: {reason}" for reason, count in most_first)

    def table(self) -> pd.DataFrame:
        """A row a case: what is asked, and how many prompts judge it."""
        rows = [
            {
                "id": case.id,
                "relation": case.fact.relation,
                "subject": case.fact.subject,
                "prompt": case.fact.prompt,
                "object": case.fact.object,
                "target": case.target,
                "paraphrases": len(case.paraphrases),
                "neighbours": len(case.neighbours),
                "neighbour_subjects": len(set(case.neighbour_subjects)),
                "references": len(case.references),
            }
            for case in self.cases
        ]
        return pd.DataFrame(rows)

    def dependents(self) -> pd.DataFrame:
        """A row a prompt whose answer follows from a case's edit, or stays: case, prompt, before, after."""
        rows = [(case.id, prompt, old, new) for case in self.cases for prompt, new, old in case.entailed]
        rows += [(case.id, prompt, answer, answer) for case in self.cases for prompt, answer in case.kept]
        return pd.DataFrame(rows, columns=["case", "prompt", "before", "after"])


class Unusable(ValueError):
    """Why a case cannot be judged: a reason that is the same for all cases that it concerns, so that it can be counted."""


def success(own: Sequence[float], other: Sequence[float]) -> float:
    """ES, PS or NS of a case: the share, in %, of its prompts at which P(own) > P(other); a tie is no success.

    Differs: the authors' code takes the mean of log P over a text's tokens, under which a long text that is sure of its
    end can win although its beginning is unlikely. The two agree where both texts have one token.

    Args: own, other: for each prompt, log P of the whole text: the sum over all its tokens, teacher forced.

    >>> success([-1.0, -3.0], [-2.0, -3.0])
    50.0
    """
    return 100.0 * float(np.mean(np.asarray(own) > np.asarray(other)))


def shares_first_token(lm: LanguageModel, case: Case) -> bool:
    """Whether target and true object begin alike, so that it says little which is the more probable one; never in zsRE."""
    first = [continuation_ids(lm, case.fact.prompt, text)[0] for text in (case.target, case.fact.object)]
    return case.form != "zsre" and first[0] == first[1]
