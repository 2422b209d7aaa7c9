"""Cases as things: `Case`, one request with the prompts that judge it, and `Cases`, a sequence of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from rome_lab.facts import Fact

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

    def __post_init__(self) -> None:
        if self.form not in CASE_KINDS:
            raise ValueError(f"Case: the form is {self.form!r}; expected one of {', '.join(map(repr, CASE_KINDS))}.")
        if len(self.neighbours) != len(self.neighbour_answers):
            raise ValueError(
                f"Case {self.id!r}: {len(self.neighbours)} neighbours have {len(self.neighbour_answers)} answers; "
                "give each neighbour its own."
            )


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


class Unusable(ValueError):
    """Why a case cannot be judged: a reason that is the same for all cases that it concerns, so that it can be counted."""
